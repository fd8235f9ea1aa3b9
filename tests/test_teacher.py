"""Labels that are another head's softmax: its cross-entropy and its divergence, exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from support import assert_close_to_largest, cotangents, covering, lax_rules, rng, wide
from ulps import families

from jax_sce import (
    Teacher,
    _cross_entropy,
    linear_softmax_cross_entropy as head,
    reference,
    shard,
)
from jax_sce._arguments import Options
from jax_sce._rows import Rows
from jax_sce._teacher import TeacherRows

N, D, T, V = 12, 4, 3, 16
INF, NAN = np.inf, np.nan
SHAPES = {"hidden": (N, D), "kernel": (D, V), "bias": (V,)}
STUDENT = {k: jnp.float32(rng(i).normal(size=s)) for i, (k, s) in enumerate(SHAPES.items())}
TEACHER = {
    "hidden": jnp.float32(rng(5).normal(size=(N, T))),
    "kernel": jnp.float32(rng(6).normal(size=(T, V))),
    "bias": jnp.float32(rng(7).normal(size=V)),
    "temperature": jnp.linspace(0.5, 2, N),
    "softcap": jnp.float32(3),
}
OPTIONS = {
    "temperature": jnp.linspace(2, 0.5, N),
    "softcap": jnp.float32(4),
    "weights": jnp.resize(jnp.array([1.0, 0.5, 0.0, 2.0]), N),
    "z_loss": jnp.float32(0.1),
}
NEAR = functools.partial(assert_close_to_largest, rtol=2e-6)


@lax_rules()
def naive(student, teacher, *, divergence=False, bias=None, **options):
    def logits(head):
        return head["hidden"] @ head["kernel"] + head.get("bias", 0)

    z = logits(teacher)
    if "softcap" in teacher:
        z = teacher["softcap"] * jnp.tanh(z / teacher["softcap"])
    if "temperature" in teacher:
        z = z / teacher["temperature"][:, None]
    log_p = jax.nn.log_softmax(z)
    losses = reference.softmax_cross_entropy(
        logits(student), jnp.exp(log_p), **options | {"reduction": "none"}
    )
    weights = options.get("weights", jnp.ones(N, losses.dtype))
    if divergence:
        losses += weights * jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    reduction = options.get("reduction", "none")
    return {
        "none": losses, "sum": jnp.sum(losses), "mean": jnp.sum(losses) / jnp.sum(weights)
    }[reduction]  # fmt: skip


def ours(student, teacher, *, divergence=False, fn=head, **options):
    labels = Teacher(**teacher, divergence=divergence)
    return fn(student["hidden"], student["kernel"], labels, bias=student["bias"], **options)


@pytest.mark.parametrize(
    ("forward_mode", "divergence", "reduction"),
    covering([False, True], [False, True], ["none", "mean", "sum"]),
)
def test_it_is_the_naive_formula(forward_mode, divergence, reduction, x64):
    args = jax.tree.map(lambda x: x.astype(jnp.float64), (STUDENT, TEACHER, OPTIONS))
    g = jnp.asarray(cotangents(N)) if reduction == "none" else 1.5

    @jax.jit
    def both(student, teacher, options):
        def pulled(fn, **more):
            fn = functools.partial(fn, reduction=reduction, divergence=divergence, **more)
            value, pull = jax.vjp(lambda s, o: fn(s, teacher, **o), student, options)
            return value, pull(jnp.broadcast_to(g, value.shape))

        return pulled(ours, forward_mode=forward_mode, chunk_size=5), pulled(naive)

    assert_close_to_largest(*both(*args), rtol=1e-12)


def test_the_cross_entropy_is_the_default():
    hidden, kernel = TEACHER["hidden"], TEACHER["kernel"]
    default, asked = (
        head(STUDENT["hidden"], STUDENT["kernel"], labels)
        for labels in (Teacher(hidden, kernel), Teacher(hidden, kernel, divergence=False))
    )
    np.testing.assert_array_equal(default, asked)


def test_it_is_a_constant(x64):
    student, teacher = jax.tree.map(lambda x: x.astype(jnp.float64), (STUDENT, TEACHER))
    for forward_mode in (False, True):
        fn = functools.partial(ours, reduction="mean", forward_mode=forward_mode)
        jax.tree.map(
            lambda x: np.testing.assert_array_equal(x, 0), jax.grad(fn, 1)(student, teacher)
        )
    dots = jax.tree.map(jnp.zeros_like, student), teacher
    assert jax.jvp(fn, (student, teacher), dots)[1] == 0


def test_the_aux_has_its_entropy():
    (loss, aux), divergence = jax.jit(
        lambda: (
            ours(STUDENT, TEACHER, return_aux=True),
            ours(STUDENT, TEACHER, divergence=True),
        )
    )()
    np.testing.assert_allclose(loss - aux.teacher_entropy, divergence, rtol=1e-5)
    assert aux.rank is None

    def total(student):
        loss, aux = ours(student, TEACHER, return_aux=True, reduction="mean")
        return loss + jnp.sum(aux.entropy) + jnp.sum(aux.teacher_entropy)

    @lax_rules()
    def naive_total(student):
        log_o = jax.nn.log_softmax(student["hidden"] @ student["kernel"] + student["bias"])
        return naive(student, TEACHER, reduction="mean") - jnp.sum(jnp.exp(log_o) * log_o)

    NEAR(*jax.jit(lambda x: (jax.grad(total)(x), jax.grad(naive_total)(x)))(STUDENT))


# -- rows of given logits -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="divergence")
def with_logits(z, of_teacher, weights=None, *, divergence=True):
    """The losses, and their gradient by the logits."""
    labels = TeacherRows(Rows(of_teacher, (-1,)), divergence)

    def total(z):
        losses = _cross_entropy.losses(Rows(z, (-1,)), labels, Options(weights=weights)).loss
        return jnp.sum(losses), losses

    (_, losses), by_logits = jax.value_and_grad(total, has_aux=True)(z)
    return losses, by_logits


# -- accuracy -----------------------------------------------------------------------------------------


def exact_divergence(z, of_teacher):
    """KL and its derivative, in long double, without the terms that cancel."""

    def log_softmax(x):
        d = x.astype(np.longdouble) - x.max(-1, keepdims=True)
        is_first = np.arange(x.shape[-1]) == x.argmax(-1)[:, None]
        return d - np.log1p(np.where(is_first, 0, np.exp(d)).sum(-1, keepdims=True))

    with np.errstate(invalid="ignore", over="ignore"):
        log_o, log_t = log_softmax(z), log_softmax(of_teacher)
        o, t = np.exp(log_o), np.exp(log_t)
        r = np.where(t == 0, 0, log_t - log_o)
        gap = np.where(t == 0, o, t * (np.expm1(-r) + r))
        return gap.sum(-1), np.where(t == 0, o, t * np.expm1(-r))


# Of a row whose teacher differs by `apart` in each logit.
@pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("v", [3, 1000])
def test_it_is_accurate_to_its_own_size(v, apart):
    """1e-6 of the divergence, though at 1e-4 apart it is some 1e-9 of the cross-entropy; and of each
    element of the gradient as many roundings as its distances have."""
    r = np.random.default_rng(0)
    n = 64
    for name, z in families(r, n, v).items():
        z = z.astype(np.float32)
        with np.errstate(invalid="ignore"):
            of_teacher = (z + apart * r.normal(size=z.shape)).astype(np.float32)
        losses, by_logits = with_logits(z, of_teacher)
        want, by_exact = exact_divergence(z, of_teacher)
        finite = np.isfinite(want) & (want > 1e-30)
        np.testing.assert_allclose(losses[finite], want[finite], rtol=1e-6, err_msg=name)
        size = np.abs(by_exact).max(-1, keepdims=True)
        off = np.abs(np.asarray(by_logits, np.longdouble) - by_exact)
        assert np.all(off <= 3e-6 * size + 8 * np.finfo(np.longdouble).eps), name


def test_where_they_agree_it_is_nothing():
    labels = Teacher(STUDENT["hidden"], STUDENT["kernel"], divergence=True)
    value, gradient = jax.value_and_grad(lambda k: jnp.sum(head(STUDENT["hidden"], k, labels)))(
        STUDENT["kernel"]
    )
    assert value < 1e-12
    np.testing.assert_allclose(gradient, 0, atol=1e-6 * np.abs(STUDENT["hidden"]).max())


# -- edge cases ---------------------------------------------------------------------------------------


def test_absent_classes():
    z, of_teacher = rng(8).normal(size=(2, 3, 5)).astype(np.float32)
    is_absent = np.arange(5) == 2
    both = with_logits(*(np.where(is_absent, np.float32(-INF), x) for x in (z, of_teacher)))
    without = with_logits(*(np.delete(x, 2, axis=1) for x in (z, of_teacher)))
    np.testing.assert_allclose(both[0], without[0], rtol=1e-6)
    np.testing.assert_allclose(np.delete(both[1], 2, axis=1), without[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(both[1][:, 2], 0)

    of_teacher[:, 2] = -INF  # the teacher never says it
    log_o, log_t = (np.asarray(jax.nn.log_softmax(x)) for x in (z, of_teacher))
    losses, by_logits = with_logits(z, of_teacher)
    terms = np.exp(log_t) * np.where(np.isneginf(of_teacher), 0, log_t - log_o)
    np.testing.assert_allclose(losses, terms.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(by_logits, np.exp(log_o) - np.exp(log_t), rtol=1e-5, atol=1e-6)

    losses, by_logits = with_logits(of_teacher, z)  # the student never says it
    np.testing.assert_array_equal(losses, INF)
    assert np.isfinite(by_logits).all()


@pytest.mark.parametrize("divergence", [False, True])
def test_bad_rows_are_loud_alone_and_who_does_not_count_is_silent(divergence):
    z, of_teacher = rng(9).normal(size=(2, 6, 5)).astype(np.float32)
    for rows, bad in ((z, NAN), (of_teacher, NAN), (z, INF), (of_teacher, INF)):
        spoilt = [np.array(x) for x in (z, of_teacher)]
        spoilt[0 if rows is z else 1][2, 1] = bad
        losses, by_logits = with_logits(*spoilt, divergence=divergence)
        want = with_logits(z, of_teacher, divergence=divergence)
        others = np.arange(6) != 2
        assert np.isnan(losses[2])
        assert np.isnan(by_logits[2]).any()
        np.testing.assert_array_equal(losses[others], want[0][others])
        np.testing.assert_array_equal(by_logits[others], want[1][others])
        weights = jnp.asarray(others, jnp.float32)
        losses, by_logits = with_logits(*spoilt, weights, divergence=divergence)
        assert losses[2] == 0
        assert not by_logits[2].any()
        assert np.isfinite(losses).all()
        assert np.isfinite(by_logits).all()


def test_one_class_and_no_examples():
    losses, by_logits = with_logits(jnp.ones((2, 1)), jnp.ones((2, 1)))
    assert not losses.any()
    assert not by_logits.any()
    nobody = head(jnp.ones((0, 2)), jnp.ones((2, 3)), Teacher(jnp.ones((0, 1)), jnp.ones((1, 3))))
    assert nobody.shape == (0,)


def test_examples_of_any_rank():
    own = {"hidden": TEACHER["hidden"], "temperature": TEACHER["temperature"]}

    @jax.jit
    def losses():
        def of(change):
            student = STUDENT | {"hidden": change(STUDENT["hidden"])}
            return ours(student, TEACHER | jax.tree.map(change, own))

        return [of(x) for x in (jnp.array, lambda x: x.reshape(2, 6, *x.shape[1:]), lambda x: x[0])]

    want, of_rank_2, of_rank_0 = losses()
    NEAR(of_rank_2, want.reshape(2, 6))
    NEAR(of_rank_0, want[0])


# -- types, transformations, devices ------------------------------------------------------------------


def test_16_bit_heads_are_computed_in_float32():
    student, teacher = (
        {k: x.astype(jnp.bfloat16) for k, x in head.items() if k != "temperature"}
        for head in (STUDENT, TEACHER)
    )
    got = ours(student, teacher, divergence=True)
    wider = jax.tree.map(lambda x: jnp.asarray(wide(x), jnp.float32), (student, teacher))
    np.testing.assert_allclose(got, naive(*wider, divergence=True), rtol=1e-5, atol=1e-6)
    assert got.dtype == jnp.float32
    gradient = jax.grad(lambda s: ours(s, teacher, reduction="mean"))(student)
    assert gradient["kernel"].dtype == jnp.bfloat16


def test_vmap_over_students(x64):
    students = jax.tree.map(lambda x: jnp.stack([x, 2 * x]).astype(jnp.float64), STUDENT)
    teacher = jax.tree.map(lambda x: x.astype(jnp.float64), TEACHER)
    got, want = (
        jax.jit(jax.vmap(functools.partial(fn, teacher=teacher, reduction="mean")))(students)
        for fn in (ours, naive)
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_second_derivatives(x64):
    student, teacher = jax.tree.map(lambda x: x.astype(jnp.float64), (STUDENT, TEACHER))

    def second(fn, **options):
        fn = functools.partial(fn, divergence=True, softcap=3.0, **options)

        def first(kernel):
            gradient = jax.grad(lambda k: jnp.sum(fn(student | {"kernel": k}, teacher) ** 2))(
                kernel
            )
            return jnp.sum(gradient**3)

        return jax.jit(jax.grad(first))(student["kernel"])

    assert_close_to_largest(second(ours), second(naive), rtol=1e-11)


@pytest.mark.parametrize("how", ["jit", "shard", "explicit"])
def test_over_devices(how):
    axis_type = AxisType.Explicit if how == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"hidden": P("data"), "kernel": P(None, "model"), "bias": P("model")}

    def placed(arrays):
        specs_of = {"temperature": P("data"), "weights": P("data")} | specs
        on = {k: NamedSharding(mesh, specs_of.get(k, P())) for k in arrays}
        return {k: jax.device_put(x, on[k]) for k, x in arrays.items()}

    fn = head if how == "jit" else shard(head, mesh, batch="data", classes="model")
    options = {"divergence": True, "reduction": "mean"}

    def step(fn):
        def of(student, teacher, arrays):
            return ours(student, teacher, fn=fn, **options, **arrays)

        return jax.jit(jax.value_and_grad(of))

    want = step(head)(STUDENT, TEACHER, OPTIONS)
    NEAR(step(fn)(*map(placed, (STUDENT, TEACHER, OPTIONS))), want)


def test_classes_that_do_not_divide_evenly():
    """Plain jit pads the last device's part; that is no class of either head."""
    mesh = jax.make_mesh((1, 8), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    cut = {"kernel": (slice(None), slice(13)), "bias": slice(13)}

    def short(arrays):
        return {k: x[cut[k]] if k in cut else x for k, x in arrays.items()}

    @jax.jit
    def step(student, teacher):
        student["kernel"], teacher["kernel"] = (
            jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, "model")))
            for x in (student["kernel"], teacher["kernel"])
        )
        return jax.value_and_grad(lambda s: ours(s, teacher, reduction="sum"))(student)

    student, teacher = short(STUDENT), short(TEACHER)
    want = jax.value_and_grad(lambda s: ours(s, teacher, reduction="sum"))(student)
    NEAR(step(dict(student), dict(teacher)), want)


# -- what is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"hidden": jnp.ones((N + 1, T))},
            r"labels.hidden must have shape \(12, T\), got \(13, 3\)",
        ),
        (
            {"kernel": jnp.ones((T, V + 1))},
            r"labels.kernel must have shape \(3, 16\), got \(3, 17\)",
        ),
        ({"bias": jnp.ones(3)}, r"labels.bias must have shape \(16,\), got \(3,\)"),
        ({"temperature": 0.0}, r"labels.temperature must lie in \(0, inf\), got 0.0"),
        ({"softcap": -1.0}, r"labels.softcap must lie in \(0, inf\), got -1.0"),
        ({"kernel": "x"}, "labels.kernel must be an array, got 'x'"),
        ({"divergence": 1.0}, "labels.divergence must be True or False, got 1.0"),
    ],
)
def test_what_cannot_be_right_raises(changed, says):
    labels = {**TEACHER, "divergence": False} | changed
    with pytest.raises((TypeError, ValueError), match=says):
        head(STUDENT["hidden"], STUDENT["kernel"], Teacher(**labels))


def test_options_of_other_labels_raise():
    for options in ({"label_smoothing": 0.1}, {"class_weights": np.ones(V)}, {"ignore_index": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ours(STUDENT, TEACHER, **options)
