"""Evaluates an ensemble of digit readers, every model and every class in one call, with jax_sce.

    python examples/evaluate.py [--quick] [--out FOLDER]

Eight seeds of the network of `train_digits.py` are trained together under `jax.vmap`, on a quarter
of the digits only, so that there are mistakes to look at. One jitted call then gives the loss of
each class, the accuracy and the calibration of each model, and of the ensemble that averages their
probabilities: `jax.vmap` over models, and within it over classes.

Time: about 30 seconds on two CPU cores; `--quick` trains 2 models for 3 epochs, about 10 seconds.

Draws `evaluate.png`: loss by class, reliability diagram, and the digits that are hardest to read.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import track
from rich.table import Table
from train_digits import BLUE, ORANGE, Digits, Params, init, load, predict, train_epoch

from jax_sce import softmax_cross_entropy_with_integer_labels

CLASSES = 10
BINS = 10  # of confidence, equally wide
HARDEST = 10  # digits to show


class Report(NamedTuple):
    """What is measured of one model; with a leading axis, of several."""

    losses: Array  # [N]
    class_loss: Array  # [CLASSES], mean loss of the digits of each class
    prediction: Array  # [N]
    accuracy: Array  # []
    bin_count: Array  # [BINS], the digits read with that confidence
    bin_confidence: Array  # [BINS], sum of their confidences
    bin_correct: Array  # [BINS], how many of them were read right
    calibration_error: Array  # [], expected over the bins


def measure(logits: Array, labels: Array) -> Report:
    """Logits [N, V] and labels [N] of one model."""

    def class_loss(label: Array) -> Array:
        return softmax_cross_entropy_with_integer_labels(
            logits, labels, weights=labels == label, reduction="mean"
        )

    prediction = logits.argmax(-1)
    correct = prediction == labels
    # The loss of the prediction as if it were the label: minus the log of the largest probability.
    confidence = jnp.exp(-softmax_cross_entropy_with_integer_labels(logits, prediction))
    bins = jnp.minimum(confidence * BINS, BINS - 1).astype(jnp.int32)
    in_bin = jax.nn.one_hot(bins, BINS, axis=0)  # [BINS, N]
    bin_confidence, bin_correct = in_bin @ confidence, in_bin @ correct
    return Report(
        losses=softmax_cross_entropy_with_integer_labels(logits, labels),
        class_loss=jax.vmap(class_loss)(jnp.arange(CLASSES)),
        prediction=prediction,
        accuracy=correct.mean(),
        bin_count=in_bin.sum(1),
        bin_confidence=bin_confidence,
        bin_correct=bin_correct,
        calibration_error=jnp.abs(bin_confidence - bin_correct).sum() / labels.size,
    )


@jax.jit
def evaluate(params: Params, digits: Digits) -> Report:
    """Reports on M models with stacked parameters, and last on their ensemble: [M + 1, ...]."""
    logits = jax.vmap(predict, (0, None))(params, digits.images)
    # Log-probabilities are logits too; the mean's 1 / M is a constant, to which a softmax is blind.
    ensemble = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0, keepdims=True)
    return jax.vmap(measure, (0, None))(jnp.concatenate([logits, ensemble]), digits.labels)


def train(models: int, epochs: int, digits: Digits) -> Params:
    """Trains that many seeds side by side; their parameters come back stacked."""
    start, shuffle = jax.random.split(jax.random.key(0))
    states = jax.vmap(init)(jax.random.split(start, models))
    one_epoch = partial(train_epoch, softmax_cross_entropy_with_integer_labels)
    epoch = jax.jit(jax.vmap(one_epoch, in_axes=(0, 0, None)))
    for keys in track(jax.random.split(shuffle, (epochs, models)), f"training {models} models"):
        states, _ = epoch(states, keys, digits)
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
    figure = plt.figure(figsize=(10, 7), layout="constrained")
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
        used = model.bin_count >= 10  # of fewer digits, a share says nothing
        count, confidence, correct = (
            x[used] for x in (model.bin_count, model.bin_confidence, model.bin_correct)
        )
        share = correct / count
        reliability.errorbar(
            100 * confidence / count, 100 * share, 100 * np.sqrt(share * (1 - share) / count),
            color=color, marker=marker, capsize=3,
            label=f"{name}, {model.calibration_error:.1%} from it on average",
        )  # fmt: skip
    reliability.axline((50, 50), slope=1, color="black", linestyle=":", label="calibration")
    reliability.set(
        title="Reliability (± standard error)", xlabel="confidence (%)",
        ylabel="digits read right (%)", xlim=(30, 102), ylim=(30, 102),
    )  # fmt: skip
    for axis in (by_class, reliability):
        axis.legend()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)

    bottom.suptitle("Hardest for the ensemble: what it is, as what it was read, loss in nats")
    hardest = np.argsort(-ensemble.losses)[:HARDEST]
    for axis, i in zip(bottom.subplots(1, HARDEST), hardest, strict=True):
        axis.imshow(digits.images[i].reshape(8, 8), cmap="gray_r")
        axis.set_title(f"{digits.labels[i]} as {ensemble.prediction[i]}", fontsize=10)
        axis.set_xlabel(f"{ensemble.losses[i]:.1f}")
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 models, 3 epochs")
    output = Path(__file__).parent / "output"
    parser.add_argument("--out", type=Path, default=output, help="for pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    digits, test = load(test_size=0.75)
    models, epochs = (2, 3) if args.quick else (8, 100)
    params = train(models, epochs, digits)
    report = jax.device_get(evaluate(params, test))
    console = Console()
    console.print(show(report))
    draw(report, jax.device_get(test), args.out / "evaluate.png")
    console.print(f"Drawn to {args.out / 'evaluate.png'}")


if __name__ == "__main__":
    main()
