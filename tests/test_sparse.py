"""Labels that are some classes of each example: the distributions that they mean, in less memory.

(With every option, and in forward mode, they are in `test_options.py`.)"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from support import (
    DENSE,
    INTEGER,
    TOLERANCE,
    assert_close_to_largest,
    cotangents,
    covering,
    densified,
    lax_rules,
    rng,
    sparse,
    wide,
)

from jax_sce import Sparse, Teacher, _sparse, linear_softmax_cross_entropy as head, shard

N, V, K, D = 12, 16, 5, 4
INF, NAN = np.inf, np.nan
LOGITS = jnp.float32(rng(0).normal(size=(N, V)) * 2)
IDS = jnp.asarray(rng(1).integers(-3, V, (N, K), dtype=np.int32))
VALUES = jnp.float32(rng(2).normal(size=(N, K)))
HIDDEN, KERNEL = (jnp.float32(rng(3 + i).normal(size=s)) for i, s in enumerate([(N, D), (D, V)]))
G = jnp.float32(cotangents(N))
NEAR = functools.partial(assert_close_to_largest, rtol=2e-6)  # some roundings of 2^-24


def pulled(loss, *args, g=G):
    """The value and the cotangents by all arguments that are floats."""
    at = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]

    def of(*floats):
        return loss(*(floats[at.index(i)] if i in at else x for i, x in enumerate(args)))

    @jax.jit
    def run(*floats):
        value, pull = jax.vjp(of, *floats)
        return value, pull(jnp.broadcast_to(g, value.shape))

    return run(*(args[i] for i in at))


def head_of(hidden, kernel, ids, values, **options):
    return head(hidden, kernel, Sparse(ids, values), **options)


@lax_rules()
def dense(logits, ids, values, **options):
    return DENSE(logits, densified(ids, values, logits.shape[-1]), **options)


# -- what they mean -----------------------------------------------------------------------------------


def test_one_class_of_all_the_mass_is_a_class_id():
    """To the last digits where the row is sure: nothing cancels."""
    logits = LOGITS.at[:, 2].add(20)
    labels = jnp.full((N, 1), 2)
    got = pulled(sparse, logits, labels, jnp.ones((N, 1)))
    loss, (by_logits,) = pulled(lambda z: INTEGER(z, labels[:, 0]), logits)
    np.testing.assert_allclose(got[0], loss, rtol=TOLERANCE["loss"])
    np.testing.assert_allclose(got[1][0], by_logits, rtol=26 * TOLERANCE["gradient"])
    np.testing.assert_allclose(got[1][1][:, 0], G * loss, rtol=TOLERANCE["loss"])


def test_places_in_any_order_and_twice_the_same_add_up():
    want = pulled(sparse, LOGITS, IDS, VALUES)
    turned = pulled(sparse, LOGITS, IDS[:, ::-1], VALUES[:, ::-1])
    NEAR((turned[0], turned[1][0], turned[1][1][:, ::-1]), (want[0], *want[1]))
    halves = pulled(sparse, LOGITS, jnp.tile(IDS, 2), jnp.tile(VALUES / 2, 2))
    NEAR((halves[0], halves[1][0], halves[1][1][:, :K]), (want[0], *want[1]))


def test_many_places_take_memory_in_proportion(x64):
    n, v, k = 8, 4000, 1000
    logits = jnp.asarray(rng(20).normal(size=(n, v)))
    ids = jnp.asarray(rng(21).integers(-5, v // 8, (n, k), dtype=np.int32))  # many twice
    values = jnp.asarray(rng(22).normal(size=(n, k)))
    g = jnp.asarray(cotangents(n))
    run = jax.jit(functools.partial(pulled, sparse, g=g)).lower(logits, ids, values).compile()
    assert run.memory_analysis().temp_size_in_bytes < 16 * ids.size * 8  # not ids.size * k
    got, want = run(logits, ids, values), pulled(dense, logits, ids, values, g=g)
    assert_close_to_largest(got, want, rtol=1e-12)


def test_more_places_than_are_compared_at_a_time():
    ids = jnp.arange(4100) % 41
    first, total = jax.jit(_sparse._merged)(ids, jnp.ones(4100))
    np.testing.assert_array_equal(first, jnp.arange(4100) < 41)
    np.testing.assert_array_equal(total, 100)


@pytest.mark.parametrize("axis", [0, 1, (0, 2), (2, 1), None], ids=str)
def test_classes_on_any_axes(axis, x64):
    logits = jnp.asarray(rng(5).normal(size=(2, 3, 4)))
    axes = (0, 1, 2) if axis is None else tuple(np.atleast_1d(axis))
    others = [a for a in range(3) if a not in axes]
    last = jnp.transpose(logits, (*others, *axes)).reshape(*(logits.shape[a] for a in others), -1)
    ids = jnp.asarray(rng(6).integers(-1, last.shape[-1], (*last.shape[:-1], 4)))
    values = jnp.asarray(rng(7).random(ids.shape))
    g = jnp.asarray(cotangents(last.shape[:-1]))
    got = pulled(functools.partial(sparse, axis=axis), logits, ids, values, g=g)
    want = pulled(dense, last, ids, values, g=g)
    by_logits = jnp.transpose(got[1][0], (*others, *axes)).reshape(last.shape)
    assert_close_to_largest((got[0], by_logits, got[1][1]), (want[0], *want[1]), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("where", [None, "mask"])
def test_16_bit_logits_are_rounded_once(dtype, where):
    logits = LOGITS.astype(dtype)
    options = {} if where is None else {"where": rng(8).random((N, V)) < 0.8}
    loss, (by_logits, by_values) = pulled(
        functools.partial(sparse, **options), logits, IDS, VALUES.astype(dtype)
    )
    with jax.enable_x64(True):
        exact = jnp.asarray(wide(logits)), IDS, jnp.asarray(wide(VALUES.astype(dtype)))
        want, (by_exact, _) = pulled(functools.partial(dense, **options), *exact, g=wide(G))
    np.testing.assert_allclose(loss, want, rtol=2e-6, atol=2e-6)
    half = TOLERANCE[dtype][0]
    np.testing.assert_allclose(wide(by_logits), by_exact, rtol=half + 1e-5, atol=2e-6)
    assert (loss.dtype, by_logits.dtype, by_values.dtype) == (jnp.float32, dtype, dtype)


@pytest.mark.parametrize(
    ("reduction", "forward_mode"), covering(["none", "mean"], [False, True], strength=1)
)
def test_in_a_head(reduction, forward_mode, x64):
    options = {
        "bias": rng(9).normal(size=V), "weights": np.resize([1.0, 0.5, 0.0, 2.0], N),
        "temperature": np.linspace(0.5, 2, N), "softcap": 3.0, "z_loss": 0.1,
        "label_smoothing": 0.1, "class_weights": np.linspace(0, 2, V),
    }  # fmt: skip
    arrays = {k: jnp.asarray(x) for k, x in options.items()}
    at = [x.astype(jnp.float64) for x in (HIDDEN, KERNEL, VALUES)]

    def ours(hidden, kernel, values, arrays):
        static = {"reduction": reduction, "forward_mode": forward_mode, "chunk_size": 5}
        return head_of(hidden, kernel, IDS, values, **arrays, **static)

    @lax_rules()
    def naive(hidden, kernel, values, arrays):
        arrays = dict(arrays)
        logits = hidden @ kernel + arrays.pop("bias")
        return dense(logits, IDS, values, reduction=reduction, **arrays)

    g = G.astype(jnp.float64) if reduction == "none" else 1.5

    @jax.jit
    def both(*args):
        return [
            (value, pull(jnp.broadcast_to(g, value.shape)))
            for value, pull in (jax.vjp(loss, *args) for loss in (ours, naive))
        ]

    assert_close_to_largest(*both(*at, arrays), rtol=1e-12)


# -- edge cases ---------------------------------------------------------------------------------------


def HEAD(logits, ids, values, **options):
    """Of a head whose hidden states are its logits."""
    return head_of(logits, jnp.eye(V), ids, values, **options)


@pytest.mark.parametrize("loss", [sparse, HEAD], ids=["logits", "head"])
def test_a_class_that_there_is_not_is_loud_in_its_own_row_alone(loss):
    for bad in (V, 2**31 - 1):
        ids = IDS.at[3, 1].set(bad)
        value, (by_logits, _) = pulled(loss, LOGITS, ids, VALUES.at[3, 1].set(0))
        assert np.isnan(value[3])
        assert np.isnan(by_logits[3]).all()
        want = pulled(loss, LOGITS, IDS, VALUES)
        others = np.arange(N) != 3
        np.testing.assert_array_equal(value[others], want[0][others])
        np.testing.assert_array_equal(by_logits[others], want[1][0][others])


def test_ids_beyond_32_bits_are_bad_or_empty_and_never_cut():
    ids = np.asarray(IDS, np.int64)
    ids[0, 0], ids[1, 0] = 2**32 + 1, -(2**40)
    value = sparse(LOGITS, ids, VALUES)
    assert np.isnan(value[0])
    np.testing.assert_allclose(value[1], sparse(LOGITS, IDS.at[1, 0].set(-1), VALUES)[1], rtol=1e-6)


@pytest.mark.parametrize("loss", [sparse, HEAD], ids=["logits", "head"])
def test_checkify_names_it_where_it_counts(loss):
    def total(ids, weights):
        return jnp.sum(loss(LOGITS, ids, VALUES, weights=weights))

    checked = checkify.checkify(total, errors=checkify.user_checks)
    ids, ones = IDS.at[3, 1].set(V + 4), jnp.ones(N)
    for weights in (ones, None):
        message = checked(ids, weights)[0].get()
        assert f"labels must lie in [0, {V}), got {V + 4} at (3, 1)" in message
        assert checked(IDS.at[3, 1].set(-1), weights)[0].get() is None
    assert checked(ids, ones.at[3].set(0))[0].get() is None


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("option", [{}, {"label_smoothing": 0.1}, {"softcap": 2.0}], ids=str)
def test_who_does_not_count_has_no_gradient_whatever_it_holds(option, forward_mode):
    logits = LOGITS.at[0].set(NAN).at[1, 2].set(INF).at[2].set(-INF)
    ids, values = IDS.at[3, 0].set(V), VALUES.at[4, 0].set(NAN)
    weights = jnp.ones(N).at[:5].set(0)
    temperature = jnp.ones(N)

    def loss(logits, values, temperature):
        return sparse(
            logits, ids, values, weights=weights, temperature=temperature,
            forward_mode=forward_mode, **option)  # fmt: skip

    value, gradients = pulled(loss, logits, values, temperature)
    np.testing.assert_array_equal(value[:5], 0)
    for x in gradients:
        np.testing.assert_array_equal(x[:5], 0)
        assert np.isfinite(x).all()


def test_absent_classes():
    logits, ids = LOGITS.at[:, 3].set(-INF), IDS.at[:, 0].set(3).at[:, 1:].set(5)
    nothing = VALUES.at[:, 0].set(0)
    value, (by_logits, by_values) = pulled(sparse, logits, ids, nothing)
    without = jnp.delete(logits, 3, axis=1), jnp.where(ids == 3, -1, ids - 1)
    want, (by_others, _) = pulled(sparse, *without, nothing)
    NEAR((value, jnp.delete(by_logits, 3, axis=1)), (want, by_others))
    np.testing.assert_array_equal(by_logits[:, 3], 0)
    np.testing.assert_array_equal(by_values[:, 0], jnp.sign(G) * INF)
    some = jnp.ones((N, K))
    value, (by_logits, _) = pulled(sparse, logits, ids, some)
    np.testing.assert_array_equal(value, INF)
    assert np.isfinite(by_logits).all()
    np.testing.assert_array_equal(by_logits[:, 3], -G)  # o - y


def test_mass_on_a_masked_class_is_left_out():
    where = jnp.ones((1, V), bool).at[0, 5].set(False)
    ids = IDS.at[:, 0].set(5)
    got = pulled(functools.partial(sparse, where=where), LOGITS.at[:, 5].set(NAN), ids, VALUES)
    want = pulled(functools.partial(dense, where=where), LOGITS, ids, VALUES)
    NEAR(got, want)


# -- transformations and devices ----------------------------------------------------------------------


def test_vmap_and_second_derivatives(x64):
    args = LOGITS.astype(jnp.float64), IDS, VALUES.astype(jnp.float64)
    batch = jax.vmap(sparse)(*args)
    np.testing.assert_allclose(batch, dense(*args), rtol=1e-12)
    alike = jax.vmap(sparse, (0, None, None))(args[0][:4, None], IDS[:1], args[2][:1])
    want = dense(args[0][:4], jnp.tile(IDS[:1], (4, 1)), jnp.tile(args[2][:1], (4, 1)))
    np.testing.assert_allclose(alike[:, 0], want, rtol=1e-12)

    def second(loss):
        def total(logits, values):
            return jnp.sum(jnp.square(loss(logits, IDS, values)))

        inner = jax.grad(total, (0, 1))
        return jax.jit(jax.grad(lambda *x: sum(jnp.sum(y**3) for y in inner(*x)), (0, 1)))

    at = args[0], args[2]
    assert_close_to_largest(second(sparse)(*at), second(dense)(*at), rtol=1e-11)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("loss", ["logits", "head"])
def test_over_devices(loss, axis_type):
    """Split by plain jit, where the axes are automatic, and by `shard`, classes too."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)

    def on(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    labels = on(IDS, "data"), on(VALUES, "data")
    options = {"label_smoothing": 0.1, "softcap": 5.0, "temperature": jnp.linspace(0.5, 2, N)}
    if loss == "logits":
        whole, args, placed = DENSE, (LOGITS,), (on(LOGITS, "data", "model"),)
    else:
        whole, args = head, (HIDDEN, KERNEL)
        placed = on(HIDDEN, "data"), on(KERNEL, None, "model")

    def total(fn):
        def of(*args):
            *args, ids, values, options = args
            value = fn(*args, Sparse(ids, values), **options)
            return jnp.sum(value * jnp.arange(1.0, N + 1)), value

        argnums = (*range(len(args)), len(args) + 1, len(args) + 2)
        return jax.jit(jax.value_and_grad(of, argnums, has_aux=True))

    want = total(whole)(*args, IDS, VALUES, options)
    NEAR(total(whole)(*placed, *labels, options), want)
    NEAR(total(shard(whole, mesh, batch="data", classes="model"))(*placed, *labels, options), want)


# -- what is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "values", "says"),
    [
        (IDS[:, 0], VALUES, r"labels.ids must have shape \(12, K\) with K at least 1, got \(12,\)"),
        (
            IDS[:5],
            VALUES[:5],
            r"labels.ids must have shape \(12, K\) with K at least 1, got \(5, 5\)",
        ),
        (IDS[:, :0], VALUES[:, :0], r"labels.ids must have shape \(12, K\) with K at least 1, got"),
        (IDS, VALUES[:, :2], r"labels.values must have shape \(12, 5\), got \(12, 2\)"),
        (VALUES, VALUES, "labels.ids must have an integer dtype, got float32"),
        (IDS, "abc", "labels.values must be an array, got 'abc'"),
    ],
)
def test_what_cannot_be_right_raises(ids, values, says):
    for loss in (sparse, HEAD):
        with pytest.raises((TypeError, ValueError), match=says):
            loss(LOGITS, ids, values)


def test_class_ids_have_a_function_of_their_own():
    with pytest.raises(TypeError, match="got a Sparse; pass it to softmax_cross_entropy"):
        INTEGER(LOGITS, Sparse(IDS, VALUES))
    with pytest.raises(
        TypeError, match="got a Teacher; only linear_softmax_cross_entropy takes one"
    ):
        DENSE(LOGITS, Teacher(HIDDEN, KERNEL))
    with pytest.raises(
        ValueError, match=r"labels.ids must have shape \(K,\) with K at least 1, got \(\)"
    ):
        DENSE(LOGITS[0], Sparse(1, 1.0))
    with pytest.raises(ValueError, match="ignore_index must be None"):
        HEAD(LOGITS, IDS, VALUES, ignore_index=3)
