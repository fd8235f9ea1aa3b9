"""Derives the gradient of softmax cross-entropy by hand, and lets JAX check every line.

    python examples/derivation.py [--quick] [--out FOLDER]

The page is printed: each equation with its value for one small example, after chex has asserted in
float64 that automatic differentiation gives the same. Then the page shows where the textbook's
formulas lose their digits in float32, what jax_sce computes instead, and that its public functions
agree with automatic differentiation of the naive formula.

Time: about 15 seconds on two CPU cores; `--quick` draws the picture from fewer points.

Draws `accuracy.png`: the relative errors in float32 of the loss and of its gradient, from
predictions that are unsure to predictions that are certain.
"""

import common  # first, because of Ctrl-C

# isort: split
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREEN, VERMILION
from jax import Array
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from jax_sce import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

jax.config.update("jax_enable_x64", True)  # so that the mathematics is checked to 14 digits

FLOAT32_EPS = 2.0**-23

console = Console(highlight=False)


# -- the formulas under study ----------------------------------------------------------------------


def softmax(z: Array) -> Array:
    return jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True)


def log_normalizer(z: Array) -> Array:
    return jax.nn.logsumexp(z, axis=-1)


def cross_entropy(o: Array, y: Array) -> Array:
    return -(y * jnp.log(o)).sum(-1)


def statistics(z: Array) -> tuple[Array, Array]:
    """The maximum m of one row, and the tail: the sum of exp(z - m) over the other classes."""
    first = jnp.arange(z.size) == z.argmax()  # leaves out only one of several equal maxima
    m = z.max()
    return m, jnp.where(first, 0, jnp.exp(z - m)).sum()


# -- the page --------------------------------------------------------------------------------------

Z = jnp.array([1.0, -0.5, 2.0, 0.3])  # the logits of one example with four classes
Y = jnp.array([0.1, 0.2, 0.7, 0.0])  # its targets, a distribution
UNNORMALIZED = jnp.array([0.3, 0.0, 1.1, 0.2])  # targets that sum to 1.6


def heading(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def say(text: str) -> None:
    console.print()
    console.print(text)


def equation(
    text: str, value: Array, expected: Array | None = None, source: str = "autodiff"
) -> None:
    """Prints an equation with its value, and checks that this is the expected one."""
    numbers = np.array2string(
        np.asarray(value), formatter={"float": _digits}, threshold=50, edgeitems=1
    )
    checked = ""
    if expected is not None:
        chex.assert_trees_all_close(value, expected, rtol=1e-12, atol=1e-13)
        difference = np.nanmax(np.abs(value - expected))
        checked = f"   [green]✓ within {difference:.0g} of {source}[/]"
    console.print(Padding(f"[bold cyan]{text}[/]", (1, 0, 0, 4)))
    console.print(Padding(numbers + checked, (0, 0, 0, 8)))


def _digits(x: float) -> str:  # NaN stands for an entry that the equation is not about
    return "    ·   " if math.isnan(x) else f"{x:z8.5f}"


def the_softmax() -> None:
    heading("1. The softmax's Jacobian")
    o = softmax(Z)
    say("Four logits, and their softmax:")
    equation("z", Z)
    equation("oⱼ = exp(zⱼ) / S,   S = Σₖ exp(zₖ)", o)

    say("Quotient rule: S always moves with zᵢ, by exp(zᵢ); the numerator exp(zⱼ) only if i = j.")
    jacobian = jax.jacobian(softmax)(Z)
    same = jnp.eye(Z.size, dtype=bool)
    equation(
        "i ≠ j:   ∂oⱼ/∂zᵢ = (0·S - exp(zⱼ) exp(zᵢ)) / S² = -oⱼ oᵢ",
        jnp.where(same, jnp.nan, -jnp.outer(o, o)),
        jnp.where(same, jnp.nan, jacobian),
    )
    equation(
        "i = j:   ∂oⱼ/∂zⱼ = (exp(zⱼ) S - exp(zⱼ)²) / S² = oⱼ - oⱼ²",
        o - o**2,
        jacobian.diagonal(),
    )


def the_loss() -> None:
    heading("2. The loss, and the chain rule class by class")
    o = softmax(Z)
    say("A distribution of targets, and the loss with its partial derivatives:")
    equation("y", Y)
    equation("E = -Σⱼ yⱼ log oⱼ", cross_entropy(o, Y))
    by_o, by_y = jax.grad(cross_entropy, (0, 1))(o, Y)
    equation("∂E/∂oⱼ = -yⱼ / oⱼ", -Y / o, by_o)
    equation("∂E/∂yⱼ = -log oⱼ", -jnp.log(o), by_y)

    say("Every class's output depends on zᵢ, so ∂E/∂zᵢ = Σⱼ ∂E/∂oⱼ ∂oⱼ/∂zᵢ. By the two cases:")
    contributions = by_o[:, None] * jax.jacobian(softmax)(Z)  # [j, i]
    own = contributions.diagonal()
    equation(
        "from the other classes, j ≠ i:   Σ (-yⱼ/oⱼ)(-oⱼ oᵢ) = oᵢ Σ yⱼ",
        o * (Y.sum() - Y),
        contributions.sum(0) - own,
    )
    equation("from the class itself, j = i:   (-yᵢ/oᵢ)(oᵢ - oᵢ²) = oᵢ yᵢ - yᵢ", o * Y - Y, own)

    say("The denominators oⱼ have cancelled. Both cases together, with Σⱼ yⱼ = 1:")
    gradient = jax.grad(lambda z: cross_entropy(softmax(z), Y))(Z)
    equation("∂E/∂zᵢ = oᵢ Σⱼ yⱼ - yᵢ = oᵢ - yᵢ", o - Y, gradient)

    say("If a single class t is right (here t = 2), these are the two well-known cases:")
    t = 2
    gradient = jax.grad(lambda z: -jnp.log(softmax(z)[t]))(Z)
    right = jnp.arange(Z.size) == t
    equation(
        "wrong class, i ≠ t:   ∂E/∂zᵢ = (-1/oₜ)(-oₜ oᵢ) = oᵢ",
        jnp.where(right, jnp.nan, o),
        jnp.where(right, jnp.nan, gradient),
    )
    equation("right class, i = t:   ∂E/∂zₜ = (-1/oₜ)(oₜ - oₜ²) = oₜ - 1", o[t] - 1, gradient[t])


def unnormalized_targets() -> None:
    heading("3. Targets that do not sum to one")
    y, o = UNNORMALIZED, softmax(Z)
    say("Weights, soft labels and mixtures give such targets. The sum has to stay in the formula:")
    gradient = jax.grad(lambda z: cross_entropy(softmax(z), y))(Z)
    equation(f"y,   Σⱼ yⱼ = {y.sum():.1f}", y)
    equation("∂E/∂zᵢ = oᵢ Σⱼ yⱼ - yᵢ", o * y.sum() - y, gradient)

    say(
        "o - y cannot be right. A constant added to all logits does not change the loss, so the "
        "gradient must sum to 0, and o - y sums to 1 - Σⱼ yⱼ."
    )
    equation("Σᵢ (oᵢ Σⱼ yⱼ - yᵢ) = 0", (o * y.sum() - y).sum(), gradient.sum())
    equation("o - y, off by oᵢ (Σⱼ yⱼ - 1)", o - y, gradient - o * (y.sum() - 1))


def the_log_normalizer() -> None:
    heading("4. The log-normalizer, and the cotangent of a row")
    y, o = UNNORMALIZED, softmax(Z)
    equation("L = log Σₖ exp(zₖ)", log_normalizer(Z))
    equation("∂L/∂zᵢ = exp(zᵢ) / S = oᵢ", o, jax.grad(log_normalizer)(Z))

    say("With log oⱼ = zⱼ - L the loss is E = L Σⱼ yⱼ - Σⱼ yⱼ zⱼ. Section 2 becomes one line:")
    equation(
        "∂E/∂zᵢ = ∂L/∂zᵢ Σⱼ yⱼ - yᵢ = oᵢ Σⱼ yⱼ - yᵢ",
        o * y.sum() - y,
        jax.grad(lambda z: log_normalizer(z) * y.sum() - y @ z)(Z),
    )

    say("A row that returns both E and L receives two cotangents, g_E and g_L. Together:")
    g_E, g_L = jnp.array(0.7), jnp.array(-1.3)
    _, pull_back = jax.vjp(lambda z: (cross_entropy(softmax(z), y), log_normalizer(z)), Z)
    equation(
        "z̄ = (g_E Σⱼ yⱼ + g_L) o - g_E y       (g_E = 0.7, g_L = -1.3)",
        (g_E * y.sum() + g_L) * o - g_E * y,
        pull_back((g_E, g_L))[0],
    )

    say("Other losses need no other rule. The z-loss E + λL² only sends g_L = 2λL into this one:")
    equation(
        "∂(E + λL²)/∂z = (Σⱼ yⱼ + 2λL) o - y      (λ = 0.01)",
        (y.sum() + 0.02 * log_normalizer(Z)) * o - y,
        jax.grad(lambda z: cross_entropy(softmax(z), y) + 0.01 * log_normalizer(z) ** 2)(Z),
    )


def without_cancellation() -> None:
    heading("5. The same, without subtracting nearly equal numbers")
    y, o = UNNORMALIZED, softmax(Z)
    say(
        "A confident row has oₜ ≈ 1 and L ≈ zₜ: both oₜ - 1 and L - zₜ are small differences of "
        "rounded numbers. So let m be the largest logit, and sum the terms of the other classes "
        "without the 1 of the largest:"
    )
    m, tail = statistics(Z)
    top = Z.argmax()
    equation("m = maxⱼ zⱼ", m)
    equation("tail = Σⱼ exp(zⱼ - m) over the others = S exp(-m) - 1", tail)
    equation("L = m + log1p(tail)", m + jnp.log1p(tail), log_normalizer(Z), "the definition")
    equation("oⱼ = exp(zⱼ - m) / (1 + tail)", jnp.exp(Z - m) / (1 + tail), o, "the definition")
    equation(
        "E = Σⱼ yⱼ (m - zⱼ) + Σⱼ yⱼ log1p(tail)",
        y @ (m - Z) + y.sum() * jnp.log1p(tail),
        cross_entropy(o, y),
        "the definition",
    )
    equation(
        "at the maximum:   ∂E/∂zⱼ = ((Σₖ yₖ - yⱼ) - yⱼ tail) / (1 + tail)",
        ((y.sum() - y[top]) - y[top] * tail) / (1 + tail),
        jax.grad(lambda z: cross_entropy(softmax(z), y))(Z)[top],
    )

    say("For a single right class t, at g = zₜ - m ≤ 0, only terms of one sign are added:")
    t = 0
    g = Z[t] - m
    loss, gradient = jax.value_and_grad(lambda z: -jnp.log(softmax(z)[t]))(Z)
    equation("E = -g + log1p(tail)", -g + jnp.log1p(tail), loss, "the definition")
    equation(
        "∂E/∂zₜ = oₜ - 1 = -(tail - expm1(g)) / (1 + tail)",
        -(tail - jnp.expm1(g)) / (1 + tail),
        gradient[t],
    )

    say("Two sets of classes, in two chunks or on two devices, merge at the larger maximum:")
    (m_a, tail_a), (m_b, tail_b) = statistics(Z[:2]), statistics(Z[2:])
    equation(
        "m_b ≥ m_a:   tail = tail_b + (1 + tail_a) exp(m_a - m_b)",
        tail_b + (1 + tail_a) * jnp.exp(m_a - m_b),
        tail,
        "the tail above",
    )


# -- float32 ---------------------------------------------------------------------------------------


def true_values(z: Sequence[float]) -> tuple[float, float]:
    """The loss for label 0, and its derivative by z_0, by Python's own float64."""
    others = math.fsum(math.exp(float(x) - float(z[0])) for x in z[1:])
    return math.log1p(others), -others / (1 + others)


@jax.jit
def naive_loss(z: Array) -> Array:
    return log_normalizer(z) - z[..., 0]


@jax.jit
def our_loss(z: Array) -> Array:
    return softmax_cross_entropy_with_integer_labels(z, jnp.zeros(z.shape[:-1], int))


@jax.jit
def naive_label_gradient(z: Array) -> Array:
    return jax.nn.softmax(z)[..., 0] - 1


@jax.jit
def our_label_gradient(z: Array) -> Array:
    return jax.grad(lambda z: our_loss(z).sum())(z)[..., 0]


def in_float32() -> None:
    heading("6. In float32")
    table = Table(
        "logits", "", "true value", "textbook", "error", "jax_sce", "error", box=SIMPLE_HEAD
    )  # fmt: skip
    for name, logits in {
        "10, 0": (10, 0),
        "17, 0": (17, 0),
        "1e6+(2, -1)": (1e6 + 2, 1e6 - 1),
        "1e8*(1, 1)": (1e8, 1e8),
    }.items():
        z = jnp.array(logits, jnp.float32)
        loss, gradient = true_values(logits)
        for quantity, true, naive, ours in (
            ("E", loss, naive_loss(z), our_loss(z)),
            ("∂E/∂z₀", gradient, naive_label_gradient(z), our_label_gradient(z)),
        ):
            chex.assert_type(ours, jnp.float32)
            chex.assert_trees_all_close(ours, np.float32(true), rtol=8 * FLOAT32_EPS)
            naive_error, our_error = (f"{abs(float(x) / true - 1):.0e}" for x in (naive, ours))
            table.add_row(
                name if quantity == "E" else "", quantity, f"{true:.3e}",
                f"{naive:.3e}", naive_error, f"{ours:.3e}", our_error,
            )  # fmt: skip
    say(
        "Two classes, the first is right. The textbook's loss is L - zₜ, and its gradient oₜ - 1. "
        "The errors are relative: at 1 no digit is right."
    )
    console.print(table)


def the_library() -> None:
    heading("7. The library against automatic differentiation of the naive formula")
    rng = np.random.default_rng(0)
    z, y = rng.normal(0, 3, (64, 50)), rng.uniform(0, 1, (64, 50))
    labels = rng.integers(0, 50, 64)
    g = rng.normal(0, 1, 64)  # a cotangent of its own for each example

    def naive(z: Array, y: Array) -> Array:
        return g @ (cross_entropy(softmax(z), y) + 0.01 * log_normalizer(z) ** 2)

    def ours(z: Array, y: Array) -> Array:
        return g @ softmax_cross_entropy(z, y, z_loss=0.01)

    def ours_by_label(z: Array) -> Array:
        return g @ softmax_cross_entropy_with_integer_labels(z, labels, z_loss=0.01)

    say("64 examples of 50 classes, targets that sum to about 25, z-loss, cotangents of any sign:")
    z_bar, y_bar = jax.jit(jax.grad(ours, (0, 1)))(z, y)
    naive_gradient = jax.jit(jax.grad(naive, (0, 1)))
    naive_z_bar, naive_y_bar = naive_gradient(z, y)
    equation("softmax_cross_entropy:   z̄", z_bar, naive_z_bar)
    equation("softmax_cross_entropy:   ȳ", y_bar, naive_y_bar)
    z_bar = jax.jit(jax.grad(ours_by_label))(z)
    naive_z_bar, _ = naive_gradient(z, np.eye(50)[labels])
    equation("softmax_cross_entropy_with_integer_labels:   z̄", z_bar, naive_z_bar)


# -- the picture -----------------------------------------------------------------------------------

CLASSES, ROWS = 1000, 100  # of the rows, the picture shows the largest error


def naive(z: Array) -> Array:
    return -jnp.log(jax.nn.softmax(z)[..., 0])


def optax_loss(z: Array) -> Array:
    labels = jnp.zeros(z.shape[:-1], int)
    return optax.softmax_cross_entropy_with_integer_labels(z, labels)


CURVES: dict[str, tuple[Callable[[Array], Array], str, str]] = {
    "-log(softmax(z))": (naive, GREEN, "-"),
    "optax": (optax_loss, VERMILION, "--"),
    "jax_sce": (our_loss, BLUE, "-"),
}


def rows_of(doubt: np.ndarray) -> np.ndarray:
    """Logits in float32 [points, ROWS, CLASSES] that give class 0 the probability 1 - doubt, or
    about that: with exactly one doubt for all rows of a point, all would round alike."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1, (doubt.size, ROWS, CLASSES))
    doubts = doubt[:, None] * rng.uniform(0.8, 1, (doubt.size, ROWS))
    z[..., 0] = np.log(np.exp(z[..., 1:]).sum(-1)) + np.log((1 - doubts) / doubts)
    return z.astype(np.float32)


@partial(jax.jit, static_argnums=0)
def loss_and_gradient(f: Callable[[Array], Array], z: Array) -> tuple[Array, Array]:
    """The losses of label 0, and their derivatives by its logit."""
    return f(z), jax.grad(lambda z: f(z).sum())(z)[..., 0]


def draw(points: int, path: Path) -> None:
    doubt = np.logspace(np.log10(0.5), -12, points)
    z = rows_of(doubt)
    exact = z.astype(np.float64)
    others = np.exp(exact[..., 1:] - exact[..., :1]).sum(-1)
    truth = np.log1p(others), -others / (1 + others)

    figure = Figure(figsize=(7, 3.7), dpi=200, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, (f, color, style) in CURVES.items():
        for axes, got, true in zip(panels, loss_and_gradient(f, z), truth, strict=True):
            error = np.abs(np.asarray(got, np.float64) / true - 1).max(-1)
            axes.loglog(doubt, error, style, color=color, linewidth=2.5, label=name)
    for axes, title in zip(panels, ("Loss", "Gradient by the label's logit"), strict=True):
        axes.axhline(FLOAT32_EPS, color="black", linestyle=":", label="float32 epsilon")
        axes.text(2e-12, 1.7, "no digit is right", ha="right")
        axes.set(title=title, xlim=(0.5, 1e-12), ylim=(1e-8, 10), xlabel="1 - p   (more certain →)")
        common.tidy(axes)
    panels[0].set_ylabel("largest relative error")
    panels[1].legend(loc="center right")
    figure.suptitle("Softmax cross-entropy in float32: error by the label's probability p")
    figure.savefig(path)


def main() -> None:
    parser = common.make_parser(__doc__, "draw fewer points")
    args = parser.parse_args()
    path = common.picture(parser, args, "accuracy", "quick")

    sections = [
        the_softmax,
        the_loss,
        unnormalized_targets,
        the_log_normalizer,
        without_cancellation,
        in_float32,
        the_library,
    ]
    with common.progress_bar(console) as progress:
        for section in progress.track(sections, description="deriving"):
            section()
    with console.status("Drawing the errors"):
        draw(20 if args.quick else 60, path)
    print(f"\nErrors drawn to {path}")


if __name__ == "__main__":
    main()
