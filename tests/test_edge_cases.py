"""The table of edge cases: one contract for both functions, all modes, value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import BOTH, DENSE, INTEGER, TOLERANCE, cotangents, covering, one_hot, rng

N, V = 8, 5
NAN, INF = np.nan, np.inf
LABELS = np.array([1, 4, 0, 2, 3, 1, 2, 4], np.int32)
HEALTHY = np.array([0, 3, 7])
ODD = np.array([1, 2, 4, 5, 6])
IGNORED = -100

# Options that are arithmetic around the rule, and those that smooth, and so take the other rule.
OPTIONS = {
    "plain": {},
    "options": {
        "z_loss": 0.1,
        "softcap": 4.0,
        "class_weights": np.array([0.0, 0.5, 1.0, 2.0, 1.5], np.float32),
    },
    "smoothing": {
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 4.0,
        "class_weights": np.array([0.0, 0.5, 1.0, 2.0, 1.5], np.float32),
    },
}
MODES = ("eager", "jit", "vmap", "forward_mode")


def logits_with(odd_rows=None):
    logits = rng(20).normal(size=(N, V)).astype(np.float32)
    if odd_rows is not None:
        logits[ODD] = odd_rows
    return logits


@functools.lru_cache
def runner(kind, options, mode, ignore_index=None):
    """A function of arrays to the losses [N], their mean, and all gradients of either."""
    static = dict(OPTIONS[options])
    if ignore_index is not None:
        static["ignore_index"] = ignore_index
    if mode == "forward_mode":
        static["forward_mode"] = True

    def run(logits, labels, where, weights):
        def losses(floats, rest, reduction):
            loss = functools.partial(BOTH[kind], reduction=reduction, **static)
            if mode != "vmap" or reduction != "none":
                return loss(**floats, **rest)
            return jax.vmap(lambda floats, rest: loss(**floats, **rest))(floats, rest)

        arguments = {"logits": logits, "labels": labels, "where": where, "weights": weights}
        arguments = {k: jnp.asarray(v) for k, v in arguments.items() if v is not None}
        floats = {k: v for k, v in arguments.items() if jnp.issubdtype(v.dtype, jnp.floating)}
        rest = {k: v for k, v in arguments.items() if k not in floats}
        results = {}
        for reduction in ("none", "mean"):
            value, pull = jax.vjp(functools.partial(losses, rest=rest, reduction=reduction), floats)
            g = cotangents(N) if reduction == "none" else 0.5
            results[reduction] = value, pull(jnp.asarray(g, value.dtype))[0]
        return results

    return run if mode == "eager" else jax.jit(run)


KINDS_OPTIONS_MODES = [
    *[(kind, options, "jit") for kind in BOTH for options in OPTIONS],
    *[(kind, "options", mode) for kind in BOTH for mode in ("vmap", "forward_mode")],
    ("integer", "plain", "eager"),
    ("integer", "smoothing", "vmap"),
    ("integer", "smoothing", "forward_mode"),
    ("dense", "plain", "forward_mode"),
]

# -- rows that do not count ----------------------------------------------------------------------

SPOILED = np.stack(
    [
        np.full(V, NAN),
        [0.0, NAN, 1.0, 2.0, 3.0],
        [INF, 0.0, -INF, 1.0, 2.0],
        np.full(V, -INF),
        np.full(V, INF),
    ]
).astype(np.float32)
REASONS = ("ignore_index", "weights", "where examples", "where classes")


def excluded(reason, kind):
    """The arguments that leave out the odd rows."""
    labels, where, weights = LABELS.copy(), None, None
    counts = np.isin(np.arange(N), HEALTHY)
    if reason == "ignore_index":
        labels[ODD] = IGNORED
    elif reason == "weights":
        weights = np.where(counts, np.linspace(0.5, 2, N), 0).astype(np.float32)
    elif reason == "where examples":
        where = counts
    else:
        where = np.repeat(counts[:, None], V, 1)
    if kind == "dense":
        labels = one_hot(labels, V)
    elif reason != "ignore_index":
        labels[ODD[:2]] = (-1, 99)  # a bad label does not count either
    return labels, where, weights


def has_reason(how, reason):
    return how[0] == "integer" or reason != "ignore_index"


@pytest.mark.parametrize(
    ("how", "reason"),
    covering(KINDS_OPTIONS_MODES, REASONS, strength=1, possible=has_reason),
    ids=str,
)
def test_what_does_not_count_adds_exactly_nothing(how, reason):
    kind, options, mode = how
    labels, where, weights = excluded(reason, kind)
    run = runner(kind, options, mode, IGNORED if reason == "ignore_index" else None)
    got = run(logits_with(SPOILED), labels, where, weights)
    same = run(logits_with(), labels, where, weights)
    np.testing.assert_array_equal(got["none"][0][ODD], 0.0)
    for reduction, (value, gradients) in got.items():
        np.testing.assert_allclose(value, same[reduction][0], rtol=TOLERANCE["rounded"])
        np.testing.assert_array_equal(gradients["logits"][ODD], 0.0, err_msg=reduction)
        for name, gradient in gradients.items():
            want = same[reduction][1][name]
            if name == "weights":  # its derivative at 0 is the loss, where that is finite
                gradient, want = gradient[HEALTHY], want[HEALTHY]
                assert np.isfinite(gradients[name]).all()
            np.testing.assert_allclose(gradient, want, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("reason", REASONS)
def test_a_mean_is_over_the_examples_that_count(reason):
    labels, where, weights = excluded(reason, "integer")
    ignore_index = IGNORED if reason == "ignore_index" else None
    got = INTEGER(
        logits_with(SPOILED),
        labels,
        where=where,
        weights=weights,
        ignore_index=ignore_index,
        reduction="mean",
    )
    healthy = INTEGER(logits_with()[HEALTHY], LABELS[HEALTHY])
    w = np.ones(3, np.float32) if weights is None else weights[HEALTHY]
    np.testing.assert_allclose(got, np.sum(healthy * w) / np.sum(w), rtol=TOLERANCE["rounded"])


# -- rows that are wrong -------------------------------------------------------------------------


def wrong(what):
    """Logits and labels of which the odd rows are NaN, and the same with nothing wrong."""
    logits, labels = logits_with(), LABELS.copy()
    if what == "label":
        labels[ODD] = (-1, V, -100, V + 99, np.iinfo(np.int32).max)
    else:
        logits[ODD] = SPOILED
    return logits, labels


@pytest.mark.parametrize("what", ["label", "logits"])
@pytest.mark.parametrize(("kind", "options", "mode"), KINDS_OPTIONS_MODES, ids=str)
def test_what_is_wrong_is_loud_in_its_own_row_alone(kind, options, mode, what):
    if kind == "dense" and what == "label":
        pytest.skip("a distribution names every class")
    logits, labels = wrong(what)
    odd = ODD
    if what == "logits" and options != "plain":
        odd = ODD[:2]  # a soft-cap makes numbers of infinities
        logits[ODD[2:]] = logits_with()[ODD[2:]]
    labels, fine = (x if kind == "integer" else one_hot(x, V) for x in (labels, LABELS))
    weights = np.ones(N, np.float32) if what == "logits" else None  # a weight excuses nothing
    run = runner(kind, options, mode)
    got, same = run(logits, labels, None, weights), run(logits_with(), fine, None, weights)
    others = np.setdiff1d(np.arange(N), odd)
    np.testing.assert_array_equal(got["none"][0][odd], NAN)
    np.testing.assert_allclose(got["none"][0][others], same["none"][0][others], rtol=1e-6)
    assert np.isnan(got["mean"][0])
    for reduction, (_, gradients) in got.items():
        np.testing.assert_array_equal(gradients["logits"][odd], NAN, err_msg=reduction)
        want = same[reduction][1]["logits"][others]
        if reduction == "mean" and "class_weights" in OPTIONS[options] and what == "label":
            # A bad label has no class weight to divide by: the others' gradients share one factor.
            got_others = gradients["logits"][others]
            assert np.isfinite(got_others).all()
            np.testing.assert_allclose(
                got_others / np.linalg.norm(got_others), want / np.linalg.norm(want), atol=1e-6
            )
        else:
            np.testing.assert_allclose(gradients["logits"][others], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_bad_label_is_loud_though_a_class_weighs_nothing(smoothing, forward_mode):
    for zero in (0, V - 1):
        class_weights = np.arange(V) != zero
        losses = INTEGER(
            logits_with()[:3],
            np.array([-1, V, 2], np.int32),
            class_weights=class_weights,
            label_smoothing=smoothing,
            forward_mode=forward_mode,
        )
        np.testing.assert_array_equal(np.isnan(losses), [True, True, False])


def test_the_first_label_that_is_no_class_is_loud_though_its_type_ends_there():
    labels = np.array([126, 127], np.int8)
    losses = INTEGER(np.zeros((2, 127), np.float32), labels, label_smoothing=0.1)
    np.testing.assert_array_equal(np.isnan(losses), [False, True])


# -- absent classes ------------------------------------------------------------------------------


def test_the_derivative_by_a_weight_of_zero_is_the_loss_though_its_class_is_absent_and_weighs_nothing():
    """Found by `test_properties.py`: the z-loss was left out."""
    z = np.array([[1.0, -INF]], np.float32)

    def loss(weight):
        return INTEGER(
            z, np.array([1]), weights=weight, class_weights=np.float32([1, 0]), z_loss=0.5
        ).sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.zeros(1)), [0.5])  # L is 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("how", ["-inf", "where"])
def test_an_absent_class_is_as_if_it_were_not_there(kind, how, mode):
    """A -inf logit, or one that `where` masks whatever it holds, where the label is elsewhere."""
    labels = np.where(LABELS == 2, 3, LABELS)
    logits, where = logits_with(), None
    if how == "-inf":
        logits[:, 2] = -INF
    else:
        logits[:, 2] = np.resize([NAN, INF, 3.0], N)
        where = np.broadcast_to(np.arange(V) != 2, (N, V))
    targets = labels if kind == "integer" else one_hot(labels, V)
    got = runner(kind, "plain", mode)(logits, targets, where, None)
    rest = [0, 1, 3, 4]
    labels = np.where(labels > 2, labels - 1, labels)
    targets = labels if kind == "integer" else one_hot(labels, V - 1)
    want = runner(kind, "plain", "jit")(logits[:, rest], targets, None, None)
    for reduction in got:
        np.testing.assert_allclose(got[reduction][0], want[reduction][0], rtol=1e-6)
        gradient = got[reduction][1]["logits"]
        np.testing.assert_array_equal(gradient[:, 2], 0.0)
        np.testing.assert_allclose(
            gradient[:, rest], want[reduction][1]["logits"], rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("how", ["-inf", "where"])
@pytest.mark.parametrize("kind", BOTH)
def test_an_absent_class_has_a_tangent_of_its_own_zero(kind, how):
    logits, where = logits_with(), None
    if how == "-inf":
        logits[:, 2] = -INF
    else:
        where = np.broadcast_to(np.arange(V) != 2, (N, V))
    labels = np.where(LABELS == 2, 3, LABELS)
    targets = labels if kind == "integer" else one_hot(labels, V)
    loss = functools.partial(BOTH[kind], labels=targets, where=where, forward_mode=True)
    direction = jnp.asarray(rng(21).normal(size=(N, V)), jnp.float32)
    _, tangent = jax.jvp(loss, (jnp.asarray(logits),), (direction,))
    gradient = jax.grad(lambda z: loss(z).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(tangent, np.sum(gradient * direction, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BOTH)
def test_a_label_of_logit_minus_infinity_costs_infinity_with_a_finite_gradient(kind, mode):
    logits = logits_with()
    logits[ODD, LABELS[ODD]] = -INF
    targets = LABELS if kind == "integer" else one_hot(LABELS, V)
    got = runner(kind, "plain", mode)(logits, targets, None, None)
    np.testing.assert_array_equal(got["none"][0][ODD], INF)
    assert np.isfinite(got["none"][0][HEALTHY]).all()
    want = cotangents(N)[:, None] * (jax.nn.softmax(logits) - one_hot(LABELS, V))
    np.testing.assert_allclose(got["none"][1]["logits"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_integer_label_on_a_masked_class_costs_infinity(smoothing, forward_mode):
    where = np.array([[True, False, True], [True, True, True]])
    logits = jnp.asarray(logits_with()[:2, :3])

    def loss(logits):
        return INTEGER(
            logits,
            np.array([1, 1], np.int32),
            where=where,
            label_smoothing=smoothing,
            forward_mode=forward_mode,
        )

    losses, pull = jax.vjp(loss, logits)
    np.testing.assert_array_equal(np.isposinf(losses), [True, False])
    assert np.isfinite(pull(jnp.ones(2))[0]).all()


def test_the_mass_of_a_distribution_on_a_masked_class_is_left_out():
    where = np.array([True, False, True])
    targets = np.array([0.5, 0.3, 0.2], np.float32)
    logits = logits_with()[0, :3]
    want = DENSE(logits[[0, 2]], targets[[0, 2]])
    np.testing.assert_allclose(DENSE(logits, targets, where=where), want, rtol=1e-6)
    by_labels = jax.grad(DENSE, 1)(logits, targets, where=where)
    assert by_labels[1] == 0.0
    assert np.all(by_labels[jnp.array([0, 2])] > 0)


@pytest.mark.parametrize("kind", BOTH)
def test_smoothing_over_a_logit_of_minus_infinity_costs_infinity(kind):
    logits = np.array([1.0, -INF, 0.0], np.float32)
    labels = np.int32(0) if kind == "integer" else one_hot(0, 3)
    assert BOTH[kind](logits, labels, label_smoothing=0.1) == INF
    finite = BOTH[kind](logits, labels, label_smoothing=0.1, where=np.array([True, False, True]))
    assert np.isfinite(finite)


@pytest.mark.parametrize("kind", BOTH)
def test_a_soft_cap_turns_minus_infinity_into_minus_the_cap(kind):
    logits, capped = np.array([1.0, -INF, 0.0]), np.array([2 * np.tanh(0.5), -2.0, 0.0])
    labels = np.int32(1) if kind == "integer" else one_hot(1, 3)
    got = BOTH[kind](logits.astype(np.float32), labels, softcap=2.0)
    want = np.log(np.sum(np.exp(capped))) + 2
    np.testing.assert_allclose(got, want, rtol=1e-6)
    gradient = jax.grad(BOTH[kind])(logits.astype(np.float32), labels, softcap=2.0)
    assert gradient[1] == 0.0
    assert np.isfinite(gradient).all()
    by_cap = jax.grad(lambda cap: BOTH[kind](logits.astype(np.float32), labels, softcap=cap))(2.0)
    slopes = np.array([np.tanh(0.5) - 0.5 / np.cosh(0.5) ** 2, -1.0, 0.0])  # of the capped logits
    want = np.sum(np.exp(capped) * slopes) / np.sum(np.exp(capped)) + 1
    np.testing.assert_allclose(by_cap, want, rtol=1e-6)


def test_the_cotangent_of_a_distribution_at_an_absent_class_is_infinite():
    logits = np.array([1.0, -INF, 0.0], np.float32)
    targets = np.array([0.5, 0.0, 0.5], np.float32)
    for forward_mode in (False, True):
        loss = functools.partial(DENSE, forward_mode=forward_mode)
        gradient = jax.grad(loss, 1)(logits, targets)
        assert gradient[1] == INF
        at_top = np.log1p(np.exp(-1))
        np.testing.assert_allclose(gradient[::2], [at_top, at_top + 1], rtol=1e-6)


@pytest.mark.parametrize("forward_mode", [False, True])
def test_an_absent_class_costs_nothing_without_a_weight_or_without_a_target(forward_mode):
    """And its derivative by the one of the two that is not zero is zero."""
    logits = np.array([1.0, -INF, 0.0], np.float32)

    def loss(targets, class_weights):
        return DENSE(logits, targets, class_weights=class_weights, forward_mode=forward_mode)

    some, none = jnp.array([0.5, 0.2, 0.3]), jnp.array([0.5, 0.0, 0.3])
    for arguments, want in (((some, none), (0.0, INF)), ((none, some), (INF, 0.0))):
        value, gradients = jax.value_and_grad(loss, (0, 1))(*arguments)
        assert np.isfinite(value)
        assert tuple(gradient[1] for gradient in gradients) == want


@pytest.mark.parametrize("how", ["-inf", "where", "nothing left"])
def test_options_have_finite_derivatives_where_classes_are_absent(how):
    logits, where = logits_with()[:2], np.ones((2, V), bool)
    if how == "-inf":
        logits[0, 2] = -INF
    else:
        where[0, 2 if how == "where" else slice(None)] = False
    scalars = {"z_loss": 0.1} if how == "-inf" else {"z_loss": 0.1, "label_smoothing": 0.1}
    options = {k: jnp.float32(v) for k, v in scalars.items()}
    options |= {"class_weights": jnp.linspace(0.5, 2, V), "weights": jnp.array([0.5, 2.0])}
    for kind in BOTH:
        for forward_mode in (False, True):
            labels = np.array([1, 3], np.int32)
            labels = labels if kind == "integer" else one_hot(labels, V)

            def loss(options, labels=labels, kind=kind, forward_mode=forward_mode):
                fn = functools.partial(BOTH[kind], forward_mode=forward_mode)
                return fn(logits, labels, where=where, reduction="sum", **options)

            for name, gradient in jax.grad(loss)(options).items():
                assert np.isfinite(gradient).all(), (kind, forward_mode, name)


# -- nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "kind", "forward_mode"),
    covering(
        [*REASONS, "class_weights", "cancelling weights", "no rows"],
        list(BOTH),
        [False, True],
        # A mean of distributions divides by weights alone.
        possible=lambda reason, kind, _: (
            kind == "integer" or reason not in ("ignore_index", "class_weights")
        ),
    ),
)
def test_a_mean_over_nothing_is_zero_with_a_gradient_of_zero(reason, kind, forward_mode):
    n = 0 if reason == "no rows" else 2
    logits, labels, options = logits_with()[:n], LABELS[:n], {}
    if reason == "ignore_index":
        labels, options = np.full(n, -1, np.int32), {"ignore_index": -1}
    elif reason == "weights":
        options = {"weights": np.zeros(n)}
    elif reason == "cancelling weights":
        options = {"weights": np.array([1.0, -1.0])}
    elif reason == "class_weights":
        options = {"class_weights": ~np.isin(np.arange(V), LABELS[:2])}
    elif reason == "where examples":
        options = {"where": np.zeros(n, bool)}
    elif reason == "where classes":
        options = {"where": np.zeros((n, V), bool)}
    if kind == "dense":
        labels = one_hot(labels, V)
    fn = functools.partial(
        BOTH[kind], reduction="mean", z_loss=0.1, forward_mode=forward_mode, **options
    )
    value, gradient = jax.value_and_grad(fn)(jnp.asarray(logits), labels)
    assert (value, value.dtype) == (0.0, jnp.float32)
    np.testing.assert_array_equal(gradient, np.zeros((n, V)))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("axis", [-1, 0, (0, -1)])
@pytest.mark.parametrize("v", [V, 1000, 1009])  # at once, in blocks, and in blocks and a rest
def test_no_rows_give_no_losses(kind, axis, v):
    shape = {-1: (0, 3, v), 0: (v, 3, 0), (0, -1): (v, 0, 2)}[axis]
    batch = (0,) if axis == (0, -1) else tuple(size for size in shape if size != v)
    labels = np.zeros(batch if kind == "integer" else shape, np.int32)
    losses, pull = jax.vjp(lambda z: BOTH[kind](z, labels, axis), jnp.zeros(shape))
    assert losses.shape == batch
    assert pull(losses)[0].shape == shape


@pytest.mark.parametrize("kind", BOTH)
def test_one_class_is_certain(kind):
    logits = jnp.array([[3.0], [-80.0], [1e8]])
    labels = np.zeros(3, np.int32) if kind == "integer" else np.ones((3, 1), np.float32)
    losses, pull = jax.vjp(lambda z: BOTH[kind](z, labels), logits)
    np.testing.assert_array_equal(losses, 0.0)
    np.testing.assert_array_equal(pull(jnp.array([1.0, 2.0, -1.0]))[0], 0.0)


@pytest.mark.parametrize("kind", BOTH)
def test_no_class_is_an_error(kind):
    labels = np.zeros(3, np.int32) if kind == "integer" else np.zeros((3, 0))
    with pytest.raises(ValueError, match=r"logits must have at least one class.*\(3, 0\)"):
        BOTH[kind](np.zeros((3, 0), np.float32), labels)


@pytest.mark.parametrize("kind", BOTH)
def test_options_apply_to_a_single_example(kind):
    labels = np.int32(2) if kind == "integer" else one_hot(2, V)
    got = BOTH[kind](logits_with()[0], labels, weights=2.0, where=True, reduction="mean")
    want = BOTH[kind](logits_with()[0], labels)
    np.testing.assert_allclose(got, want, rtol=1e-6)


# -- legal input makes no NaN on the way ---------------------------------------------------------

LEGAL = {
    "plain": ({}, None),
    "-inf elsewhere": ({}, "-inf"),
    "ignored": ({"ignore_index": 1}, None),
    "ignored, not a class": ({"ignore_index": -7}, "ignored"),
    "class mask": ({"where": "classes"}, None),
    "nothing left": ({"where": "nothing"}, None),
    "where": ({"where": "examples"}, None),
    "weights": ({"weights": np.array([0.0, 1, 2])}, None),
    "mean over nothing": ({"weights": np.zeros(3), "reduction": "mean"}, None),
    "label at -inf": ({}, "label at -inf"),
    "all": ({"where": "classes", "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0,
             "class_weights": np.ones(V), "reduction": "mean"}, None),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "kind", "forward_mode", "mode"),
    covering(
        list(LEGAL),
        list(BOTH),
        [False, True],
        ["eager", "jit"],
        possible=lambda case, kind, *_: kind == "integer" or "ignore_index" not in LEGAL[case][0],
    ),
)
def test_legal_input_passes_under_debug_nans(case, kind, forward_mode, mode):
    options, logits_case = LEGAL[case]
    options = dict(options)
    logits, labels = logits_with()[:3], np.array([1, 4, 3], np.int32)
    if logits_case == "-inf":
        logits[:, 2] = -INF
    if logits_case == "label at -inf":
        logits[0, 1] = -INF
    if logits_case == "ignored":
        labels[1] = -7
    if isinstance(options.get("where"), str):
        where = np.ones((3, V), bool)
        where[0, 2 if options["where"] == "classes" else slice(None)] = False
        options["where"] = where[:, 0] if options["where"] == "examples" else where
    labels = labels if kind == "integer" else one_hot(labels, V)
    fn = functools.partial(BOTH[kind], labels=labels, forward_mode=forward_mode, **options)
    run = jax.value_and_grad(lambda z: fn(z).sum())
    with jax.debug_nans(True):
        value, gradient = (run if mode == "eager" else jax.jit(run))(jnp.asarray(logits))
    assert not np.isnan(value)
    assert not np.isnan(gradient).any()
