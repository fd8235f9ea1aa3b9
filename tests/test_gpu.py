"""The GPU's kernels, run by Pallas' interpreter: what they give is what plain JAX gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TOLERANCE, rng, targets_of

from jax_sce import _cpu, _gpu
from jax_sce._rows import Rows

V = 1300  # a step of the lanes and a part
INF, NAN = np.inf, np.nan


def logits():
    """Confident, rising, falling, tied, absent, and bad rows, and the ends of the range."""
    ramp = np.linspace(-3, 3, V)
    rows = [
        np.r_[60.0, np.linspace(0, 0.3, V - 1)],
        ramp,
        ramp[::-1],
        np.r_[np.zeros(V - 1), 17.0],
        np.full(V, 5.0),
        np.full(V, 1e8),
        np.r_[3.0, np.full(V - 1, -INF)],
        np.r_[3e38, np.full(V - 1, -3e38)],
        10 * rng(0).normal(size=V),
        np.full(V, -INF),
        np.r_[NAN, np.zeros(V - 1)],
        np.r_[np.zeros(V - 1), NAN],
        np.r_[INF, np.zeros(V - 1)],
    ]
    return np.stack(rows).astype(np.float32)


def assert_same(got, want, rtol):
    """Where the tail is NaN nothing else is promised."""
    is_bad = np.isnan(want[1])
    assert 0 < is_bad.sum() < is_bad.size
    np.testing.assert_array_equal(np.isnan(got[1]), is_bad)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(np.asarray(x)[~is_bad], np.asarray(y)[~is_bad], rtol)


def masks(kind):
    if kind == "none":
        return None
    mask = rng(1).random((1 if kind == "shared" else 13, V)) < 0.7
    mask[:, :3] = True
    if kind == "own":
        mask[3] = False  # keeps no class
    return jnp.asarray(mask)


@pytest.mark.parametrize(
    ("kind", "mask", "softcap"),
    [
        ("ids", "none", None),
        ("ids", "own", 7.0),
        ("smoothed ids", "own", 7.0),
        ("distributions", "shared", None),
    ],
)
def test_rows(kind, mask, softcap):
    """Both are within 16 u; with a soft-cap and a temperature the logits are rounded twice, each to the
    unit of 7."""
    cap = None if softcap is None else jnp.full((1, 1), softcap)
    temperature = None if softcap is None else jnp.linspace(0.7, 2, 13)[:, None]
    rows = Rows(jnp.asarray(logits()), (-1,), masks(mask), cap, temperature)
    ids = jnp.asarray(rng(2).integers(0, 3, (13, 1)), jnp.int32)
    uniform = jnp.full((1, 1), 1 / V)
    p = jax.nn.softmax(jnp.asarray(rng(3).normal(size=(13, V)), jnp.float32))
    smoothing, weights = jnp.full((1, 1), 0.1), jnp.linspace(0, 2, V)[None]
    args = {
        "ids": ids,
        "smoothed ids": targets_of(ids, smoothing, uniform, weights),
        "distributions": targets_of(p, None, uniform, None),
    }[kind]
    name = "label_statistics" if kind == "ids" else "target_statistics"
    got = functools.partial(getattr(_gpu, name), interpret=True)(rows, args)
    want = jax.jit(_cpu.FORMS[name])(rows, args)
    rtol = 32 * 2.0**-24 if softcap is None else 64 * 2.0**-24
    if kind != "ids":  # sums of products of either order
        rtol *= 2
    assert_same(got, want, rtol)


@pytest.mark.parametrize(
    ("shape", "axis", "softcap"), [((2, 9, 20, 30), -3, None), ((11, 300), -2, 7.0)]
)
def test_columns(shape, axis, softcap):
    z = 5 * rng(4).normal(size=shape).astype(np.float32)
    z[0, ..., ::7] = NAN
    labels_shape = list(shape)
    labels_shape[axis] = 1
    labels = jnp.asarray(rng(5).integers(0, shape[axis], labels_shape), jnp.int32)
    cap = None if softcap is None else jnp.full((1,) * len(shape), softcap)
    temperature = None
    if softcap is not None:
        temperature = jnp.asarray(rng(6).uniform(0.7, 2, labels_shape), jnp.float32)
    rows = Rows(jnp.asarray(z), (axis,), None, cap, temperature)
    got = _gpu.label_statistics(rows, labels, interpret=True)
    want = jax.jit(_cpu.FORMS["label_statistics"])(rows, labels)
    assert_same(got, want, TOLERANCE["loss"] if softcap is None else 4 * TOLERANCE["loss"])


def test_without_a_gpu_there_is_no_kernel():
    rows = Rows(jnp.zeros((4, 4096)), (-1,))
    assert not _gpu.supports("label_statistics", rows, jnp.zeros((4, 1), jnp.int32))
