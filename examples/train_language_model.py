"""Trains a small language model on the Python standard library, with jax_sce as its loss.

    pip install -e ".[examples]"
    python examples/train_language_model.py

A decoder-only transformer learns Python from a text that every machine with Python has: the source
of the standard library. A byte-level BPE, trained on it once and cached, cuts it into tokens. On two
free CPU cores the training takes two to three minutes, and the validation perplexity falls from
8192, the size of the vocabulary (the model knows nothing), to about 135.

The script shows its progress, draws `language_model.png` (perplexity of the training text and of
the held-out text by tokens seen), lets the model write a few lines of Python and prints the
figures. Ctrl-C keeps the curve so far. `--quick` does all of it, much smaller, in half a minute.

The loss is the fused head, `linear_softmax_cross_entropy`: it takes the hidden states and the
embedding, and the logits of the whole batch never exist. `--loss logits` and `--loss optax` compute
them, and call this library's loss and optax's on them; the curves should be the same. `--compare`
trains a few steps with each of the three losses, in turns, and compares their memory, the time of a
step and the curves, in a table and in `compare_losses.png`. Try it with `--vocab 32768`.
"""

from __future__ import annotations

import common  # first, because of Ctrl-C

# isort: split
import dataclasses
import hashlib
import math
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREEN, VERMILION
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jax_sce import linear_softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

# From hidden states [B, T, D], the embedding [V, D] and labels [B, T]: the mean loss.
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def fused_loss(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> jax.Array:
    return linear_softmax_cross_entropy(hidden, embedding.T, labels, reduction="mean")


def logits_loss(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> jax.Array:
    logits = hidden @ embedding.T
    return softmax_cross_entropy_with_integer_labels(logits, labels, reduction="mean")


def optax_loss(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> jax.Array:
    logits = hidden @ embedding.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


LOSSES: dict[str, Loss] = {"fused": fused_loss, "logits": logits_loss, "optax": optax_loss}
MIN_VOCABULARY, MAX_VOCABULARY = 257, 65536  # at least the bytes and the end of a file


@dataclasses.dataclass(frozen=True)
class Config:
    vocabulary: int = 8192
    files: int | None = None  # the number of files to read; None reads all
    width: int = 128
    depth: int = 3
    heads: int = 4
    context: int = 128
    batch: int = 8
    steps: int = 500
    learning_rate: float = 4e-3
    evaluations: int = 10
    validation_batches: int = 8


QUICK = Config(vocabulary=512, files=40, width=64, depth=2, steps=60, evaluations=4)


# --- the text ------------------------------------------------------------------------------------

END_OF_FILE = "<|endoffile|>"
# Tests are not library code, and not every Python has idlelib and lib2to3. The files of encodings
# and pydoc_data are tables that resemble each other: some would be held out and others trained on,
# and the validation would look too good.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
SKIPPED |= {"site-packages", "dist-packages", "__pycache__"}


class Corpus(NamedTuple):
    tokenizer: Tokenizer
    training: np.ndarray  # the tokens of all files, END_OF_FILE before each
    validation: np.ndarray  # those of the held-out files
    held_out: list[str]  # their names, in the same order


def load_corpus(config: Config) -> Corpus:
    """The tokens of the standard library. The first call trains the tokenizer and encodes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(library) for path in sorted(library.rglob("*.py"))]
    paths = [path for path in paths if not SKIPPED & set(path.parts)][: config.files]
    held_out = paths[::20]
    training = [path for i, path in enumerate(paths) if i % 20]

    # The name of the cache depends on all that the tokens depend on: a stale one is never read.
    files = [(path.as_posix(), (library / path).stat().st_size) for path in paths]
    key = repr((sys.version, config.vocabulary, files)).encode()
    root = common.cache_folder()
    cache = root / f"stdlib-{config.vocabulary}-{hashlib.sha256(key).hexdigest()[:16]}"

    if not cache.is_dir():
        common.check_cache()
        texts = {
            name: [(library / path).read_text("utf-8", errors="replace") for path in part]
            for name, part in [("training", training), ("validation", held_out)]
        }
        # Built elsewhere and renamed when complete: an interrupted run leaves no incomplete cache.
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            unfinished = Path(temporary) / "corpus"
            unfinished.mkdir()
            build_corpus(texts, config.vocabulary, unfinished)
            try:
                unfinished.rename(cache)
            except OSError:
                if not cache.is_dir():  # another run may have built the same meanwhile
                    raise

    tokenizer = Tokenizer.from_file(str(cache / "tokenizer.json"))
    return Corpus(
        tokenizer,
        np.load(cache / "training.npy"),
        np.load(cache / "validation.npy"),
        [path.as_posix() for path in held_out],
    )


def build_corpus(texts: dict[str, list[str]], vocabulary: int, folder: Path) -> None:
    """Trains the tokenizer on the training texts, and encodes the texts of both parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts["training"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))

    for name, part in texts.items():
        encoded = tokenizer.encode_batch([END_OF_FILE + text for text in part])
        np.save(
            folder / f"{name}.npy", np.concatenate([np.array(e.ids, np.int32) for e in encoded])
        )


# --- the model -----------------------------------------------------------------------------------
# B sequences of T tokens, D features, V tokens in the vocabulary.


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: rotates pairs of features [B, T, heads, :] by angles that grow with T."""
    time, features = x.shape[1], x.shape[3]
    frequency = 1e4 ** -jnp.linspace(0, 1, features // 2, endpoint=False)
    angle = (jnp.arange(time)[:, None] * frequency)[:, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.width
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        # Branches that start at zero make each block the identity, so that any depth trains.
        last = partial(linear, kernel_init=nnx.initializers.zeros)
        self.heads = config.heads
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.query_key_value = linear(width, 3 * width)
        self.attention_out = last(width, width)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp_in = linear(width, 4 * width)
        self.mlp_out = last(4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
        qkv = self.query_key_value(self.attention_norm(x))
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.attention_out(mixed.reshape(x.shape))
        return x + self.mlp_out(jax.nn.relu(self.mlp_in(self.mlp_norm(x))) ** 2)


class Transformer(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        # A small embedding makes small logits: the first loss is log(V).
        small = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(config.vocabulary, config.width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.Sequential(*[Block(config, rngs) for _ in range(config.depth)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)

    def hidden(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
        return self.norm(self.blocks(self.embedding(tokens)))

    def logits(self, hidden: jax.Array) -> jax.Array:  # [..., D] -> [..., V]
        return self.embedding.attend(hidden)


# --- training ------------------------------------------------------------------------------------


def make_optimizer(model: Transformer, config: Config) -> nnx.Optimizer:
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.steps // 10,
        decay_steps=config.steps,
        end_value=config.learning_rate / 100,
    )
    adamw = optax.adamw(rate, b2=0.98, weight_decay=0.01)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.Param)


def mean_loss(model: Transformer, windows: jax.Array, loss: Loss) -> jax.Array:
    """The mean loss of windows [B, T + 1]. All tokens but the first are labels."""
    return loss(model.hidden(windows[:, :-1]), model.embedding.embedding[...], windows[:, 1:])


@partial(nnx.jit, static_argnames="loss", donate_argnames=("model", "optimizer"))
def train_step(
    model: Transformer, optimizer: nnx.Optimizer, windows: jax.Array, loss: Loss
) -> jax.Array:
    """One update of the model from windows [B, T + 1]; returns the loss before it."""
    value, gradient = nnx.value_and_grad(mean_loss)(model, windows, loss)
    optimizer.update(model, gradient)
    return value


@partial(nnx.jit, static_argnames="loss")
def evaluate(model: Transformer, windows: jax.Array, loss: Loss) -> jax.Array:
    """The mean loss over windows [batches, B, T + 1], one batch at a time to save memory."""
    return jax.lax.map(lambda batch: mean_loss(model, batch, loss), windows).mean()


def windows_at(tokens: np.ndarray, starts: np.ndarray, config: Config) -> np.ndarray:
    """The windows of T + 1 tokens at these starts: [starts..., T + 1]."""
    return tokens[starts[..., None] + np.arange(config.context + 1)]


def random_starts(tokens: np.ndarray, draws: np.random.Generator, config: Config) -> np.ndarray:
    return draws.integers(len(tokens) - config.context, size=config.batch)


def random_windows(tokens: np.ndarray, draws: np.random.Generator, config: Config) -> np.ndarray:
    return windows_at(tokens, random_starts(tokens, draws, config), config)


def held_out_starts(tokens: np.ndarray, config: Config) -> np.ndarray:
    """The starts of the windows for validation, evenly over the held-out files: [batches, B]."""
    last = len(tokens) - config.context - 1
    starts = np.linspace(0, last, config.validation_batches * config.batch, dtype=np.int64)
    return starts.reshape(-1, config.batch)


class History(NamedTuple):
    training: list[float]  # the loss of every batch, before its update
    validation: dict[int, float]  # the held-out loss by the number of steps before it
    seconds: list[float]  # the time of every step


def train(
    model: Transformer,
    corpus: Corpus,
    loss: Loss,
    config: Config,
    seed: int,
    console: Console,
    history: History,
) -> None:
    """Trains the model and fills the history, which the caller has even after Ctrl-C."""
    starts = held_out_starts(corpus.validation, config)
    held_out = windows_at(corpus.validation, starts, config)
    draws = np.random.default_rng(seed)
    with common.progress_bar(console) as progress:
        task = progress.add_task("compiling the validation", total=config.steps)
        optimizer = make_optimizer(model, config)
        history.validation[0] = float(evaluate(model, held_out, loss))
        progress.update(task, description="compiling the training step")
        for step in range(1, config.steps + 1):
            batch = random_windows(corpus.training, draws, config)
            start = time.perf_counter()
            # float() waits for the end of the step, as the clock needs it.
            history.training.append(float(train_step(model, optimizer, batch, loss)))
            history.seconds.append(time.perf_counter() - start)
            if is_evaluated(step, config):
                history.validation[step] = float(evaluate(model, held_out, loss))
            progress.update(task, advance=1, description=describe(history, config))


def is_evaluated(step: int, config: Config) -> bool:
    return step % math.ceil(config.steps / config.evaluations) == 0 or step == config.steps


def describe(history: History, config: Config) -> str:
    recent = statistics.fmean(history.training[-20:])
    return (
        f"loss {recent:.3f} (validation {list(history.validation.values())[-1]:.3f})\n"
        f"perplexity {math.exp(recent):,.0f}, {tokens_per_second(history, config):,.0f} tokens/s"
    )


def tokens_per_second(history: History, config: Config) -> float:
    # The median ignores the first step, which compiles, and the slow steps of a busy machine.
    return config.batch * config.context / statistics.median(history.seconds)


# --- the losses compared -------------------------------------------------------------------------


class Measured(NamedTuple):
    mebibytes: float  # temporary memory of the loss and its gradient
    losses: list[float]  # of every step, before its update
    seconds: list[float]  # of every step


def compare(corpus: Corpus, config: Config, seed: int, console: Console) -> dict[str, Measured]:
    """Trains the same model on the same text with each loss."""
    measured: dict[str, Measured] = {}
    draws = np.random.default_rng(seed)
    with common.progress_bar(console) as progress:
        task = progress.add_task("making three models", total=config.steps)
        models = {name: Transformer(config, nnx.Rngs(seed)) for name in LOSSES}
        optimizers = {name: make_optimizer(model, config) for name, model in models.items()}
        for name, loss in LOSSES.items():
            progress.update(task, description=f"compiling {name}, to read its memory")
            measured[name] = Measured(mebibytes(loss, config), [], [])
        for step in range(config.steps):
            batch = random_windows(corpus.training, draws, config)
            # In turns, so that other work on the machine slows down all of them alike.
            for name, loss in LOSSES.items():
                doing = "training with" if step else "compiling the step with"
                progress.update(task, description=f"{doing} {name}")
                start = time.perf_counter()
                value = float(train_step(models[name], optimizers[name], batch, loss))
                measured[name].seconds.append(time.perf_counter() - start)
                measured[name].losses.append(value)
            progress.advance(task)
    return measured


def mebibytes(loss: Loss, config: Config) -> float:
    """The temporary memory of the compiled loss and its gradients, at the shapes of training."""
    hidden = jax.ShapeDtypeStruct((config.batch, config.context, config.width), jnp.float32)
    embedding = jax.ShapeDtypeStruct((config.vocabulary, config.width), jnp.float32)
    labels = jax.ShapeDtypeStruct((config.batch, config.context), jnp.int32)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(hidden, embedding, labels).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def median_milliseconds(measured: Measured) -> float:
    return 1000 * statistics.median(measured.seconds[1:])  # the first step compiles


def disagreement(measured: dict[str, Measured]) -> float:
    """The largest relative difference between two losses of the same step."""
    losses = np.array([m.losses for m in measured.values()])
    return float(np.max(np.ptp(losses, axis=0) / losses.min(axis=0)))


def show_comparison(measured: dict[str, Measured]) -> Table:
    table = Table("loss", title="Three losses, the same training", caption_justify="left")
    for heading in ("memory", "median step", "optax's is 1", "first loss", "last loss"):
        table.add_column(heading, justify="right")
    optax_time = median_milliseconds(measured["optax"])
    for name, m in measured.items():
        table.add_row(
            name,
            f"{m.mebibytes:,.1f} MiB",
            f"{median_milliseconds(m):,.1f} ms",
            f"{median_milliseconds(m) / optax_time:.2f}",
            f"{m.losses[0]:.6f}",
            f"{m.losses[-1]:.6f}",
        )
    table.caption = (
        "memory: temporary memory of the loss and its gradients\n"
        f"Largest relative difference of the losses: {disagreement(measured):.1e}"
    )
    return table


def draw_comparison(path: Path, measured: dict[str, Measured], config: Config) -> None:
    figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
    memory, step_time, curves = figure.subplots(1, 3, width_ratios=[1, 1, 1.5])
    colors = dict(zip(measured, (BLUE, VERMILION, GREEN), strict=True))

    for axes, format, values in [
        (memory, "{:,.1f}", [m.mebibytes for m in measured.values()]),
        (step_time, "{:,.0f}", [median_milliseconds(m) for m in measured.values()]),
    ]:
        bars = axes.bar(list(measured), values, color=colors.values())
        axes.bar_label(bars, fmt=format, padding=2)
        axes.margins(y=0.12)
        common.tidy(axes)
    memory.set(title="Loss and gradient", ylabel="temporary memory (MiB)")
    step_time.set(title="Training step", ylabel="median time (ms)")

    # The curves should coincide: each line is narrower than the one below it, so that all are seen.
    for (name, m), width in zip(measured.items(), (7, 4, 1.5), strict=True):
        curves.plot(range(1, config.steps + 1), m.losses, color=colors[name], lw=width, label=name)
    curves.set(
        title=f"The same curve, to within {disagreement(measured):.0e}",
        xlabel="step", ylabel="training loss (nats per token)",
    )  # fmt: skip
    curves.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    common.tidy(curves)
    curves.legend()

    tokens = config.batch * config.context
    figure.suptitle(f"{tokens:,} tokens, {config.width} features, {config.vocabulary:,} classes")
    figure.savefig(path)


# --- the report ----------------------------------------------------------------------------------


@nnx.jit
def next_token(
    model: Transformer, window: jax.Array, length: int, temperature: float, key: jax.Array
) -> jax.Array:
    """Draws the token after the first `length` of window [T]; the causal model ignores the rest."""
    logits = model.logits(model.hidden(window[None])[0, length - 1])
    return jax.random.categorical(key, logits / temperature)


def write(model: Transformer, tokenizer: Tokenizer, prompt: str, config: Config, seed: int) -> str:
    """Lets the model continue the prompt, until it ends the file or its context is full."""
    tokens = tokenizer.encode(END_OF_FILE + prompt).ids
    window = np.zeros(config.context, np.int32)
    for length in range(len(tokens), config.context):
        window[: len(tokens)] = tokens
        key = jax.random.fold_in(jax.random.key(seed), length)
        token = int(next_token(model, window, length, 0.7, key))
        if token == tokenizer.token_to_id(END_OF_FILE):
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


def draw(path: Path, history: History, config: Config, title: str) -> None:
    """Draws the perplexity of the training text and of the held-out text by tokens seen."""
    tokens_per_step = config.batch * config.context / 1000
    steps, validation = zip(*history.validation.items(), strict=True)

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    uniform = f"uniform guess: {config.vocabulary:,}"
    axes.axhline(config.vocabulary, color="0.4", linestyle="--", label=uniform)
    x = tokens_per_step * np.arange(len(history.training))
    axes.plot(x, np.exp(history.training), color=BLUE, lw=0.8, label="training, each batch")
    x = tokens_per_step * np.array(steps)
    axes.plot(x, np.exp(validation), color=VERMILION, marker="o", label="validation, other files")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training tokens seen (thousands)")
    axes.set_ylabel("perplexity per token")
    axes.set_title(title)
    common.tidy(axes)
    axes.legend()
    figure.savefig(path)


def stopped(path: Path, history: History, config: Config, title: str, advice: str = "") -> NoReturn:
    """Draws the curve so far, and ends a run that Ctrl-C interrupted."""
    steps = len(history.training)
    if not steps:
        raise KeyboardInterrupt(f"Stopped before the first step.{advice}") from None
    path = common.of_stopped(path)
    draw(path, history, config, title)
    kept = f"Stopped after {steps} of {config.steps} steps.{advice} The curve so far: {path}"
    raise KeyboardInterrupt(kept) from None


def figures(history: History, config: Config, seconds: float) -> dict[str, str]:
    first, *_, last = history.validation.values()
    final = statistics.fmean(history.training[-20:])
    return {
        "steps": f"{config.steps:,}",
        "tokens": f"{config.steps * config.batch * config.context:,}",
        "seconds": f"{seconds:.1f}",
        "tokens per second": f"{tokens_per_second(history, config):,.0f} (median step)",
        "training loss": f"{history.training[0]:.3f} -> {final:.3f}",
        "validation loss": f"{first:.3f} -> {last:.3f}",
        "validation perplexity": f"{math.exp(first):,.0f} -> {math.exp(last):,.1f}",
        "perplexity fell by": f"a factor of {math.exp(first - last):,.1f}",
    }


def show_figures(named: dict[str, str]) -> None:
    for name, figure in named.items():
        print(f"{name:>22}  {figure}")


def main() -> None:
    parser = common.make_parser(__doc__, "a much smaller model and text, for half a minute")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--loss", choices=LOSSES, default="fused",
        help="the loss to train with: the fused head, or this library's or optax's loss on logits "
        "(default: fused)",
    )  # fmt: skip
    either.add_argument(
        "--compare", action="store_true",
        help="train 20 steps with each loss (10 with --quick), and compare them",
    )  # fmt: skip
    parser.add_argument(
        "--vocab", type=common.whole_number(MIN_VOCABULARY, MAX_VOCABULARY), metavar="TOKENS",
        help=f"size of the vocabulary, from {MIN_VOCABULARY} to {MAX_VOCABULARY} "
        f"(default: {Config.vocabulary}, or {QUICK.vocabulary} with --quick)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=common.whole_number(1),
        help=f"steps of the training (default: {Config.steps}, or {QUICK.steps} with --quick)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=common.seed, default=0, help="seed of the model and the batches (default: 0)"
    )
    args = parser.parse_args()
    if args.compare and args.steps == 1:
        parser.error("--compare needs --steps of at least 2, got 1: the first step compiles")

    config = QUICK if args.quick else Config()
    if args.compare:
        config = dataclasses.replace(config, steps=10 if args.quick else 20)
    config = dataclasses.replace(
        config,
        vocabulary=args.vocab or config.vocabulary,
        steps=args.steps or config.steps,
    )
    name = "compare_losses" if args.compare else "language_model"
    path = common.picture(parser, args, name, "quick", "loss", "vocab", "steps", "seed")
    console = Console()
    began = time.perf_counter()

    with console.status("Reading the standard library; the first run encodes it"):
        corpus = load_corpus(config)
    # A short text can be too short for a large vocabulary.
    config = dataclasses.replace(config, vocabulary=corpus.tokenizer.get_vocab_size())
    console.print(
        f"{len(corpus.training):,} tokens to train on, {len(corpus.validation):,} held out, "
        f"vocabulary {config.vocabulary:,}"
    )

    if args.compare:
        measured = compare(corpus, config, args.seed, console)
        console.print(show_comparison(measured))
        draw_comparison(path, measured, config)
        print(f"Drawn to {path}")
        if disagreement(measured) > 1e-3:
            raise SystemExit("The losses disagree.")
        return

    with console.status("Making the model"):
        model = Transformer(config, nnx.Rngs(args.seed))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    title = f"A transformer learns Python (loss: {args.loss})"
    history = History([], {}, [])
    try:
        train(model, corpus, LOSSES[args.loss], config, args.seed, console, history)
    except KeyboardInterrupt:
        stopped(path, history, config, title)

    draw(path, history, config, title)
    with console.status("The model writes"):
        prompt = "class Reader:\n    def read(self"
        text = write(model, corpus.tokenizer, prompt, config, args.seed)
    console.print(Panel(Syntax(text, "python", word_wrap=True), title="The model writes"))

    show_figures({
        "parameters": f"{parameters:,}",
        **figures(history, config, time.perf_counter() - began),
        "curves": str(path),
    })  # fmt: skip


if __name__ == "__main__":
    main()
