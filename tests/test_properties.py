"""Any shape, axis, dtype, value and combination of options, against the contract in NumPy's long double.

The contract is written here once more, row by row in plain Python, from the tables of README.md. Values
are drawn from all that a float can be: subnormal, huge, of either zero, infinite, NaN. An example of
Hypothesis is a compiled loss with a batch of 24 such rows. `--hypothesis-profile=thorough` draws many
more of them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, strategies as st
from support import BOTH, TOLERANCE, quick, wide

ROWS = 24
DTYPES = ["float32", "bfloat16", "float16"]
if np.finfo(np.longdouble).eps < 1e-18:  # not so on every machine
    DTYPES.append("float64")
NAN, INF = math.nan, math.inf
IGNORED = -7


# -- inputs ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is compiled, and the seed of what is run."""

    kind: str
    dtype: str
    num_classes: int
    axis: int  # of the classes, in [N, M, V] with that axis moved
    reduction: str
    options: frozenset[str]
    seed: int


OPTIONS = ("label_smoothing", "class_weights", "weights", "z_loss", "softcap")
problems = st.builds(
    Problem,
    kind=st.sampled_from(sorted(BOTH)),
    dtype=st.sampled_from(DTYPES),
    num_classes=st.sampled_from([1, 2, 3, 5, 7, 41, 256, 300, 521]),
    axis=st.integers(-3, 2),
    reduction=st.sampled_from(["none", "none", "sum", "mean"]),
    options=st.frozensets(
        st.sampled_from([*OPTIONS, "ignore_index", "where examples", "where classes"]), max_size=5
    ),
    seed=st.integers(0, 2**32 - 1),
)


def extremes(problem):
    """Distances between the largest numbers are beyond any float. The loss of a label is then infinite;
    what multiplies or sums it again finds another infinity than float64 does, or none."""
    info = jnp.finfo(problem.dtype)
    tiny, largest = float(info.smallest_subnormal), float(info.max)
    harmless = {"ignore_index", "softcap", "where examples", "where classes"}
    if problem.kind == "dense" or problem.reduction != "none" or problem.options - harmless:
        largest /= 2**12
    return np.array([0.0, -0.0, tiny, -tiny, float(info.tiny), largest, -largest, largest / 2])


def draw_logits(r, problem, spoils):
    """Rows of seven kinds: ordinary, wide, offset, tied, extreme, with absent classes, and spoilt."""
    v = problem.num_classes
    z = r.normal(size=(ROWS, v)) * 2.5
    for i in range(ROWS):
        family = r.choice([0, 1, 2, 3, 4, 5, 6, 7, 8] if spoils else [0, 1, 2, 3, 7, 8])
        if family == 1:
            z[i] *= 10.0 ** r.integers(-6, 4)
        elif family == 2:
            z[i] += r.choice([-1, 1]) * 10.0 ** r.integers(1, 5)
        elif family == 3:
            z[i] = r.integers(-2, 3, v)
        elif family == 4 and "z_loss" not in problem.options:  # whose square is beyond them, too
            z[i] = r.choice(extremes(problem), v)
        elif family == 5:
            z[i, r.random(v) < 0.5] = -INF
        elif family == 6:
            z[i, r.integers(v)] = r.choice([NAN, INF, -INF])
        elif family == 7:
            z[i, r.integers(v)] += r.choice([10.0, 20.0, 40.0, 80.0])
    with np.errstate(over="ignore"):
        return z.astype(jnp.dtype(problem.dtype))


def draw(problem):
    """Arguments by name, classes last: [N, V] logits."""
    r, v = np.random.default_rng(problem.seed), problem.num_classes
    wide_dtype = np.float64 if problem.dtype == "float64" else np.float32
    # One bad row makes a sum NaN: of half of those that are reduced there is none.
    spoils = problem.reduction == "none" or r.random() < 0.5
    arguments = {"logits": draw_logits(r, problem, spoils)}
    if problem.kind == "integer":
        labels = r.integers(0, v, ROWS, dtype=np.int32)
        bad = [-1, v, IGNORED, 2**31 - 1] if spoils else [IGNORED]
        if spoils or "ignore_index" in problem.options:
            labels[r.random(ROWS) < 0.15] = r.choice(bad)
        arguments["labels"] = labels
    else:
        y = r.uniform(-0.5, 1, (ROWS, v)) * (r.random((ROWS, 1)) < 0.5)
        y[:, 0] += y.sum(-1) == 0
        arguments["labels"] = y.astype(jnp.dtype(problem.dtype))
    draws = {
        "label_smoothing": lambda: wide_dtype(r.choice([0.0, 0.1, 1.0])),
        "class_weights": lambda: r.choice([0.0, 0.25, 1.0, 3.0], v).astype(wide_dtype),
        "weights": lambda: r.choice([0.0, 1.0, -0.5, 2.0], ROWS).astype(wide_dtype),
        "z_loss": lambda: wide_dtype(r.choice([0.0, 1e-4, 0.5])),
        "softcap": lambda: wide_dtype(r.choice([0.5, 4.0, 30.0])),
    }
    arguments |= {k: draws[k]() for k in OPTIONS if k in problem.options}
    if "where classes" in problem.options:
        arguments["where"] = r.random((ROWS, v)) < 0.7
    elif "where examples" in problem.options:
        arguments["where"] = r.random(ROWS) < 0.7
    g = r.choice([1.0, -0.5, 0.25, 2.0, 0.0], ROWS)
    return arguments, g


# -- the contract ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """Of one example: its loss and gradient, and how large their terms are, before the weight."""

    loss: float = 0.0
    gradient: np.ndarray | float = 0.0
    terms: float = 0.0  # the sum of the absolute values of what the loss adds up
    slack: np.ndarray | float = 0.0  # the same for the gradient, times its error in units of 2^-22


def row_of(z, y, label, there, *, smoothing, class_weights, z_loss, softcap):
    """`y` is a distribution, or None for the label `label`; `there` tells the classes that exist."""
    v, z = len(z), z.astype(np.longdouble)
    if label is not None and not 0 <= label < v:
        return Row(NAN, np.where(there, NAN, 0.0))
    slope = np.ones(v)
    if softcap is not None:
        slope = 1 / np.cosh(z / softcap) ** 2
        z = softcap * np.tanh(z / softcap)
    z = np.where(there, z, -INF)
    highest = z.max()
    if np.isnan(z).any() or np.isinf(highest):
        return Row(NAN, np.where(there, NAN, 0.0))
    y = (np.arange(v) == label).astype(float) if y is None else np.where(there, y, 0)
    if smoothing is not None:
        y = (1 - smoothing) * y + smoothing * there / there.sum()
    if class_weights is not None:
        y = y * class_weights
    d = z - highest
    e = np.exp(d)
    tail = np.delete(e, z.argmax()).sum()
    costs = np.log1p(tail) - d
    at_costs = y != 0
    loss = (y[at_costs] * costs[at_costs]).sum()
    terms = (np.abs(y[at_costs]) * -d[at_costs]).sum() + abs(y.sum()) * np.log1p(tail)
    log_normalizer = highest + np.log1p(tail)
    o = e / (1 + tail)
    # o sum(y) - y = (e (sum(y) - y) - y (S - e)) / S, and S - e is summed without the e
    others = np.where(np.arange(v) == z.argmax(), tail, 1 + tail - e)
    mass = np.where((y != 0) & (np.count_nonzero(y) == 1), 0.0, y.sum() - y)
    gradient = (e * mass - y * others) / (1 + tail)
    # A cap's own rounding moves each distance by some roundings of the cap.
    far = np.where(np.isfinite(d), -d, 0) + (0 if softcap is None else 4 * softcap)
    lone = np.count_nonzero(y) <= 1 and (y >= 0).all()
    size = np.abs(gradient) if lone else o * abs(y.sum()) + np.abs(y)
    slack = size * (6 + far)
    if z_loss is not None:
        loss += z_loss * log_normalizer**2
        terms += z_loss * abs(log_normalizer) * max(1, abs(log_normalizer))
        gradient = gradient + 2 * z_loss * log_normalizer * o
        slack = (
            slack + 2 * z_loss * (abs(log_normalizer) * (6 + far) + max(1, abs(log_normalizer))) * o
        )
    if softcap is not None:
        terms += 4 * softcap * (np.abs(y).sum() + abs(y.sum()))
    slope = np.where(there, slope, 0)  # what a masked class holds is not read
    return Row(loss, gradient * slope, terms, slack * slope + 4 * np.abs(gradient * slope))


def contract(arguments, g, ignore_index, reduction):
    """Values and logits' gradients, and what their errors may be, relative to 2^-24 of float32."""
    z = wide(arguments["logits"])
    n, v = z.shape
    labels, where = arguments["labels"], arguments.get("where", np.ones((n, v), bool))
    there = where if where.ndim == 2 else np.repeat(where[:, None], v, axis=1)
    weights = wide(arguments.get("weights", np.ones(n)))
    class_weights = arguments.get("class_weights")
    class_weights = None if class_weights is None else wide(class_weights)
    scalars = {
        "smoothing": arguments.get("label_smoothing"),
        "z_loss": arguments.get("z_loss"),
        "softcap": arguments.get("softcap"),
    }
    scalars = {k: None if x is None else float(x) for k, x in scalars.items()}
    rows, divisor = [], 0.0
    for i in range(n):
        label = int(labels[i]) if labels.ndim == 1 else None
        if not there[i].any() or weights[i] == 0 or (label is not None and label == ignore_index):
            rows.append(Row())
            continue
        y = None if label is not None else wide(labels[i])
        rows.append(row_of(z[i], y, label, there[i], class_weights=class_weights, **scalars))
        weighed = label is not None and class_weights is not None
        bad = weighed and not 0 <= label < v  # the loss is NaN, and some weight must be taken
        divisor += weights[i] * (class_weights[0 if bad else label] if weighed else 1.0)
    factor = weights * (g if reduction == "none" else g[0])
    if reduction == "mean":
        factor = factor / divisor if divisor else np.zeros(n)
    losses = weights * np.array([row.loss for row in rows])
    terms = np.abs(weights) * [row.terms for row in rows]
    gradient = factor[:, None] * np.stack([row.gradient + np.zeros(v) for row in rows])
    slack = np.abs(factor)[:, None] * np.stack([row.slack + np.zeros(v) for row in rows])
    if reduction == "none":
        return losses, terms, gradient, slack
    total, terms = losses.sum(), terms.sum()
    if reduction == "sum":
        return total, terms, gradient, slack
    if divisor == 0:
        return 0.0, 0.0, gradient, slack
    return total / divisor, terms / abs(divisor), gradient, slack


def assert_within(what, got, want, allowed):
    got = wide(got)
    with np.errstate(invalid="ignore"):
        near = np.isfinite(want) & (np.abs(got - want) <= allowed)
        good = near | (got == want) | (np.isnan(got) & np.isnan(want))
    assert good.all(), f"{what}: {got[~good][:3]} for {np.asarray(want)[~good][:3]}"


# -- the test ----------------------------------------------------------------------------------------


@given(problem=problems)
def test_the_contract(problem):
    arguments, g = draw(problem)
    ignore_index = None
    if "ignore_index" in problem.options and problem.kind == "integer":
        ignore_index = IGNORED
    with np.errstate(all="ignore"):
        want = contract(arguments, g, ignore_index, problem.reduction)
    with jax.enable_x64(problem.dtype == "float64"):
        loss, gradient = run(problem, arguments, g, ignore_index)
    value, terms, by_logits, slack = want
    single = problem.dtype != "float64"
    unit = 2.0**-24 if single else 2.0**-53
    tiny = 2.0**-126 if single else 2.0**-1022
    with np.errstate(over="ignore"):
        value = wide(np.asarray(value, loss.dtype))
    assert loss.dtype == (np.float32 if single else np.float64)
    assert_within("loss", loss, value, 16 * unit * terms + 8 * tiny)
    assert gradient.dtype == arguments["logits"].dtype
    allowed = 4 * unit * slack + 8 * tiny
    if problem.dtype in ("float16", "bfloat16"):
        rounding, subnormal = TOLERANCE[problem.dtype]
        allowed = allowed + rounding * (np.abs(by_logits) + allowed) + subnormal
    assert_within("gradient", gradient, by_logits, allowed)


def run(problem, arguments, g, ignore_index):
    """Ours: the loss, and the gradient by the logits with the classes last. In a batch of rank 2, with
    the classes on the axis that is asked for."""
    batch, axis = (4, ROWS // 4), problem.axis

    def place(x):
        """[N, ...] as [4, 6, ...], and what has classes with those on their axis."""
        x = x.reshape(*batch, *x.shape[1:])
        return jnp.moveaxis(x, -1, axis) if x.ndim == 3 else x

    options = {"reduction": problem.reduction, "axis": axis}
    if problem.kind == "integer":
        options["ignore_index"] = ignore_index

    @quick
    def value_and_gradient(arguments, g):
        per_row = {k: place(x) for k, x in arguments.items() if x.shape[:1] == (ROWS,) and
                   k != "class_weights"}  # fmt: skip
        rest = {k: x for k, x in arguments.items() if k not in per_row}
        logits = per_row.pop("logits")

        def loss(logits):
            return BOTH[problem.kind](logits, **per_row, **rest, **options)

        value, pull = jax.vjp(loss, logits)
        g = g.reshape(batch) if problem.reduction == "none" else g[0]
        gradient = pull(g.astype(value.dtype))[0]
        return value.reshape(g.size if g.ndim else ()), jnp.moveaxis(gradient, axis, -1).reshape(
            ROWS, -1
        )

    return jax.tree.map(np.asarray, value_and_gradient(jax.tree.map(jnp.asarray, arguments), g))
