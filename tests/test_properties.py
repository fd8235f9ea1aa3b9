"""The losses on logits, of any shape, axes, dtype, values and options, against `contract.py`.

Values are drawn from all that a float can be: subnormal, huge, of either zero, infinite, NaN. An example
of Hypothesis is a compiled program, which gives the loss, the derivatives by all floats or by the logits
alone, and in forward mode the tangent; it is run with several batches of 24 examples, or more of a
single one where `axis` is all axes. `--hypothesis-profile=thorough` draws many more of them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from contract import (
    DTYPES,
    EACH,
    EVENLY,
    IGNORED,
    INF,
    NAN,
    OPTIONS,
    Batch,
    assert_near,
    draw_cotangent,
    draw_labels,
    draw_options,
    draw_tangent,
    nothing,
    precision_of,
    some_of,
    what_is_not_finite,
)
from hypothesis import given, settings
from support import BOTH, wide

ROWS = 96  # of a program, in batches of 24 or of one


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is compiled, and the seed of what is run."""

    kind: str
    dtype: str
    batch: tuple[int, ...]
    classes: tuple[int, ...]
    order: tuple[int, ...]  # of the axes of `batch` and `classes` in the logits
    signs: tuple[bool, ...] | None  # whether an axis is counted from the end; of `axis=None`, None
    reduction: str
    options: frozenset[str]
    by_all: bool  # or by the logits alone
    forward_mode: bool
    seed: int

    @property
    def size(self):
        return math.prod(self.batch), math.prod(self.classes)

    @property
    def axis(self):
        if self.signs is None:
            return None
        rank = len(self.order)
        axes = [self.order.index(len(self.batch) + i) for i in range(len(self.classes))]
        axes = tuple(a - rank if sign else a for a, sign in zip(axes, self.signs, strict=True))
        return axes[0] if len(axes) == 1 else axes

    @property
    def precision(self):
        return precision_of(self.dtype)

    @property
    def ignore_index(self):
        used = "ignore_index" in self.options and self.kind == "integer"
        return IGNORED if used else None

    @property
    def rounds_twice(self):
        """Forward mode adds up a gradient by the loss and one by the log-normalizer in 16 bits."""
        by_targets = self.kind == "dense" or "label_smoothing" in self.options
        in_16_bits = self.dtype in ("bfloat16", "float16")
        return self.forward_mode and by_targets and in_16_bits and "z_loss" in self.options

    def place(self, x):
        """[N] or [N, V], as the batch or the logits are laid out."""
        if x.ndim == 1:
            return x.reshape(self.batch)
        return x.reshape(self.batch + self.classes).transpose(self.order)

    def collect(self, x):
        """And back."""
        if x.ndim == len(self.batch):
            return x.reshape(-1)
        return x.transpose(np.argsort(self.order)).reshape(self.size)


def problem_of(random):
    batch = random.choice([(24,), (24,), (4, 6), (4, 6), (2, 3, 4), ()])
    flat = [(1,), (2,), (3,), (5,), (7,), (41,), (256,), (300,), (521,)]
    classes = random.choice(
        [random.choice(flat), random.choice([(2, 3), (1, 7), (20, 15), (3, 2, 5)])]
    )
    rank = len(batch) + len(classes)
    takes_all = not batch and random.random() < 0.5
    order = range(rank) if takes_all else random.sample(range(rank), rank)
    examples = iter(range(len(batch)))  # which come in their own order
    return Problem(
        kind=random.choice(sorted(BOTH)),
        dtype=random.choice(DTYPES),
        batch=batch,
        classes=classes,
        order=tuple(next(examples) if a < len(batch) else a for a in order),
        signs=None if takes_all else tuple(random.random() < 0.5 for _ in classes),
        reduction=random.choice(["none", "mean", "sum", "mean"]),
        options=some_of(random, *OPTIONS, "ignore_index", "where examples", "where classes"),
        by_all=random.random() < 0.67,
        forward_mode=random.random() < 0.5,
        seed=random.getrandbits(32),
    )


# -- inputs ------------------------------------------------------------------------------------------


def extremes(problem):
    """Distances between the largest numbers are beyond any float. The loss of a label is then infinite;
    what multiplies or sums it again finds another infinity than the contract does, or none."""
    info = jnp.finfo(problem.dtype)
    tiny, largest = float(info.smallest_subnormal), float(info.max)
    harmless = {"ignore_index", "softcap", "where examples", "where classes"}
    if problem.kind == "dense" or problem.reduction != "none" or problem.options - harmless:
        largest = min(largest, float(jnp.finfo(problem.precision.dtype).max) / 2**20)
    return np.array([0.0, -0.0, tiny, -tiny, float(info.tiny), largest, -largest, largest / 2])


def draw_logits(r, problem, spoils):
    """Rows of eight kinds: ordinary, wide, offset, tied, extreme, of absent classes, spoilt, sure."""
    n, v = problem.size
    z = r.normal(size=(n, v)) * 2.5
    for i in range(n):
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


def draw(problem, r):
    """Arguments by name, [N, V] logits."""
    n, v = problem.size
    spoils = r.random() < 0.5  # one bad row makes the sums over all of them NaN
    bad = [-1, v, IGNORED, 2**31 - 1] if spoils else [IGNORED] * (problem.ignore_index is not None)
    arguments = {
        "logits": draw_logits(r, problem, spoils),
        "labels": draw_labels(r, problem.kind, n, v, problem.dtype, bad),
    } | draw_options(r, problem.options, n, v, problem.precision.dtype)
    if "where classes" in problem.options:
        arguments["where"] = r.random((n, v)) < 0.7
    elif "where examples" in problem.options:
        arguments["where"] = r.random(n) < 0.7
    return arguments


# -- the test ----------------------------------------------------------------------------------------


@settings(max_examples=settings.default.max_examples * 2 // 5)
@given(problem=EVENLY.map(problem_of))
def test_the_contract(problem):
    r, run = np.random.default_rng(problem.seed), program(problem)
    for _ in range(ROWS // problem.size[0]):
        arguments = draw(problem, r)
        floats = {k: x for k, x in arguments.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        moving = {k: x for k, x in floats.items() if problem.by_all or k == "logits"}
        rest = {k: x for k, x in arguments.items() if k not in moving}
        tangents = {k: draw_tangent(r, x) for k, x in moving.items()}
        g = draw_cotangent(r, problem.size[0]) if problem.reduction == "none" else 0.25
        with jax.enable_x64(problem.dtype == "float64"):
            got = jax.tree.map(np.asarray, run(moving, rest, g, tangents))
        compare(problem, arguments, g, tangents, *got)


@np.errstate(all="ignore")
def compare(problem, arguments, g, tangents, value, gradients, tangent):
    precision = problem.precision
    batch = Batch(
        wide(arguments["logits"]), arguments, problem.ignore_index, problem.reduction, precision
    )
    assert value.dtype == precision.dtype
    assert_near("loss", value, batch.value(), precision)
    for name, got in gradients.items():
        assert got.dtype == arguments[name].dtype
        # By a target the derivative is infinite where its class is absent; by what all examples share,
        # one that is bad spoils the sum.
        excused = {"logits": nothing, "labels": np.isnan}.get(name, what_is_not_finite)
        if not (name == "logits" and problem.rounds_twice):
            assert_near(f"by {name}", got, batch.pull(name, g), precision, excused)
    if tangent is not None:
        want = batch.push({k: wide(t) for k, t in tangents.items()})[0]
        excused = nothing if set(tangents) == {"logits"} else what_is_not_finite
        assert_near("tangent", tangent, want, precision, excused)


def program(problem):
    """Ours: the value, the gradients by what moves, and in forward mode the tangent."""
    loss = functools.partial(
        BOTH[problem.kind],
        axis=problem.axis,
        reduction=problem.reduction,
        forward_mode=problem.forward_mode,
    )
    if problem.kind == "integer":
        loss = functools.partial(loss, ignore_index=problem.ignore_index)

    def placed(arguments):
        each = {*EACH, "where"}
        return {k: problem.place(x) if k in each else x for k, x in arguments.items()}

    @jax.jit
    def run(moving, rest, g, tangents):
        rest = placed(rest)

        def fn(moving):
            value = loss(**placed(moving), **rest)
            return problem.collect(value) if problem.reduction == "none" else value

        value, pull = jax.vjp(fn, moving)
        gradients = pull(jnp.asarray(g, value.dtype))[0]
        tangent = None
        if problem.forward_mode:
            tangent = jax.jvp(fn, (moving,), (tangents,))[1]
        return value, gradients, tangent

    return run
