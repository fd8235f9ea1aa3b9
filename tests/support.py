"""What several tests share: the tolerances, an oracle in NumPy float64, and inputs."""

import collections
import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sce import (
    Sparse,
    reference,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from jax_sce._rows import Targets
from jax_sce.testing._oracle import wide

# Every tolerance of the tests, relative unless said otherwise.
#   loss       for confident rows, as jax_sce/_rows.py promises: some eight roundings of 2^-24
#   rounded    one float32 rounding of each of a few steps, for quantities that do not cancel
#   float64    ours and the naive formula, both in float64, at logits so small that neither cancels
#   gradient   one of (6 + |z_j - max|) of these is allowed
#   underflow  absolute: the smallest normal float32, below which XLA flushes to zero
TOLERANCE = {
    "loss": 1e-6,
    "rounded": 8 * 2.0**-24,
    "float64": 1e-12,
    "gradient": 2.0**-22,
    "underflow": float(np.finfo(np.float32).tiny),
    # Half a unit in the last place, that is, one rounding; and the smallest subnormal's half.
    "float16": (2.0**-11, 2.0**-25),
    "bfloat16": (2.0**-8, float(np.finfo(np.float32).tiny)),
}

INTEGER = softmax_cross_entropy_with_integer_labels
DENSE = softmax_cross_entropy
BOTH = {"integer": INTEGER, "dense": DENSE}


def covering(*axes, strength=2, possible=lambda *values: True):
    """The possible cells of a grid as parameters: a few where every `strength` values of different axes
    meet, with each value as often as others if it can be, and the rest for `--thorough`."""

    def values(cell):
        return [axis[i] for axis, i in zip(axes, cell, strict=True)]

    grid = itertools.product(*(range(len(axis)) for axis in axes))
    grid = [cell for cell in grid if possible(*values(cell))]

    def meetings(cell):
        return set(itertools.combinations(enumerate(cell), strength))

    def gain(cell):
        return len(meetings(cell) & missing), -sum(used[value] for value in enumerate(cell))

    missing, kept, used = set().union(*map(meetings, grid)), set(), collections.Counter()
    while missing:
        best = max(grid, key=gain)
        kept.add(best)
        missing -= meetings(best)
        used.update(enumerate(best))
    return [
        pytest.param(*values(cell), marks=() if cell in kept else pytest.mark.thorough)
        for cell in grid
    ]


@contextlib.contextmanager
def lax_rules():
    """JAX's default promotion, for formulas that are not ours."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def rng(seed=0):
    return np.random.default_rng(seed)


def one_hot(labels, num_classes, dtype=np.float32):
    """In NumPy; a row of zeros for a label outside."""
    return (np.asarray(labels)[..., None] == np.arange(num_classes)).astype(dtype)


def cotangents(shape):
    """Different in each row, of either sign, exact in 16 bits."""
    return np.resize(np.array([1.0, -0.5, 0.25, 2.0, -1.5]), shape)


def targets_like(labels, num_classes, kind):
    return labels if kind == "integer" else jnp.asarray(one_hot(labels, num_classes))


def sparse(logits, ids, values, *args, **options):
    return DENSE(logits, Sparse(ids, values), *args, **options)


@lax_rules()
def densified(ids, values, num_classes):
    """The distributions that `Sparse` means."""
    hot = (ids[..., None] == jnp.arange(num_classes)).astype(values.dtype)
    return jnp.sum(hot * values[..., None], axis=-2)


# -- the oracle ----------------------------------------------------------------------------------


def exact_loss(logits, labels):
    """`-log o_y` of one class each, in float64, with the one at the maximum never added."""
    z = wide(logits)
    distance = z - z.max(-1, keepdims=True)
    exponentials = np.exp(distance)
    np.put_along_axis(exponentials, z.argmax(-1)[..., None], 0.0, -1)
    picked = np.take_along_axis(distance, np.asarray(labels)[..., None], -1)[..., 0]
    return np.log1p(exponentials.sum(-1)) - picked


def exact_gradient(logits, labels):
    """`o - y`, where `o_y - 1` is minus the sum of the others."""
    z = wide(logits)
    exponentials = np.exp(z - z.max(-1, keepdims=True))
    normalizer = exponentials.sum(-1, keepdims=True)
    others = exponentials.copy()
    labels = np.asarray(labels)[..., None]
    np.put_along_axis(others, labels, 0.0, -1)
    gradient = exponentials / normalizer
    np.put_along_axis(gradient, labels, -others.sum(-1, keepdims=True) / normalizer, -1)
    return gradient


# -- value and gradients by every argument -------------------------------------------------------


def derivatives(fn, arguments, cotangent):
    """`fn(**arguments)` and its cotangents by those of the arguments that are floats."""
    floats = {k: v for k, v in arguments.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    rest = {k: v for k, v in arguments.items() if k not in floats}
    value, pull = jax.vjp(lambda floats: fn(**floats, **rest), floats)
    return value, pull(jnp.asarray(cotangent, value.dtype))[0]


def reference_derivatives(kind, arguments, cotangent, **static):
    """The same of the naive formula, in float64 and with JAX's default promotion."""
    fn = {
        "integer": reference.softmax_cross_entropy_with_integer_labels,
        "dense": reference.softmax_cross_entropy,
        "sparse": lambda logits, ids, values, **options: reference.softmax_cross_entropy(
            logits, densified(ids, values, logits.shape[-1]), **options
        ),
    }[kind]
    with jax.enable_x64(True), lax_rules():
        arguments = {
            k: jnp.asarray(wide(v)) if jnp.issubdtype(v.dtype, jnp.floating) else v
            for k, v in arguments.items()
        }
        run = jax.jit(functools.partial(derivatives, functools.partial(fn, **static)))
        return run(arguments, cotangent)


# -- looking inside ------------------------------------------------------------------------------


def saved(fn, *args):
    """What reverse mode keeps, as `(shape, dtype, is an argument)`, without running anything."""
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(fn, *args)[1]))(*args).jaxpr
    return [(v.aval.shape, v.aval.dtype, v in jaxpr.invars) for v in jaxpr.outvars]


def targets_of(y, label_smoothing, uniform, class_weights):
    """`Targets` of class ids, int32, [N, 1], or of distributions, [N, V]."""
    ids, dense = (y, None) if y.dtype == jnp.int32 else (None, y)
    return Targets(ids, dense, label_smoothing, uniform, class_weights)


# Sums over devices are taken in another order: 1e-5 of the largest, in float32.
def assert_close_to_largest(got, want, rtol=1e-5):
    def check(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite], str(path))
        scale = np.abs(b[finite]).max(initial=1e-30)
        np.testing.assert_allclose(
            a[finite], b[finite], rtol=0, atol=rtol * scale, err_msg=str(path)
        )

    jax.tree_util.tree_map_with_path(check, got, want)


def installed(machine, count):
    """So many devices of an `Accelerator` to compile for; skips the test where that is not installed."""
    try:
        return machine.devices(count)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
