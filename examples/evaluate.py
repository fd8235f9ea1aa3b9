"""Evaluates an ensemble of digit readers and a language model, with jax_sce.

    python examples/evaluate.py [--quick] [--out FOLDER]

The digits: eight seeds of the network of `train_digits.py` are trained together under `jax.vmap`,
on only a quarter of the digits, so that there are mistakes to look at. One jitted call, `jax.vmap`
over the models and inside it over the classes, then returns the loss of each class, the accuracy
and the calibration of each model and of the ensemble that averages their probabilities.

The language model: a small one of `train_language_model.py`, trained briefly. The fused head
returns the loss of each held-out token, the rank of the true token, the model's prediction and the
log-normalizer. They give the perplexity, the top-1 and top-5 accuracy and the confidence on each
held-out file, and the logits of the text never exist.

Time: one to two minutes on two CPU cores, and half a minute more in the first run, which encodes
the text; `--quick` does all of it, much smaller, in less than a minute.

Draws `evaluate.png`: the loss by class, the reliability diagram and the digits that are hardest to
read; and `evaluate_language_model.png`: the hardest and the easiest files, and the reliability of
the tokens.
"""

import common  # first, because of Ctrl-C

# isort: split
import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import train_language_model as language
from common import BLUE, ORANGE
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from train_digits import Digits, Params, init, load, predict, train_epoch

from jax_sce import linear_softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

# --- the digits ----------------------------------------------------------------------------------

CLASSES = 10
BINS = 10  # intervals of confidence, equally wide
HARDEST = 10  # the number of digits to show


class Report(NamedTuple):
    """Measurements of one model, or of several with a leading axis."""

    losses: Array  # [N]
    class_loss: Array  # [CLASSES], mean loss of the digits of each class
    prediction: Array  # [N]
    accuracy: Array  # []
    bin_count: Array  # [BINS], number of digits read with that confidence
    bin_confidence: Array  # [BINS], sum of their confidences
    bin_correct: Array  # [BINS], number of them that were read right
    calibration_error: Array  # [], mean over the bins, by their counts


def measure(logits: Array, labels: Array) -> Report:
    """The report on one model, from its logits [N, V] and the labels [N]."""

    def class_loss(label: Array) -> Array:
        return softmax_cross_entropy_with_integer_labels(
            logits, labels, weights=labels == label, reduction="mean"
        )

    losses, aux = softmax_cross_entropy_with_integer_labels(logits, labels, return_aux=True)
    correct = aux.rank == 0
    confidence = jnp.exp(logits.max(-1) - aux.log_normalizer)
    bins = jnp.minimum(confidence * BINS, BINS - 1).astype(jnp.int32)
    in_bin = jax.nn.one_hot(bins, BINS, axis=0)  # [BINS, N]
    bin_confidence, bin_correct = in_bin @ confidence, in_bin @ correct
    return Report(
        losses=losses,
        class_loss=jax.vmap(class_loss)(jnp.arange(CLASSES)),
        prediction=aux.prediction,
        accuracy=correct.mean(),
        bin_count=in_bin.sum(1),
        bin_confidence=bin_confidence,
        bin_correct=bin_correct,
        calibration_error=jnp.abs(bin_confidence - bin_correct).sum() / labels.size,
    )


@jax.jit
def evaluate(params: Params, digits: Digits) -> Report:
    """Reports on M models with stacked parameters, and on their ensemble: [M + 1, ...]."""
    logits = jax.vmap(predict, (0, None))(params, digits.images)
    # Log-probabilities are logits too. The mean's 1 / M adds a constant, which softmax ignores.
    ensemble = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0, keepdims=True)
    return jax.vmap(measure, (0, None))(jnp.concatenate([logits, ensemble]), digits.labels)


def train(models: int, epochs: int, digits: Digits, console: Console) -> Params:
    """Trains as many models together, each from its own seed; returns their stacked parameters."""
    start, shuffle = jax.random.split(jax.random.key(0))
    states = jax.vmap(init)(jax.random.split(start, models))
    one_epoch = partial(train_epoch, softmax_cross_entropy_with_integer_labels)
    epoch = jax.jit(jax.vmap(one_epoch, in_axes=(0, 0, None)))
    with common.progress_bar(console) as progress:
        task = progress.add_task(f"{models} models: compiling", total=epochs)
        for keys in jax.random.split(shuffle, (epochs, models)):
            states, losses = epoch(states, keys, digits)
            loss = f"{models} models: mean loss {losses.mean():.1e}"
            progress.update(task, advance=1, description=loss)
    return states.params


def show(report: Report) -> Table:
    table = Table("", "test loss", "hardest class", "test accuracy", "calibration error")
    names = [f"model {number}" for number in range(1, len(report.accuracy))] + ["ensemble"]
    for name, row in zip(names, zip(*report, strict=True), strict=True):
        model = Report(*row)
        table.add_row(
            name,
            f"{model.losses.mean():.4f}",
            f"{model.class_loss.argmax()} ({model.class_loss.max():.3f})",
            f"{model.accuracy:.2%}",
            f"{model.calibration_error:.2%}",
            style="bold" if name == "ensemble" else "",
        )
    return table


def draw(report: Report, digits: Digits, path: Path) -> None:
    models, ensemble = (Report(*(x[part] for x in report)) for part in (slice(-1), -1))
    figure = Figure(figsize=(10, 7), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.6, 1])
    by_class, reliability = top.subplots(1, 2)

    classes, mean = np.arange(CLASSES), models.class_loss.mean(0)
    spread = np.abs(mean - np.array([models.class_loss.min(0), models.class_loss.max(0)]))
    style = dict(yerr=spread, ecolor="black", capsize=2, error_kw=dict(linewidth=0.8))
    by_class.bar(classes - 0.2, mean, 0.4, color=ORANGE, label="one model (mean, range)", **style)
    by_class.bar(classes + 0.2, ensemble.class_loss, 0.4, color=BLUE, label="ensemble")
    by_class.set(title="Test loss by class", xlabel="digit", ylabel="mean cross-entropy (nats)")
    by_class.set_xticks(classes)
    by_class.margins(y=0.2)  # room for the legend

    average = Report(*(x.mean(0) for x in models))
    for name, model, color, marker in (
        ("one model", average, ORANGE, "s"),
        ("ensemble", ensemble, BLUE, "o"),
    ):
        used = model.bin_count >= 10  # with fewer digits, a share means little
        count, confidence, correct = (
            x[used] for x in (model.bin_count, model.bin_confidence, model.bin_correct)
        )
        share = correct / count
        reliability.errorbar(
            100 * confidence / count, 100 * share, 100 * np.sqrt(share * (1 - share) / count),
            color=color, marker=marker, capsize=3,
            label=f"{name}, {model.calibration_error:.1%} away on average",
        )  # fmt: skip
    reliability.axline((50, 50), slope=1, color="black", linestyle=":", label="calibration")
    reliability.set(
        title="Reliability (± standard error)", xlabel="confidence (%)",
        ylabel="digits read right (%)", xlim=(30, 102), ylim=(30, 102),
    )  # fmt: skip
    for axis in (by_class, reliability):
        axis.legend()
        common.tidy(axis)

    bottom.suptitle("Hardest for the ensemble: true digit, digit that was read, loss in nats")
    hardest = np.argsort(-ensemble.losses)[:HARDEST]
    for axis, i in zip(bottom.subplots(1, HARDEST), hardest, strict=True):
        axis.imshow(digits.images[i].reshape(8, 8), cmap="gray_r")
        axis.set_title(f"{digits.labels[i]} as {ensemble.prediction[i]}", fontsize=10)
        axis.set_xlabel(f"{ensemble.losses[i]:.1f}")
        axis.set(xticks=[], yticks=[])
    figure.savefig(path)


# --- the language model --------------------------------------------------------------------------

TEXT = language.Config(vocabulary=2048, width=64, depth=2, steps=100, evaluations=4)
QUICK_TEXT = dataclasses.replace(TEXT, vocabulary=512, files=200, depth=1, steps=30, evaluations=1)
IGNORED = -100  # the label of the padding after the end of a file
LEAST = 100  # tokens in a file; with fewer, a mean says little
EXTREMES = 5  # the number of hardest files to show, and of easiest ones


class TokenReport(NamedTuple):
    """Measurements of each held-out token."""

    loss: np.ndarray  # [N], float
    rank: np.ndarray  # [N], int, the number of tokens that the model thought likelier
    confidence: np.ndarray  # [N], the probability that the model gave to its prediction

    def top(self, k: int) -> float:
        """The share of tokens that are among the model's first k guesses."""
        return (self.rank < k).mean()


@nnx.jit
def measure_tokens(model: language.Transformer, windows: Array) -> TokenReport:
    """Reports on windows [batches, B, T + 1] of tokens; each field is [batches, B, T]."""

    def measure_batch(batch: Array) -> TokenReport:
        labels = batch[:, 1:]
        # The model reads padding as token 0. It comes last, and no token sees a later one.
        hidden = model.hidden(jnp.maximum(batch[:, :-1], 0))
        embedding = model.embedding.embedding[...]
        loss, aux = linear_softmax_cross_entropy(
            hidden, embedding.T, labels, ignore_index=IGNORED, reduction="none", return_aux=True
        )
        # The probability of the prediction needs only its own logit.
        logit = (hidden * embedding[aux.prediction]).sum(-1)
        return TokenReport(loss, aux.rank, jnp.exp(logit - aux.log_normalizer))

    return jax.lax.map(measure_batch, windows)


def measure_files(
    model: language.Transformer, corpus: language.Corpus, config: language.Config
) -> dict[str, TokenReport]:
    """Reports on every token of each held-out file. A token sees at most the model's context."""
    starts = np.flatnonzero(corpus.validation == corpus.tokenizer.token_to_id(language.END_OF_FILE))
    files = np.split(corpus.validation, starts[1:])
    windows = np.concatenate([file_windows(tokens, config) for tokens in files])
    padding = (0, -len(windows) % config.batch), (0, 0)
    batches = np.pad(windows, padding, constant_values=IGNORED)
    batches = batches.reshape(-1, config.batch, config.context + 1)
    report = jax.device_get(measure_tokens(model, batches))

    counted = batches[..., 1:] != IGNORED
    ends = np.cumsum([len(tokens) - 1 for tokens in files])[:-1]
    fields = zip(*(np.split(field[counted], ends) for field in report), strict=True)
    named = zip(corpus.held_out, fields, strict=True)
    return {name: TokenReport(*field) for name, field in named}


def file_windows(tokens: np.ndarray, config: language.Config) -> np.ndarray:
    """Padded windows [count, T + 1], in which each token but the file's first is a label once."""
    count = -(-(len(tokens) - 1) // config.context)
    padded = np.full(count * config.context + 1, IGNORED, np.int32)
    padded[: len(tokens)] = tokens
    return language.windows_at(padded, config.context * np.arange(count), config)


def hardest_and_easiest(
    files: dict[str, TokenReport],
) -> tuple[dict[str, TokenReport], dict[str, TokenReport]]:
    """The files with the largest and the smallest loss per token, each with the hardest first."""
    long = [name for name, report in files.items() if report.loss.size >= LEAST]
    ranked = sorted(long, key=lambda name: -files[name].loss.mean())
    extremes = min(EXTREMES, len(ranked) // 2)
    hardest, easiest = ranked[:extremes], ranked[len(ranked) - extremes :]
    return {name: files[name] for name in hardest}, {name: files[name] for name in easiest}


def all_tokens(files: dict[str, TokenReport]) -> TokenReport:
    return TokenReport(*(np.concatenate(field) for field in zip(*files.values(), strict=True)))


def show_files(files: dict[str, TokenReport]) -> Table:
    table = Table(title="The hardest and the easiest held-out files")
    table.add_column("file", overflow="fold")
    for heading in ("tokens", "perplexity", "top-1", "top-5", "confidence"):
        table.add_column(heading, justify="right")
    for part in (*hardest_and_easiest(files), {f"all {len(files)} files": all_tokens(files)}):
        for name, report in part.items():
            table.add_row(
                name,
                f"{report.loss.size:,}",
                f"{np.exp(report.loss.mean()):,.1f}",
                f"{report.top(1):.1%}",
                f"{report.top(5):.1%}",
                f"{report.confidence.mean():.1%}",
            )
        table.add_section()
    return table


def draw_files(files: dict[str, TokenReport], path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    by_file, reliability = figure.subplots(1, 2)
    tokens = all_tokens(files)

    styles = (("hardest", ORANGE, "s"), ("easiest", BLUE, "o"))
    for part, (label, color, marker) in zip(hardest_and_easiest(files), styles, strict=True):
        losses = [report.loss.mean() for report in part.values()]
        by_file.plot(losses, list(part), marker, color=color, label=label)
        for name, loss in zip(part, losses, strict=True):
            accuracy = f"{part[name].top(1):.0%}, {part[name].top(5):.0%}"
            by_file.annotate(
                accuracy, (loss, name), (7, 0), textcoords="offset points", va="center"
            )
    by_file.axvline(tokens.loss.mean(), color="black", linestyle=":", label="all files")
    by_file.invert_yaxis()
    by_file.margins(x=0.25)  # room for the figures
    by_file.set(title="Held-out files: top-1, top-5 accuracy", xlabel="loss (nats per token)")

    # The same number of tokens in each bin, because the model is confident about few of them.
    bins = np.array_split(np.argsort(tokens.confidence), BINS)
    confidence = np.array([tokens.confidence[i].mean() for i in bins])
    share = np.array([(tokens.rank[i] == 0).mean() for i in bins])
    error = np.sqrt(share * (1 - share) / [len(i) for i in bins])
    reliability.errorbar(
        100 * confidence, 100 * share, 100 * error, color=BLUE, marker="o", capsize=3,
        label=f"the model, {np.abs(confidence - share).mean():.1%} away on average",
    )  # fmt: skip
    reliability.axline((0, 0), slope=1, color="black", linestyle=":", label="calibration")
    top = 110 * max(confidence.max(), share.max())
    reliability.set(
        title="Reliability (± standard error)", xlabel="confidence (%)",
        ylabel="tokens predicted right (%)", xlim=(0, top), ylim=(0, top),
    )  # fmt: skip
    for axis in (by_file, reliability):
        axis.legend()
        common.tidy(axis)
    figure.savefig(path)


def evaluate_language_model(config: language.Config, console: Console, path: Path) -> None:
    with console.status("Reading the standard library; the first run encodes it"):
        corpus = language.load_corpus(config)
    # A short text can be too short for a large vocabulary.
    config = dataclasses.replace(config, vocabulary=corpus.tokenizer.get_vocab_size())
    with console.status("Making the language model"):
        model = language.Transformer(config, nnx.Rngs(0))
    history = language.History([], {}, [])
    language.train(model, corpus, language.fused_loss, config, 0, console, history)
    with console.status("Compiling the report, and measuring the held-out files"):
        files = measure_files(model, corpus, config)
    console.print(show_files(files))
    draw_files(files, path)
    print(f"Drawn to {path}")


# --- both ----------------------------------------------------------------------------------------


def main() -> None:
    parser = common.make_parser(
        __doc__, "2 models and 3 epochs, not 8 and 100, and a much smaller language model"
    )
    args = parser.parse_args()
    of_digits = common.picture(parser, args, "evaluate", "quick")
    of_text = common.picture(parser, args, "evaluate_language_model", "quick")

    console = Console()
    digits, test = load(test_size=0.75)
    models, epochs = (2, 3) if args.quick else (8, 100)
    params = train(models, epochs, digits, console)
    with console.status("Compiling the report on the digits"):
        report = jax.device_get(evaluate(params, test))
    console.print(show(report))
    draw(report, jax.device_get(test), of_digits)
    print(f"Drawn to {of_digits}")

    evaluate_language_model(QUICK_TEXT if args.quick else TEXT, console, of_text)


if __name__ == "__main__":
    main()
