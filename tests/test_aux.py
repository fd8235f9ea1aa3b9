"""What the losses on logits know besides the loss: log-normalizers and predictions. (Those of the head
are in `test_linear.py`.)"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from support import BOTH, INTEGER, TOLERANCE, cotangents, quick, rng, wide

from jax_sce import CrossEntropyAux, native, shard

N, V = 12, 7
LOGITS = rng(3).normal(size=(N, V)) * 3
IDS = rng(4).integers(0, V, N, dtype=np.int32)
DISTRIBUTIONS = rng(5).random((N, V))


def labels_of(kind):
    return jnp.asarray(IDS if kind == "integer" else DISTRIBUTIONS)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", BOTH)
def test_beside_the_same_loss(kind, reduction):
    logits = jnp.float32(LOGITS)
    labels = labels_of(kind).astype(jnp.int32 if kind == "integer" else jnp.float32)
    loss, aux = BOTH[kind](logits, labels, reduction=reduction, return_aux=True)
    np.testing.assert_array_equal(loss, BOTH[kind](logits, labels, reduction=reduction))
    assert isinstance(aux, CrossEntropyAux)
    np.testing.assert_array_equal(aux.prediction, LOGITS.argmax(-1))
    assert aux.prediction.dtype == jnp.int32
    want = jax.nn.logsumexp(wide(logits), axis=-1)
    np.testing.assert_allclose(aux.log_normalizer, want, rtol=TOLERANCE["rounded"])


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("option", [{}, {"softcap": 4.0}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_the_log_normalizer_is_differentiated_exactly(kind, option, forward_mode, x64):
    """By a function of it that `z_loss` has, too."""
    g = jnp.asarray(cotangents(N))
    loss = functools.partial(
        BOTH[kind], labels=labels_of(kind), forward_mode=forward_mode, **option
    )

    def apart(logits):
        losses, aux = loss(logits, return_aux=True)
        return jnp.sum(g * (losses + 0.3 * jnp.square(aux.log_normalizer)))

    def together(logits):
        return jnp.sum(g * loss(logits, z_loss=0.3))

    got, want = (quick(jax.value_and_grad(f))(jnp.asarray(LOGITS)) for f in (apart, together))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=TOLERANCE["float64"], atol=TOLERANCE["float64"])


def test_who_does_not_count_has_none():
    logits = jnp.float32(LOGITS).at[0].set(jnp.nan).at[3, 2].set(jnp.inf)
    labels = jnp.asarray(IDS).at[:3].set(-100)
    weights = jnp.ones(N).at[3].set(0)

    def total(logits):
        _, aux = INTEGER(logits, labels, ignore_index=-100, weights=weights, return_aux=True)
        return jnp.sum(aux.log_normalizer), aux

    (_, aux), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    np.testing.assert_array_equal(aux.log_normalizer[:4], 0)
    np.testing.assert_array_equal(aux.prediction[:4], -1)
    np.testing.assert_array_equal(gradient[:4], 0)
    np.testing.assert_allclose(gradient[4:], jax.nn.softmax(logits[4:]), rtol=1e-5)


def test_ties_masks_and_several_axes():
    logits = jnp.zeros((2, 3, 2)).at[1, 2, 0].set(1).at[0, 2, 1].set(2)
    labels = jnp.zeros(2, jnp.int32)
    predicted = functools.partial(INTEGER, axis=(2, 1), return_aux=True)
    np.testing.assert_array_equal(predicted(logits, labels)[1].prediction, [5, 2])
    np.testing.assert_array_equal(predicted(0 * logits, labels)[1].prediction, [0, 0])
    where = jnp.ones((1, 3, 2), bool).at[0, 2, :].set(False)
    np.testing.assert_array_equal(predicted(logits, labels, where=where)[1].prediction, [0, 0])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", BOTH)
def test_split_over_devices(kind, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    logits = jnp.float32(rng(6).normal(size=(N, 8))).at[0, 2].set(9).at[0, 6].set(9)
    labels = jnp.asarray(IDS) if kind == "integer" else jnp.float32(rng(7).random((N, 8)))
    of_logits, of_labels = (NamedSharding(mesh, P("data", *x)) for x in (("model",), ()))
    placed = jax.device_put(logits, of_logits)
    given = jax.device_put(labels, of_labels if kind == "integer" else of_logits)
    want = BOTH[kind](logits, labels, return_aux=True)
    if axis_type == AxisType.Auto:
        plain = quick(functools.partial(BOTH[kind], return_aux=True))(placed, given)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), plain, want)
    got = shard(BOTH[kind], mesh, batch="data", classes="model")(placed, given, return_aux=True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), got, want)

    def total(loss, logits, labels):
        loss, aux = loss(logits, labels, return_aux=True, reduction="sum")
        return loss + jnp.sum(aux.log_normalizer)

    sharded = shard(BOTH[kind], mesh, batch="data", classes="model")
    got = quick(jax.grad(functools.partial(total, sharded)))(placed, given)
    want = jax.grad(functools.partial(total, BOTH[kind]))(logits, labels)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.skipif(
    not native.status().available, reason="without kernels a row's place is read, too"
)
def test_what_is_not_used_costs_nothing():
    def program(field):
        def total(logits, labels):
            return jnp.sum(getattr(INTEGER(logits, labels, return_aux=True)[1], field))

        return jax.jit(total).lower(jnp.float32(LOGITS), jnp.asarray(IDS)).compile().as_text()

    of_prediction = "(f32[12]{0}, s32[12]{0}) reduce("  # a maximum and its place
    assert of_prediction in program("prediction")
    assert of_prediction not in program("log_normalizer")
