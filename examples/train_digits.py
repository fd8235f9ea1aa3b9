"""Learns to read handwritten digits, once with jax_sce and once with optax's loss.

    python examples/train_digits.py [--quick] [--out FOLDER]

A network with two hidden layers learns scikit-learn's 1,797 digits (8 x 8 pixels; they come with
scikit-learn, nothing is downloaded). It learns them twice from the same seed; only the function
that computes the loss differs. With jax_sce it must read at least 97 % of the unseen test digits,
or the script exits with an error.

Time: about 15 seconds on two CPU cores. `--quick` trains for 3 epochs, about 10 seconds, and
requires no accuracy.

Draws `train_digits.png`: training loss and test accuracy of both runs after each epoch.
"""

import common  # first, because of Ctrl-C

# isort: split
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, ORANGE
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jax_sce

LossFn = Callable[[Array, Array], Array]  # logits [N, V], labels [N] -> losses [N]
Params = list[tuple[Array, Array]]  # a weight matrix and a bias for each layer

LOSSES: dict[str, LossFn] = {
    "jax_sce": jax_sce.softmax_cross_entropy_with_integer_labels,
    "optax": optax.softmax_cross_entropy_with_integer_labels,
}
WIDTHS = (64, 128, 128, 10)  # pixels, two hidden layers, classes
BATCH_SIZE = 64
OPTIMIZER = optax.adam(1e-3)
REQUIRED_ACCURACY = 0.97


class Digits(NamedTuple):
    images: Array  # [N, 64], pixels in [0, 1]
    labels: Array  # [N], 0 to 9


class State(NamedTuple):
    params: Params
    optimizer: optax.OptState


class Curves(NamedTuple):
    loss: np.ndarray  # [epochs], mean training loss during the epoch
    accuracy: np.ndarray  # [epochs], on the test digits after the epoch


def load(test_size: float = 0.25) -> tuple[Digits, Digits]:
    """The digits for training and those for the test, with the same share of each class."""
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = map(
        jnp.asarray,
        train_test_split(
            np.float32(images / 16), labels, test_size=test_size, stratify=labels, random_state=0
        ),
    )
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


@jax.jit
def init(key: Array) -> State:
    he_normal = jax.nn.initializers.he_normal()
    shapes = list(pairwise(WIDTHS))
    keys = jax.random.split(key, len(shapes))
    params = [(he_normal(k, s), jnp.zeros(s[1])) for k, s in zip(keys, shapes, strict=True)]
    return State(params, OPTIMIZER.init(params))


def predict(params: Params, images: Array) -> Array:
    """Images [N, 64] to logits [N, 10]."""
    *hidden, (weight, bias) = params
    for w, b in hidden:
        images = jax.nn.relu(images @ w + b)
    return images @ weight + bias


@jax.jit
def accuracy(params: Params, digits: Digits) -> Array:
    return jnp.mean(predict(params, digits.images).argmax(-1) == digits.labels)


def train_epoch(loss_fn: LossFn, state: State, key: Array, digits: Digits) -> tuple[State, Array]:
    """One pass over the digits in a new random order; also returns the mean loss of its steps."""

    def step(state: State, rows: Array) -> tuple[State, Array]:
        def mean_loss(params: Params) -> Array:
            return loss_fn(predict(params, digits.images[rows]), digits.labels[rows]).mean()

        loss, grads = jax.value_and_grad(mean_loss)(state.params)
        updates, optimizer = OPTIMIZER.update(grads, state.optimizer)
        return State(optax.apply_updates(state.params, updates), optimizer), loss

    order = jax.random.permutation(key, len(digits.labels))
    batches = order[: len(order) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    state, losses = jax.lax.scan(step, state, batches)
    return state, losses.mean()


def train(
    name: str, epochs: int, digits: Digits, test: Digits, console: Console
) -> tuple[Params, Curves]:
    """Trains with the loss of that name; the seed is the same for every name."""
    start, shuffle = jax.random.split(jax.random.key(0))
    state, history = init(start), []
    epoch = jax.jit(train_epoch, static_argnums=0)
    with common.progress_bar(console) as progress:
        task = progress.add_task(f"{name}: compiling", total=epochs)
        for key in jax.random.split(shuffle, epochs):
            state, loss = epoch(LOSSES[name], state, key, digits)
            history.append((loss, accuracy(state.params, test)))
            progress.update(task, advance=1, description=f"{name}: loss {loss:.1e}")
    return state.params, Curves(*np.array(history).T)


def draw(curves: dict[str, Curves], path: Path) -> None:
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2)
    styles = {
        "optax": dict(color=ORANGE, linewidth=5, alpha=0.6),
        "jax_sce": dict(color=BLUE, linewidth=1.5),
    }
    for name, style in styles.items():  # the thin line over the thick one: both stay visible
        epochs = np.arange(1, len(curves[name].loss) + 1)
        axes[0].semilogy(epochs, curves[name].loss, label=name, **style)
        axes[1].plot(epochs, 100 * curves[name].accuracy, label=name, **style)
    axes[1].axhline(100 * REQUIRED_ACCURACY, color="black", linestyle=":", label="required")
    axes[0].set(title="Training loss", xlabel="epoch", ylabel="cross-entropy (nats, log scale)")
    axes[1].set(title="Test accuracy", xlabel="epoch", ylabel="test digits read right (%)")
    for axis in axes:
        axis.legend()
        common.tidy(axis)
    figure.savefig(path)


def main() -> None:
    parser = common.make_parser(__doc__, "train for 3 epochs, not 100; require no accuracy")
    args = parser.parse_args()
    path = common.picture(parser, args, "train_digits", "quick")

    console = Console()
    digits, test = load()
    epochs = 3 if args.quick else 100
    table = Table("loss function", "training loss", "test accuracy", "losses equal to 0")
    curves = {}
    for name, loss_fn in LOSSES.items():
        params, curves[name] = train(name, epochs, digits, test, console)
        zeros = jnp.mean(loss_fn(predict(params, digits.images), digits.labels) == 0)
        final_loss, final_accuracy = (curve[-1] for curve in curves[name])
        # No true loss is 0: optax's `L - z_y` rounds to 0 where the model is confident.
        table.add_row(name, f"{final_loss:.3e}", f"{final_accuracy:.2%}", f"{zeros:.1%} of digits")
    draw(curves, path)

    console.print(table)
    gaps = [np.abs(ours - other).max() for ours, other in zip(*curves.values(), strict=True)]
    console.print(
        f"Largest difference of the curves: {gaps[0]:.1e} in loss, {gaps[1]:.2%} in accuracy."
    )
    print(f"Curves drawn to {path}")
    reached = curves["jax_sce"].accuracy[-1]
    if not args.quick and reached < REQUIRED_ACCURACY:
        sys.exit(f"test accuracy {reached:.2%} is below {REQUIRED_ACCURACY:.0%}")


if __name__ == "__main__":
    main()
