"""What the losses know besides the loss: log-normalizers, entropies, predictions and ranks. (More of the
head's are in `test_linear.py`.)"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from support import (
    BOTH,
    INTEGER,
    TOLERANCE,
    assert_close_to_largest,
    cotangents,
    lax_rules,
    rng,
    wide,
)
from ulps import families

from jax_sce import CrossEntropyAux, linear_softmax_cross_entropy as head, native, shard

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

    got, want = (jax.jit(jax.value_and_grad(f))(jnp.asarray(LOGITS)) for f in (apart, together))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=TOLERANCE["float64"], atol=TOLERANCE["float64"])


# -- entropy ------------------------------------------------------------------------------------------


def exact_entropy(logits):
    """In long double, by terms that are not negative."""
    z = wide(logits).astype(np.longdouble)
    d = z - z.max(-1, keepdims=True)
    is_first = np.arange(z.shape[-1]) == z.argmax(-1)[:, None]
    tail = np.where(is_first, 0, np.exp(d)).sum(-1)
    spread = (np.exp(d) * np.where(np.isneginf(d), 0, d)).sum(-1)
    return np.log1p(tail) - spread / (1 + tail)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("v", [3, 1000])
def test_the_entropy_is_accurate_to_its_own_size(v, dtype):
    for name, logits in families(np.random.default_rng(0), 256, v).items():
        logits = logits.astype(jnp.dtype(dtype))
        got = INTEGER(logits, np.zeros(256, np.int32), return_aux=True)[1].entropy
        want = exact_entropy(logits)
        is_normal = want > v * 2.0**-100  # terms below the smallest normal number may be lost
        np.testing.assert_allclose(got[is_normal], want[is_normal], rtol=1e-6, err_msg=name)
        assert np.all(got >= 0)


def test_the_entropy_of_one_class_and_of_equal_ones():
    def entropy(logits):
        return INTEGER(logits, jnp.zeros(2, jnp.int32), return_aux=True)[1].entropy

    np.testing.assert_array_equal(entropy(jnp.full((2, 1), 7.0)), 0)
    np.testing.assert_allclose(entropy(jnp.full((2, 50), 7.0)), np.log(50), rtol=2e-7)
    absent = jnp.zeros((2, 50)).at[:, 5:].set(-np.inf)
    np.testing.assert_allclose(entropy(absent), np.log(5), rtol=2e-7)
    sure = jnp.zeros((2, 3)).at[:, 0].set(80)
    np.testing.assert_allclose(entropy(sure), 2 * 81 * np.exp(-80.0), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_entropy_of_a_head_is_differentiated_by_all_that_it_depends_on(reduction, x64):
    r = rng(8)
    arguments = {
        "hidden": r.normal(size=(N, 4)), "kernel": r.normal(size=(4, V)), "bias": r.normal(size=V),
        "softcap": 2.0, "temperature": r.uniform(0.5, 2, N),
    }  # fmt: skip
    arguments = {k: jnp.asarray(x) for k, x in arguments.items()}
    g, weights = jnp.asarray(cotangents(N)), jnp.asarray(np.resize([1.0, 0.0, 2.0], N))

    def ours(arguments):
        loss, aux = head(labels=IDS, chunk_size=5, reduction=reduction, weights=weights,
                         return_aux=True, **arguments)  # fmt: skip
        return jnp.sum(loss * (g if reduction == "none" else 2)) + jnp.sum(g * aux.entropy)

    @lax_rules()
    def naive(arguments):
        z = arguments["hidden"] @ arguments["kernel"] + arguments["bias"]
        z = arguments["softcap"] * jnp.tanh(z / arguments["softcap"])
        log_o = jax.nn.log_softmax(z / arguments["temperature"][:, None])
        entropy = -jnp.sum(jnp.exp(log_o) * log_o, axis=-1)
        losses = -weights * jnp.take_along_axis(log_o, IDS[:, None], axis=-1)[:, 0]
        loss = jnp.sum(losses * g) if reduction == "none" else 2 * losses.sum() / weights.sum()
        return loss + jnp.sum(jnp.where(weights > 0, g * entropy, 0))

    got, want = (jax.jit(jax.value_and_grad(f))(arguments) for f in (ours, naive))
    assert_close_to_largest(got, want, rtol=1e-12)


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("kind", BOTH)
def test_the_second_derivative_of_the_entropy(kind, forward_mode, x64):
    """Ties for the largest logit, too."""
    logits, v = jnp.asarray(LOGITS).at[0, :3].set(4), jnp.asarray(rng(10).normal(size=(N, V)))

    def ours(z):
        aux = BOTH[kind](z, labels_of(kind), return_aux=True, forward_mode=forward_mode)[1]
        return jnp.sum(jnp.square(aux.entropy))

    def naive(z):
        log_o = jax.nn.log_softmax(z)
        return jnp.sum(jnp.square(jnp.sum(jnp.exp(log_o) * log_o, axis=-1)))

    got, want = (
        jax.jit(jax.grad(lambda z, f=f: jnp.sum(v * jax.grad(f)(z))))(logits) for f in (ours, naive)
    )
    assert_close_to_largest(got, want, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", BOTH)
def test_masked_classes_have_no_part_in_the_entropy(kind, dtype, x64):
    where = rng(11).random((N, V)) < 0.6
    where[0], where[1] = False, np.arange(V) == 2  # no class, one class
    logits, g = (jnp.asarray(x, dtype) for x in (np.where(where, LOGITS, np.nan), cotangents(N)))
    labels = labels_of(kind) if kind == "integer" else labels_of(kind).astype(dtype)

    def ours(z):
        aux = BOTH[kind](z, labels, where=where, return_aux=True)[1]
        return jnp.sum(g * aux.entropy), aux.entropy

    def naive(z):
        log_o = jax.nn.log_softmax(z, where=where, axis=-1)
        entropy = -jnp.sum(jnp.exp(log_o) * log_o, axis=-1, where=where)
        return jnp.sum(g * entropy), entropy

    (_, got), of_ours = jax.value_and_grad(ours, has_aux=True)(logits)
    (_, want), of_naive = jax.value_and_grad(naive, has_aux=True)(jnp.where(where, logits, 0))
    np.testing.assert_array_equal(got[:2], 0)
    np.testing.assert_array_equal(of_ours[~where], 0)
    np.testing.assert_array_equal(of_ours[1], 0)
    rtol = {"float32": 1e-6, "float64": 1e-12}[dtype]
    assert_close_to_largest((got[2:], of_ours[2:]), (want[2:], of_naive[2:]), rtol)


# -- ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_the_rank_is_the_number_of_classes_above_the_label(axis):
    logits = jnp.asarray(rng(9).integers(-2, 3, (N, V)), jnp.bfloat16)  # with ties
    got = INTEGER(
        jnp.moveaxis(logits, 1, axis), jnp.asarray(IDS), axis=axis, softcap=3.0, return_aux=True
    )[1].rank
    order = np.argsort(-wide(logits), axis=-1, stable=True)
    np.testing.assert_array_equal(got, np.argmax(order == IDS[:, None], axis=-1))
    prediction = INTEGER(logits, jnp.asarray(IDS), return_aux=True)[1].prediction
    np.testing.assert_array_equal(got == 0, prediction == IDS)


def test_the_rank_where_there_is_none():
    logits = jnp.float32(LOGITS).at[0].set(jnp.nan)
    labels = jnp.asarray(IDS).at[1].set(V).at[2].set(-100)
    weights = jnp.ones(N).at[3].set(0)
    options = {"ignore_index": -100, "weights": weights, "return_aux": True}
    rank = INTEGER(logits, labels, **options)[1].rank
    np.testing.assert_array_equal(rank[1:4], 2**31 - 1)
    assert rank[0] == IDS[0]  # all are NaN, and so equal
    one = jnp.array([[0.0, jnp.nan, 5.0, jnp.nan]])
    ranks = [INTEGER(one, jnp.array([y]), return_aux=True)[1].rank[0] for y in range(4)]
    assert ranks == [3, 0, 2, 1]
    where = np.arange(V) == 2  # the classes that are left: the label is the first of them
    rank = INTEGER(logits[4:], jnp.full(N - 4, 2), where=where[None], return_aux=True)[1].rank
    np.testing.assert_array_equal(rank, 0)
    assert BOTH["dense"](logits, jnp.float32(DISTRIBUTIONS), return_aux=True)[1].rank is None


# -- who does not count, masks, devices ---------------------------------------------------------------


def test_who_does_not_count_has_none():
    logits = jnp.float32(LOGITS).at[0].set(jnp.nan).at[3, 2].set(jnp.inf)
    labels = jnp.asarray(IDS).at[:3].set(-100)
    weights = jnp.ones(N).at[3].set(0)

    def total(logits):
        _, aux = INTEGER(logits, labels, ignore_index=-100, weights=weights, return_aux=True)
        return jnp.sum(aux.log_normalizer), aux

    (_, aux), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    np.testing.assert_array_equal(aux.log_normalizer[:4], 0)
    np.testing.assert_array_equal(aux.entropy[:4], 0)
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
        plain = jax.jit(functools.partial(BOTH[kind], return_aux=True))(placed, given)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), plain, want)
    got = shard(BOTH[kind], mesh, batch="data", classes="model")(placed, given, return_aux=True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), got, want)

    def total(loss, logits, labels):
        loss, aux = loss(logits, labels, return_aux=True, reduction="sum")
        return loss + jnp.sum(aux.log_normalizer) + jnp.sum(jnp.square(aux.entropy))

    sharded = shard(BOTH[kind], mesh, batch="data", classes="model")
    got = jax.jit(jax.grad(functools.partial(total, sharded)))(placed, given)
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
    assert "jax_sce.spread" in program("entropy")
    assert "pred[12,7]" in program("rank")
    for unused in (of_prediction, "jax_sce.spread", "pred[12,7]"):
        assert unused not in program("log_normalizer")
