"""The head whose logits never exist: it gives what the naive head gives, in less memory."""

import contextlib
import functools
import math
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from support import (
    TOLERANCE,
    cotangents,
    covering,
    derivatives,
    lax_rules,
    one_hot,
    rng,
    wide,
)

from jax_sce import (
    CrossEntropyAux,
    _backend,
    _chunks,
    _cpu,
    _head,
    _partition,
    linear_softmax_cross_entropy as head,
    reference,
)

NAN, INF = np.nan, np.inf
IGNORED = -100

# Sums of D, N or V terms in another order than the naive head's, in float64: a few units of 2^-52 times
# the square root of their number, 4099 at most, and a factor ten for what cancels in a gradient.
EXACT = 1e-12


@lax_rules()
def naive(hidden, kernel, labels, *, bias=None, **options):
    """All the logits, then the specification."""
    dtype = jnp.promote_types(jnp.promote_types(hidden.dtype, kernel.dtype), jnp.float32)
    logits = jnp.matmul(hidden, kernel, preferred_element_type=dtype)
    logits = logits if bias is None else logits + bias.astype(dtype)
    if labels.ndim < hidden.ndim:
        return reference.softmax_cross_entropy_with_integer_labels(logits, labels, **options)
    return reference.softmax_cross_entropy(logits, labels, **options)


def arrays(n, d, v, dtype=np.float64, kind="integer", seed=0, **more):
    """Arguments by name. The logits are small, so that a class too many would count."""
    r = rng(seed)
    batch = n if isinstance(n, tuple) else (n,)
    arguments = {
        "hidden": r.normal(size=(*batch, d)),
        "kernel": r.normal(size=(d, v)) / math.sqrt(d),
        "bias": r.normal(size=v) / 4,
    } | more
    arguments = {k: jnp.asarray(x, dtype) for k, x in arguments.items() if x is not None}
    labels = r.integers(0, v, batch, dtype=np.int32)
    if kind == "dense":  # the sums are not one
        labels = jnp.asarray(r.random((*batch, v)) * 4 / v, dtype)
    return arguments | {"labels": jnp.asarray(labels)}


def both(arguments, cotangent, reduction="none", chunk_size=None, **static):
    """Value and cotangents, ours and the naive head's, of one compilation."""

    @jax.jit
    def run(arguments):
        ours = functools.partial(head, reduction=reduction, chunk_size=chunk_size, **static)
        want = derivatives(
            functools.partial(naive, reduction=reduction, **static), arguments, cotangent
        )
        return derivatives(ours, arguments, cotangent), want

    return run(arguments)


@functools.lru_cache
def specified(**static):
    """Compiled: arguments and cotangent to the naive head's value and cotangents."""
    return jax.jit(functools.partial(derivatives, functools.partial(naive, **static)))


def assert_close(got, want, rtol=EXACT):
    """Relative to the largest of each array: of what cancels, no digits are left in either."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.shape == y.shape
        scale = np.max(np.abs(wide(y)), initial=0.0)
        np.testing.assert_allclose(
            wide(x), wide(y), rtol=rtol, atol=rtol * scale, err_msg=jax.tree_util.keystr(path)
        )


def cotangent_for(reduction, n):
    return cotangents(n) if reduction == "none" else -1.5


# -- the naive head --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "v", "chunk_size", "reduction"),
    [
        (1, 1, 1, None, "mean"),
        (7, 8, 2, 3, "none"),
        (64, 33, 37, 16, "sum"),  # divides
        (130, 1, 37, 1, "mean"),
        (130, 8, 1000, 1000, "none"),  # more than there are
        (130, 33, 2049, 50, "none"),  # from here in tiles of classes on CPU
        (7, 8, 2049, 4, "sum"),
        (64, 8, 4099, None, "mean"),
    ],
)
def test_value_and_gradients_are_the_naive_heads(n, d, v, chunk_size, reduction, x64):
    got, want = both(arrays(n, d, v), cotangent_for(reduction, n), reduction, chunk_size)
    assert_close(got, want)
    assert got[0].shape == ((n,) if reduction == "none" else ())


def in_float64(arguments, g, reduction):
    """Of the same numbers."""
    with jax.enable_x64(True):
        exact = {k: jnp.asarray(wide(x)) if k != "labels" else x for k, x in arguments.items()}
        return jax.tree.map(np.asarray, specified(reduction=reduction)(exact, g))


@pytest.mark.parametrize(("v", "reduction"), [(37, "none"), (2049, "mean")])
def test_float32_is_as_exact_as_float32(v, reduction):
    """2e-5: sums of up to 2049 terms, each rounded to 2^-24, in whichever order."""
    n = 130
    arguments = arrays(n, 33, v, np.float32)
    g = cotangent_for(reduction, n)

    ours = functools.partial(head, reduction=reduction, chunk_size=48)
    got = jax.jit(functools.partial(derivatives, ours))(arguments, g)
    want = in_float64(arguments, g, reduction)
    assert_close(got, want, rtol=2e-5)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)  # a loss does not cancel
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("v", "reduction"), [(37, "none"), (2049, "mean")])
def test_bfloat16_is_no_worse_than_whole_logits_in_float32(v, reduction):
    n = 130
    arguments = arrays(n, 33, v, jnp.bfloat16)
    g = cotangent_for(reduction, n)

    got, whole = both(arguments, g, reduction, chunk_size=48)
    assert got[0].dtype == jnp.float32
    assert {x.dtype for x in got[1].values()} == {jnp.dtype(jnp.bfloat16)}
    value, gradients = in_float64(arguments, g, reduction)
    np.testing.assert_allclose(got[0], value, rtol=2e-6)  # products of 16-bit numbers are exact
    for name, want in gradients.items():
        error, allowed = (
            np.linalg.norm(wide(x[1][name]) - want) / np.linalg.norm(want) for x in (got, whole)
        )
        assert error <= 1.5 * allowed + 2.0**-10, name  # half a rounding of the logits' cotangent


# -- options ---------------------------------------------------------------------------------------

N, D, V = 7, 3, 5


def options_of(names):
    """Arrays, which are differentiated, and what is static."""
    r = rng(60)
    every = {
        "bias": r.normal(size=V),
        "label_smoothing": 0.1,
        "class_weights": np.array([0.0, 0.5, 1.0, 2.0, 1.5]),
        "weights": np.array([0.0, 1.0, 0.5, 2.0, -1.0, 0.25, 3.0]),
        "z_loss": 0.1,
        "softcap": 1.5,
        "temperature": np.array([0.5, 1.0, 2.0, 0.25, 1.5, 3.0, 0.7]),
    }
    static = {"ignore_index": 1} if "ignore_index" in names else {}
    return {k: x if k in names else None for k, x in every.items()}, static


OPTIONS = (
    "bias",
    "ignore_index",
    "label_smoothing",
    "class_weights",
    "weights",
    "z_loss",
    "softcap",
    "temperature",
)
# Seven lines through seven points (the Fano plane): every pair of these lies on one of them.
LINES = [
    tuple(OPTIONS[i] for i in line)
    for line in ((0, 1, 2), (0, 3, 4), (0, 5, 6), (1, 3, 5), (1, 4, 6), (2, 3, 6), (2, 4, 5))
]
LINES += [("temperature", *OPTIONS[:-1][i : i + 3]) for i in (0, 3, 6)]


def check_options(names, kind, reduction):
    more, static = options_of(names)
    arguments = arrays(N, D, V, kind=kind, seed=61, **more)
    if "ignore_index" in names:
        arguments["labels"] = arguments["labels"].at[2:4].set(static["ignore_index"])
    got, want = both(arguments, cotangent_for(reduction, N), reduction, chunk_size=3, **static)
    assert_close(got, want)
    assert set(got[1]) >= {"hidden", "kernel"} | (set(names) - {"ignore_index"})
    assert ("labels" in got[1]) == (kind == "dense")


@pytest.mark.thorough
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_alone(option, x64):
    check_options((option,), "integer", "sum")


# And of six options, in fours: without `ignore_index`, which distributions have not.
FOURS = [
    tuple(name for i, name in enumerate(o for o in OPTIONS if o != "ignore_index") if i // 2 != gap)
    for gap in range(3)
]


@pytest.mark.parametrize(
    ("kind", "names"),
    [("integer", names) for names in LINES] + [("dense", names) for names in FOURS],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_every_pair_of_options(kind, names, x64):
    check_options(names, kind, "mean")


@pytest.mark.parametrize("kind", ["integer", "dense"])
def test_all_options_one_by_one(kind, x64):
    names = OPTIONS if kind == "integer" else [name for name in OPTIONS if name != "ignore_index"]
    check_options(names, kind, "none")


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "kind"), [((2, 3), "dense"), ((), "integer")])
def test_examples_of_any_rank(shape, kind, x64):
    arguments = arrays(shape, D, V, kind=kind, weights=rng(62).random(shape))
    got, want = both(arguments, cotangents(shape), chunk_size=4)
    assert got[0].shape == shape
    assert_close(got, want)


@pytest.mark.parametrize("ignore_index", [None, 1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_examples(reduction, ignore_index):
    arguments = arrays((0, 3), D, V, np.float32)
    fn = functools.partial(head, reduction=reduction, return_aux=True, ignore_index=ignore_index)
    (loss, aux), pull = jax.vjp(
        lambda h, k: fn(h, k, arguments["labels"]), arguments["hidden"], arguments["kernel"]
    )
    assert loss.shape == ((0, 3) if reduction == "none" else ())
    assert np.sum(loss) == 0.0
    assert {x.shape for x in jax.tree.leaves(aux)} == {(0, 3)}
    of_hidden, of_kernel = pull((jnp.ones_like(loss), jax.tree.map(no_cotangent, aux)))
    assert of_hidden.shape == (0, 3, D)
    np.testing.assert_array_equal(of_kernel, np.zeros((D, V)))


def no_cotangent(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros_like(x) if floating else np.zeros(x.shape, jax.dtypes.float0)


def test_one_class_is_certain():
    hidden, kernel = jnp.array([[3.0], [-80.0]]), jnp.ones((1, 1))
    value, gradients = jax.value_and_grad(head, (0, 1))(
        hidden, kernel, np.zeros(2, int), reduction="sum"
    )
    assert value == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


# -- the auxiliary output --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["integer", "dense"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_both_outputs_are_differentiated(reduction, kind, x64):
    """With cotangents of each output, and of both; the z-loss of a user is one of them."""
    arguments = arrays(N, D, V, kind=kind, weights=np.array([0.5, 1, 2, 0, 1, 1, 3]))
    floats = {k: x for k, x in arguments.items() if x.dtype == jnp.float64}
    rest = {k: x for k, x in arguments.items() if k not in floats}

    def ours(floats):
        loss, aux = head(
            **floats, **rest, reduction=reduction, return_aux=True, chunk_size=3, softcap=2.0
        )
        return loss, aux.log_normalizer

    def want(floats):
        with lax_rules():
            logits = floats["hidden"] @ floats["kernel"] + floats["bias"]
        normalizer = jax.nn.logsumexp(2 * jnp.tanh(logits / 2), axis=-1)
        loss = naive(**floats, **rest, reduction=reduction, softcap=2.0)
        return loss, jnp.where(floats["weights"] != 0, normalizer, 0)

    @jax.jit
    def run(floats, g):
        return tuple((y := jax.vjp(fn, floats))[0] + y[1](g) for fn in (ours, want))

    shape = N if reduction == "none" else ()
    g_loss, g_normalizer = jnp.asarray(cotangents(shape)), jnp.asarray(cotangents(N)[::-1])
    for g in ((g_loss, g_normalizer), (0 * g_loss, g_normalizer), (g_loss, 0 * g_normalizer)):
        got, expected = run(floats, g)
        # The normalizer of an example of weight 0 is 0, whatever its hidden state.
        assert_close(got, expected)


def test_predictions_go_to_the_lowest_of_ties_and_zero_and_minus_one_to_who_does_not_count():
    hidden = np.array([[1, 0], [0, 1], [1, 1], [-1, 0], [NAN, 1], [0, 0]], np.float32)
    kernel = np.array([[0, 2, 2, 1], [3, 0, 1, 3]], np.float32)  # integers: ties are ties
    labels = np.array([0, 1, IGNORED, 3, 1, 2], np.int32)
    weights = np.array([1, 1, 1, 2, 0, 1], np.float32)
    want = np.array([1, 0, -1, 0, -1, 0])
    counts = want >= 0
    static = {"ignore_index": IGNORED, "return_aux": True, "chunk_size": 4}
    _, aux = jax.jit(functools.partial(head, **static))(hidden, kernel, labels, weights=weights)
    assert isinstance(aux, CrossEntropyAux)
    assert (aux.log_normalizer.dtype, aux.prediction.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_array_equal(aux.prediction, want)
    normalizer = np.log(np.sum(np.exp(hidden @ kernel), -1))
    np.testing.assert_allclose(aux.log_normalizer[counts], normalizer[counts], rtol=1e-6)
    np.testing.assert_array_equal(aux.log_normalizer[~counts], 0.0)


# -- inside a larger loss --------------------------------------------------------------------------


def test_gradients_are_scaled_and_added_to_others(x64):
    """And are the same where only one of the arguments is differentiated."""
    arguments = arrays(N, D, V, bias=None)
    labels = arguments["labels"]

    def total(loss, hidden, kernel):
        scale = 1.0 + jnp.sum(jnp.tanh(kernel))
        return -2.5 * scale * loss(hidden, kernel, labels, reduction="mean") + jnp.sum(hidden**2)

    ours = functools.partial(total, functools.partial(head, chunk_size=3))

    @jax.jit
    def run(*at):
        return (
            jax.grad(ours, (0, 1))(*at),
            (jax.grad(ours, 0)(*at), jax.grad(ours, 1)(*at)),
            jax.grad(functools.partial(total, naive), (0, 1))(*at),
        )

    got, alone, want = run(arguments["hidden"], arguments["kernel"])
    assert_close(got, want)
    assert_close(alone, want)


# -- the dtype and precision of the products -------------------------------------------------------

MIXED = {"hidden": jnp.bfloat16, "kernel": jnp.float32}


@pytest.mark.parametrize(
    ("reduction", "forward_mode"), covering(["none", "mean"], [False, True], strength=1)
)
def test_a_wide_kernel_is_rounded_for_the_products_and_its_gradient_is_not(reduction, forward_mode):
    """Under strict promotion, which two dtypes would break without `dtype`."""
    n = 23
    given = arrays(n, 16, 37, np.float32)
    given = {k: x.astype(MIXED.get(k, x.dtype)) for k, x in given.items()}
    loss = functools.partial(head, reduction=reduction, chunk_size=8, forward_mode=forward_mode)
    g = cotangent_for(reduction, n)
    mixed = jax.jit(functools.partial(derivatives, functools.partial(loss, dtype=jnp.bfloat16)))
    value, got = mixed(given, g)
    narrow = given | {"kernel": given["kernel"].astype(jnp.bfloat16)}
    same, rounded = jax.jit(functools.partial(derivatives, loss))(narrow, g)
    np.testing.assert_array_equal(value, same)
    assert {k: x.dtype for k, x in got.items()} == {k: given[k].dtype for k in got}
    assert np.any(wide(got["kernel"]) != wide(got["kernel"].astype(jnp.bfloat16)))
    for name, tolerance in (("hidden", 0), ("kernel", 2.0**-8), ("bias", 0)):
        assert_close(got[name], rounded[name].astype(got[name].dtype), rtol=tolerance)


def test_a_narrow_head_is_widened_if_asked_for():
    given = {k: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
             for k, x in arrays(9, 16, 37, np.float32).items()}  # fmt: skip
    value, got = derivatives(functools.partial(head, dtype="float32"), given, cotangents(9))
    wider = {k: x.astype(jnp.float32) for k, x in given.items() if k != "labels"}
    want, gradients = derivatives(head, given | wider, cotangents(9))
    np.testing.assert_array_equal(value, want)
    for name, x in got.items():
        np.testing.assert_array_equal(x, gradients[name].astype(jnp.bfloat16))


@pytest.mark.parametrize("precision", ["highest", jax.lax.Precision.HIGH, "BF16_BF16_F32"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_every_product_has_the_precision(precision, reduction, platform):
    given = arrays(8, 4, 3000, np.float32)

    def step(hidden, kernel):
        options = {"reduction": reduction, "precision": precision}
        return jnp.sum(head(hidden, kernel, given["labels"], **options))

    traced = jax.jit(jax.value_and_grad(step, (0, 1))).trace(given["hidden"], given["kernel"])
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    alone = jax.jit(functools.partial(jnp.dot, precision=precision))
    told = alone.lower(given["hidden"], given["kernel"]).as_text()
    expected = re.findall(r"(?:precision = \[.*?\]|algorithm = <.*?>)", told)
    assert expected
    assert len(products) >= 3
    assert all(x in line for line in products for x in expected)


# -- edge cases ------------------------------------------------------------------------------------

ODD, HEALTHY = np.array([1, 2, 4, 5]), np.array([0, 3, 6])
SPOILED = np.array([[NAN] * D, [0, INF, 1], [-INF] * D, [INF, -INF, NAN]])


@functools.lru_cache
def runner(differentiated=("hidden", "kernel", "bias"), **static):
    """A compiled function of arrays to (losses, gradients) and (mean, gradients)."""

    @jax.jit
    def run(arguments):
        moving = {k: x for k, x in arguments.items() if k in differentiated}
        rest = {k: x for k, x in arguments.items() if k not in moving}
        results = {}
        for reduction in ("none", "mean"):
            loss = functools.partial(head, reduction=reduction, chunk_size=3, **static)
            value, pull = jax.vjp(lambda moving, loss=loss: loss(**moving, **rest), moving)
            g = cotangents(N) if reduction == "none" else 0.5
            results[reduction] = value, pull(jnp.asarray(g, value.dtype))[0]
        return results

    return run


ALL = ("hidden", "kernel", "bias", "weights")
WEIGHTS = np.linspace(0.5, 2, N)
RUNNERS = {
    "reverse": {"ignore_index": IGNORED},
    "weights too": {"ignore_index": IGNORED, "differentiated": ALL, "z_loss": 0.1},
    "forward_mode": {"ignore_index": IGNORED, "differentiated": ALL, "forward_mode": True},
}


@pytest.mark.parametrize("name", RUNNERS)
def test_what_does_not_count_adds_exactly_nothing(name, x64):
    run = runner(**RUNNERS[name])
    z_loss = RUNNERS[name].get("z_loss", 0.0)
    for reason in ("ignore_index", "weights"):
        arguments = arrays(N, D, V, weights=WEIGHTS, seed=63)
        if reason == "ignore_index":
            arguments["labels"] = arguments["labels"].at[ODD].set(IGNORED)
        else:
            arguments["weights"] = arguments["weights"].at[ODD].set(0.0)
            arguments["labels"] = (
                arguments["labels"].at[ODD[:2]].set(jnp.array([-1, V + 99], jnp.int32))
            )
        healthy = {
            k: x[HEALTHY] if k in ("hidden", "labels", "weights") else x
            for k, x in arguments.items()
        }
        spoiled = arguments | {"hidden": arguments["hidden"].at[ODD].set(SPOILED)}
        for given in (spoiled, arguments):
            for reduction, (value, gradients) in run(given).items():
                g = cotangents(N)[HEALTHY] if reduction == "none" else 0.5
                want_value, want = specified(reduction=reduction, z_loss=z_loss)(healthy, g)
                if reduction == "none":
                    np.testing.assert_array_equal(value[ODD], 0.0)
                    value = value[HEALTHY]
                assert_close(value, want_value)
                np.testing.assert_array_equal(gradients["hidden"][ODD], 0.0)
                assert_close(gradients["hidden"][HEALTHY], want["hidden"])
                for k in ("kernel", "bias"):
                    assert_close(gradients[k], want[k])
                if "weights" in gradients:
                    assert np.isfinite(gradients["weights"]).all()
                    assert_close(gradients["weights"][HEALTHY], want["weights"])


@pytest.mark.parametrize("name", RUNNERS)
def test_a_bad_label_is_loud_in_its_own_row_alone(name, x64):
    arguments = arrays(N, D, V, weights=WEIGHTS, seed=64)
    bad = arguments | {
        "labels": arguments["labels"].at[ODD].set(jnp.array([-1, V, -99, V + 99], jnp.int32))
    }
    got, same = (runner(**RUNNERS[name])(x) for x in (bad, arguments))
    np.testing.assert_array_equal(got["none"][0][ODD], NAN)
    assert_close(got["none"][0][HEALTHY], same["none"][0][HEALTHY])
    assert np.isnan(got["mean"][0])
    for reduction in got:
        of_hidden = got[reduction][1]["hidden"]
        np.testing.assert_array_equal(of_hidden[ODD], NAN)
        assert_close(of_hidden[HEALTHY], same[reduction][1]["hidden"][HEALTHY])


@pytest.mark.parametrize("name", RUNNERS)
def test_hidden_states_that_are_wrong_are_loud_in_their_own_rows(name, x64):
    arguments = arrays(N, D, V, weights=WEIGHTS, seed=65)
    wrong = arguments | {"hidden": arguments["hidden"].at[ODD].set(SPOILED)}
    got, same = (runner(**RUNNERS[name])(x) for x in (wrong, arguments))
    np.testing.assert_array_equal(got["none"][0][ODD], NAN)
    assert_close(got["none"][0][HEALTHY], same["none"][0][HEALTHY])
    assert np.isnan(got["mean"][0])
    for reduction in got:
        assert_close(got[reduction][1]["hidden"][HEALTHY], same[reduction][1]["hidden"][HEALTHY])
        assert np.isnan(got[reduction][1]["kernel"]).all()  # a sum over all rows


@pytest.mark.parametrize("name", RUNNERS)
def test_a_mean_over_nothing_is_zero(name, x64):
    arguments = arrays(N, D, V, weights=WEIGHTS, seed=66)
    arguments["hidden"] = arguments["hidden"].at[ODD].set(SPOILED)
    ignored = arguments | {"labels": jnp.full(N, IGNORED, jnp.int32)}
    weightless = arguments | {"weights": jnp.zeros(N)}
    for given in (ignored, weightless):
        value, gradients = runner(**RUNNERS[name])(given)["mean"]
        assert value == 0.0
        for k, gradient in gradients.items():
            np.testing.assert_array_equal(gradient, np.zeros_like(gradient), err_msg=k)
    cancelling = arguments | {"weights": jnp.zeros(N).at[HEALTHY].set(jnp.array([1.0, -2.0, 1.0]))}
    value, gradients = runner(**RUNNERS[name])(cancelling)["mean"]
    assert value == 0.0
    for k in ("hidden", "kernel", "bias"):
        np.testing.assert_array_equal(gradients[k], np.zeros_like(gradients[k]), err_msg=k)


@pytest.mark.parametrize("name", ["weights too", "forward_mode"])
def test_the_derivative_by_a_weight_of_zero_is_the_loss(name, x64):
    arguments = arrays(N, D, V, weights=WEIGHTS, seed=67)
    run = runner(**RUNNERS[name])
    losses = run(arguments | {"weights": jnp.ones(N)})["none"][0]
    zeros = arguments["weights"].at[ODD].set(0.0)
    gradients = run(arguments | {"weights": zeros})["none"][1]
    assert_close(gradients["weights"], losses * cotangents(N))


def test_three_quarters_ignored_are_as_if_they_were_not_there(x64):
    """Also everything ignored, and nothing; the examples that count stand anywhere."""
    n, v = 64, 37
    arguments = arrays(n, D, v, seed=68)
    head_of = arguments["kernel"], arguments["bias"]
    g = jnp.asarray(cotangents(n))

    def results(losses, hidden, g):
        outputs = []
        for reduction, cotangent in (("none", g), ("mean", 1.0)):
            fn = functools.partial(losses, reduction=reduction)
            value, pull, aux = jax.vjp(fn, hidden, *head_of, has_aux=True)
            of_hidden, *of_head = pull(jnp.asarray(cotangent))
            outputs.append((value, of_head, of_hidden, aux))
        return outputs

    @jax.jit
    def run(live):
        """Ours with NaN in the others, and the naive head on the live ones, moved to the front."""
        labels = jnp.where(live, arguments["labels"], IGNORED)

        def ours(hidden, kernel, bias, reduction):
            return head(hidden, kernel, labels, bias=bias, ignore_index=IGNORED, chunk_size=5,
                        reduction=reduction, return_aux=True)  # fmt: skip

        order = jnp.argsort(~live)
        weights = jnp.where(live[order], 1.0, 0.0)

        def compact(hidden, kernel, bias, reduction):
            loss = naive(hidden, kernel, arguments["labels"][order], bias=bias, weights=weights,
                         reduction=reduction)  # fmt: skip
            logits = hidden @ kernel + bias[None]
            log_softmax = jax.nn.log_softmax(logits)
            at_label = jnp.take_along_axis(logits, arguments["labels"][order][:, None], axis=-1)
            aux = {
                "log_normalizer": jax.nn.logsumexp(logits, axis=-1),
                "prediction": jnp.argmax(logits, axis=-1).astype(jnp.int32),
                "entropy": -jnp.sum(jnp.exp(log_softmax) * log_softmax, axis=-1),
                "rank": jnp.sum(logits > at_label, axis=-1, dtype=jnp.int32),
            }
            none = {"prediction": -1, "rank": 2**31 - 1}
            aux = {k: jnp.where(weights > 0, x, none.get(k, 0)) for k, x in aux.items()}
            return loss, CrossEntropyAux(**aux)

        hidden = jnp.where(live[:, None], arguments["hidden"], NAN)
        got = results(ours, hidden, g)
        want = results(compact, arguments["hidden"][order], g[order])
        return got, want, order

    for count in (n // 4, 0, n, 3):
        live = np.isin(np.arange(n), rng(count).permutation(n)[:count])
        got, want, order = run(live)

        def in_front(x, order=order):
            return x[order] if x.shape[:1] == (n,) else x

        assert_close(jax.tree.map(in_front, got), want)
        np.testing.assert_array_equal(got[0][0][~live], 0.0)
        for _, _, of_hidden, aux in got:
            np.testing.assert_array_equal(of_hidden[~live], 0.0)
            np.testing.assert_array_equal(aux.prediction[~live], -1)
            np.testing.assert_array_equal(aux.log_normalizer[~live], 0.0)


def test_places_of_a_chunk_behind_the_last_example_add_nothing(x64):
    """Of eleven examples in one chunk ten count, which are worked off in quarters of three."""
    weights = jnp.ones(11).at[0].set(0.0)
    arguments = arrays(11, D, V, seed=73)

    def gradients(loss, **static):
        moving = {k: arguments[k] for k in ("hidden", "kernel")}
        rest = {k: arguments[k] for k in ("labels", "bias")} | {"weights": weights}
        return jax.grad(lambda moving: loss(**moving, **rest, reduction="sum", **static))(moving)

    got, want = jax.jit(lambda: (gradients(head, chunk_size=11), gradients(naive)))()
    assert_close(got, want)


# -- what went wrong elsewhere ---------------------------------------------------------------------


def test_tokamax_no_padding_counts_as_a_class():
    """V = 2049 is one more than a power of two: with all logits 0 the loss is log V."""
    args = jnp.zeros((3, 2)), jnp.zeros((2, 2049)), np.array([0, 1, 2048])
    np.testing.assert_allclose(
        jax.jit(head)(*args), np.full(3, np.log(2049)), rtol=TOLERANCE["loss"]
    )


# MaxText, t5x: the cotangent of the second output, targets whose sums are not one, a hidden state's
# gradient: test_both_outputs_are_differentiated.
# Liger-Kernel, "none" with other than uniform cotangents: test_value_and_gradients_are_the_naive_heads.
# ejkernel, ignore_index with weights: test_every_pair_of_options.


def test_levanter_chunks_of_more_than_half_count_once_and_a_soft_cap_has_its_derivative(x64):
    """Saturated: 1 - tanh^2 is far from 1."""
    arguments = arrays(N, D, V, bias=rng(69).normal(size=V) * 6)
    got, want = both(arguments, cotangents(N), chunk_size=5, softcap=2.0)
    assert_close(got, want)


def test_ejkernel_the_sum_of_weights_is_not_rounded_to_16_bits():
    n, dtype = 4097, jnp.bfloat16
    loss = jax.jit(functools.partial(head, reduction="mean"))(
        jnp.ones((n, 1), dtype),
        jnp.zeros((1, 2), dtype),
        jnp.zeros(n, jnp.int32),
        weights=jnp.ones(n, dtype),
    )
    np.testing.assert_allclose(loss, np.log(2), rtol=TOLERANCE["rounded"])


@pytest.mark.parametrize("forward_mode", [False, True])
def test_the_head_gradient_is_not_summed_in_16_bits(forward_mode):
    n, dtype = 2047, jnp.bfloat16  # one lane, and chunks of one example

    def loss(kernel, bias, class_weights):
        return head(jnp.ones((n, 1), dtype), kernel, jnp.zeros(n, jnp.int32), bias=bias, reduction="sum",
                    class_weights=class_weights, chunk_size=1, forward_mode=forward_mode)  # fmt: skip

    zeros, ones = jnp.zeros(2, dtype), jnp.ones(2, dtype)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(zeros[None], zeros, ones)
    for got, want in zip(
        gradients, ([[-n / 2, n / 2]], [-n / 2, n / 2], [n * np.log(2), 0]), strict=True
    ):
        np.testing.assert_allclose(wide(got), want, rtol=TOLERANCE["bfloat16"][0])


def test_liger_kernel_the_inputs_are_not_written_over():
    arguments = arrays(N, D, V, np.float32)
    before = {k: np.array(x) for k, x in arguments.items()}
    run = jax.jit(functools.partial(derivatives, head))
    once, twice = (run(arguments, jnp.ones(N)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    jax.tree.map(np.testing.assert_array_equal, before, arguments)


def test_optax_a_label_of_minus_one_is_not_the_last_class():
    arguments = arrays(4, D, V, np.float32) | {"labels": np.array([-1, 0, V, V - 1])}
    np.testing.assert_array_equal(np.isnan(jax.jit(head)(**arguments)), [True, False, True, False])


@pytest.mark.parametrize("kernel", ["float16", "float32"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_float16_gradients_keep_the_range_that_the_scale_of_the_loss_gives(reduction, kernel):
    """A confident head: without the outer scale its gradients are too small for float16, or with large
    weights too large."""
    n, v = 16, 100
    bias = np.full(v, -9.0)
    bias[0] = 9.0
    arguments = arrays(n, 8, v, np.float16, bias=bias)
    arguments |= {"labels": np.zeros(n, np.int32), "kernel": arguments["kernel"].astype(kernel)}
    fn = functools.partial(head, reduction=reduction, dtype=jnp.float16)
    run = jax.jit(functools.partial(derivatives, fn))
    for scale, weight in ((2.0**15, 1.0), (2.0**-30, 2.0**45)):
        arguments["weights"] = np.full(n, weight, np.float32)
        g = scale * np.ones(n if reduction == "none" else (), np.float32)
        _, got = run(arguments, g)
        _, want = in_float64(arguments, g, reduction)
        for k in ("hidden", "kernel"):
            assert got[k].dtype == arguments[k].dtype
            error = np.linalg.norm(wide(got[k]) - want[k]) / np.linalg.norm(want[k])
            assert error <= 2.0**-10, k  # roundings of 2^-11


def test_optax_the_loss_of_bfloat16_is_not_quantized():
    arguments = arrays(N, D, V, jnp.bfloat16)
    loss = jax.jit(head)(**arguments)
    exact = {k: wide(x) for k, x in arguments.items()}
    logits = exact["hidden"] @ exact["kernel"] + exact["bias"]
    want = np.log(np.sum(np.exp(logits), -1)) - logits[np.arange(N), arguments["labels"]]
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, want, rtol=2e-6)


def test_optax_a_class_of_minus_infinity_without_a_target_is_absent():
    arguments = arrays(N, D, V, np.float32)
    labels = jnp.asarray(one_hot(np.arange(N) % (V - 1), V))
    arguments |= {"bias": arguments["bias"].at[V - 1].set(-INF), "labels": labels}
    (value, gradients), less = (
        jax.jit(functools.partial(derivatives, functools.partial(head, reduction="sum")))(x, 1.0)
        for x in (
            arguments,
            arguments | {k: arguments[k][..., :-1] for k in ("kernel", "bias", "labels")},
        )
    )
    np.testing.assert_allclose(value, less[0], rtol=TOLERANCE["loss"])
    assert_close(gradients["hidden"], less[1]["hidden"], rtol=1e-6)
    np.testing.assert_array_equal(gradients["kernel"][:, -1], 0.0)


def test_jax_cce_minus_100_and_labels_beyond_the_classes_are_loud():
    arguments = arrays(4, D, V, np.float32) | {"labels": np.array([-100, V + 99, 0, 2**31 - 1])}
    np.testing.assert_array_equal(np.isnan(jax.jit(head)(**arguments)), [True, True, False, True])


def test_jax_cce_the_kernel_is_not_copied_in_float32():
    n, d, v = 64, 8, 4099
    arguments = arrays(n, d, v, jnp.bfloat16, bias=None)
    for reduction in ("none", "mean"):
        fn = functools.partial(head, labels=arguments["labels"], reduction=reduction)
        jaxpr = jax.make_jaxpr(fn)(arguments["hidden"], arguments["kernel"])
        converted = [
            eqn.outvars[0].aval.shape
            for eqn in equations(jaxpr.jaxpr)
            if eqn.primitive.name == "convert_element_type"
        ]
        assert not [shape for shape in converted if np.prod(shape) >= d * v]


# -- transformations -------------------------------------------------------------------------------


def test_vmap_over_heads(x64):
    arguments = arrays(N, D, V, bias=None)
    kernels = jnp.asarray(rng(70).normal(size=(3, D, V)))

    def of(loss):
        def mean(kernel):
            return loss(
                arguments["hidden"], kernel, arguments["labels"], reduction="mean", ignore_index=2
            )

        return jax.vmap(jax.value_and_grad(mean))(kernels)

    got, want = jax.jit(lambda: (of(functools.partial(head, chunk_size=3)), of(naive)))()
    assert_close(got, want)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_checkpoint_in_scan(reduction, x64):
    """Steps of gradient accumulation."""
    arguments = arrays((4, N), D, V, bias=None)

    def total(loss, hidden, kernel):
        rows = jax.checkpoint(functools.partial(loss, reduction=reduction))

        def step(total, x):
            return total + jnp.sum(rows(x[0], kernel, x[1]) ** 2), None

        return jax.lax.scan(step, jnp.zeros(()), (hidden, arguments["labels"]))[0]

    @jax.jit
    def run(*at):
        ours = functools.partial(head, chunk_size=3)
        return [
            jax.value_and_grad(functools.partial(total, fn), (0, 1))(*at) for fn in (ours, naive)
        ]

    assert_close(*run(arguments["hidden"], arguments["kernel"]))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_trace_is_differentiated_by_one_argument_and_by_another(reduction, x64):
    """JAX traces the jitted function once; what the one derivative keeps must not be taken for what the
    other does."""
    arguments = arrays(N, D, V, bias=None)
    at, labels = (arguments["hidden"], arguments["kernel"]), arguments["labels"]

    def gradients(loss):
        @jax.jit
        def total(hidden, kernel):
            return jnp.sum(loss(hidden, kernel, labels, reduction=reduction) ** 2)

        def in_scan(*at):
            def step(carry, _):
                return carry + jax.checkpoint(total)(*at), None

            return jax.lax.scan(step, jnp.zeros(()), jnp.arange(2))[0]

        every = ((0,), (0, 1), (1,))
        return [jax.grad(fn, argnums)(*at) for fn in (total, in_scan) for argnums in every]

    ours = functools.partial(head, chunk_size=3)
    assert_close(*jax.jit(lambda: (gradients(ours), gradients(naive)))())


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivatives(reduction, x64):
    """Reverse over reverse and forward over reverse, of hidden states and kernel at once, by
    products with a vector."""
    arguments = arrays(4, 2, 3, bias=None)
    labels, static = arguments.pop("labels"), {"z_loss": 0.1}
    direction = {k: jnp.asarray(rng(71).normal(size=x.shape)) for k, x in arguments.items()}

    def products(loss, modes, floats):
        def total(floats):
            losses = loss(**floats, labels=labels, reduction=reduction, **static)
            return jnp.vdot(jnp.asarray(cotangents(losses.shape)), losses)

        def along(floats):
            gradients = jax.tree.leaves(jax.grad(total)(floats))
            return sum(
                jnp.vdot(*x) for x in zip(gradients, jax.tree.leaves(direction), strict=True)
            )

        found = []
        if "forward" in modes:
            # With the value, whose tangent would be left out otherwise, needed or not.
            found.append(jax.jvp(jax.value_and_grad(total), (floats,), (direction,))[1][1])
        if "reverse" in modes:
            found.append(jax.grad(along)(floats))
        return found

    @jax.jit
    def run(floats):
        ours = functools.partial(head, chunk_size=3)
        forward = functools.partial(head, chunk_size=3, forward_mode=True)
        modes = ("forward", "reverse") if reduction == "none" else ("reverse",)
        got = products(ours, modes, floats)
        if reduction == "mean":
            got += products(forward, ("forward",), floats)
        return got, products(naive, ("forward",), floats)

    got, (want,) = run(arguments)
    for x in got:
        assert_close(x, want, rtol=1e-11)  # one derivative more, a digit less


def test_forward_mode(x64):
    arguments = arrays(N, D, V)
    labels = arguments.pop("labels")
    direction = {k: jnp.asarray(rng(72).normal(size=x.shape)) for k, x in arguments.items()}

    @jax.jit
    def run(floats):
        results = []
        for fn in (functools.partial(head, forward_mode=True, chunk_size=3), naive):
            fn = functools.partial(fn, labels=labels, ignore_index=2)
            each = functools.partial(lambda fn, floats: fn(**floats), fn)
            mean = functools.partial(lambda fn, floats: fn(**floats, reduction="mean"), fn)
            results.append(
                (
                    jax.jvp(each, (floats,), (direction,)),
                    jax.linearize(mean, floats)[1](direction),
                    jax.jacfwd(mean)(floats),
                    jax.grad(mean)(floats),
                )
            )
        return results

    assert_close(*run(arguments))


def test_donated_arguments(x64):
    arguments = arrays(N, D, V, bias=None)
    fn = jax.value_and_grad(functools.partial(head, reduction="mean"), (0, 1))
    at = arguments["hidden"], arguments["kernel"]
    want = jax.jit(fn)(*at, arguments["labels"])
    assert_close(jax.jit(fn, donate_argnums=(0, 1))(*at, arguments["labels"]), want)


def test_export_lowers_for_every_platform():
    at = arrays(64, 8, 4099, jnp.bfloat16)
    for static in ({}, {"ignore_index": 0, "return_aux": True}):
        fn = functools.partial(head, reduction="mean", softcap=9.0, **static)
        fn = jax.jit(jax.value_and_grad(fn, (0, 1), has_aux="return_aux" in static))
        exported = jax.export.export(fn, platforms=["cuda", "tpu", "cpu"])(
            at["hidden"], at["kernel"], at["labels"]
        )
        assert exported.platforms == ("cuda", "tpu", "cpu")


# -- memory ----------------------------------------------------------------------------------------

LARGE = (2048, 64, 8192)


@functools.lru_cache
def compiled_gradient(fn, n, dtype, reduction="mean", argnums=(0, 1)):
    _, d, v = LARGE

    def total(hidden, kernel, labels, g):
        return jnp.vdot(g, fn(hidden, kernel, labels, reduction=reduction))

    g = jax.ShapeDtypeStruct((n,) if reduction == "none" else (), jnp.float32)
    at = jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((d, v), dtype)
    gradient = jax.jit(jax.value_and_grad(total, argnums))
    return gradient.lower(*at, jax.ShapeDtypeStruct((n,), jnp.int32), g).compile()


def temporary(*args, **kwargs):
    return compiled_gradient(*args, **kwargs).memory_analysis().temp_size_in_bytes


def largest_array(text):
    """The number of entries, of any dtype, in a compiled program."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+[a-z0-9]*)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in set(shapes))


def test_a_chunk_is_large_enough_and_its_logits_are_bounded():
    for num_classes in (1, 10, 1000, 8192, 32000, 128256, 262144, 2**20, 2**26):
        for loop in (_chunks.LOOP, _cpu.LOOP):
            for size in (loop.gradients, loop.values):
                examples = size.examples(num_classes)
                assert 1 <= examples <= size.most
                assert examples * num_classes <= max(size.budget, num_classes)
                if num_classes <= 128256:
                    assert examples >= size.least

    def plan(num_examples, num_classes, size, chunk_size=None):
        return _chunks.plan(num_examples, num_classes, 8, size, chunk_size)

    gradients, values = _cpu.LOOP.gradients, _cpu.LOOP.values
    for size, examples in ((gradients, 256), (values, 128)):
        of_size = plan(2048, 32000, size)
        assert of_size.shards * of_size.chunk == examples
    assert plan(256, 32000, gradients).chunks == 1
    assert plan(7, 10, gradients, 1).chunk == 1  # as is asked for


@pytest.mark.parametrize(("reduction", "accumulators"), [("mean", 1), ("none", 1)])
@pytest.mark.parametrize(("tied", "copies"), [(False, 0), (True, 1)])
def test_the_kernel_is_not_copied_and_has_one_accumulator(tied, copies, reduction, accumulators):
    """All else that is held is small: the logits of 32 examples, and [N, D]. A transposed kernel is
    copied once, as the documentation says, and its gradient is transposed into the result."""
    n, d, v = 64, 256, 8192
    shape = (v, d) if tied else (d, v)

    def total(hidden, kernel, labels):
        kernel = kernel.T if tied else kernel
        return jnp.sum(head(hidden, kernel, labels, reduction=reduction, chunk_size=32))

    at = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((n, d), shape)]
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    compiled = gradient.lower(*at, jax.ShapeDtypeStruct((n,), jnp.int32)).compile()
    held = compiled.memory_analysis().temp_size_in_bytes / (4 * d * v)
    assert held <= accumulators + copies + 0.5


def test_reverse_over_forward_mode_computes_the_logits_of_each_chunk_anew():
    n, d, v = 512, 8, 2048

    def total(hidden, kernel, labels):
        return jnp.sum(head(hidden, kernel, labels, chunk_size=32, forward_mode=True))

    at = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((n, d), (d, v))]
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    compiled = gradient.lower(*at, jax.ShapeDtypeStruct((n,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * n * v / 8


def test_a_16_bit_kernel_is_not_widened_for_the_gradient_of_the_hidden_states():
    n, d, v = 64, 256, 8192
    at = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((n, d), (d, v))]
    gradient = jax.jit(jax.grad(functools.partial(head, reduction="mean", chunk_size=32)))
    compiled = gradient.lower(*at, jax.ShapeDtypeStruct((n,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * d * v


def test_on_tpu_16_bit_hidden_states_are_not_copied_as_bits():
    """XLA would make the copy of all of them before the loop, and hold it through the loop."""
    at = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((64, 8), (8, 32))]
    traced = jax.jit(head).trace(*at, jax.ShapeDtypeStruct((64,), jnp.int32))
    for platform, copied in (("tpu", False), ("cpu", True)):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("bitcast_convert" in program) == copied


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_loss_alone_holds_a_chunk_of_values(dtype):
    n, d, v = LARGE
    at = jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((d, v), dtype)

    def temporary(fn):
        compiled = jax.jit(fn).lower(*at, jax.ShapeDtypeStruct((n,), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(head) <= 4 * (1.1 * 256 * v + (d * v if dtype == jnp.bfloat16 else 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_logits_never_exist(reduction, dtype):
    n, _, v = LARGE
    assert largest_array(compiled_gradient(head, n, dtype, reduction).as_text()) < n * v / 2
    # The kernel's gradient in float32 and a chunk's logits, and the kernel widened where XLA does so.
    allowed = {jnp.float32: 0.2, jnp.bfloat16: 0.35}[dtype]
    assert temporary(head, n, dtype, reduction) <= allowed * temporary(naive, n, dtype)


def test_the_check_finds_the_logits_of_the_naive_head():
    n, _, v = LARGE
    assert largest_array(compiled_gradient(naive, n, jnp.float32).as_text()) >= n * v


def test_memory_is_flat_in_the_number_of_examples():
    """But for the cotangent of the hidden states, and numbers of O(N)."""
    assert temporary(head, 16384, jnp.float32) <= 1.3 * temporary(head, 2048, jnp.float32)


def test_a_frozen_kernel_has_no_accumulator():
    n, d, v = LARGE
    frozen = temporary(head, n, jnp.float32, argnums=(0,))
    assert frozen <= temporary(head, n, jnp.float32)
    jaxpr = gradient_jaxpr("mean", argnums=(0,)).jaxpr
    written = [
        x.aval.shape for e in equations(jaxpr) for x in e.outvars if e.primitive.name != "transpose"
    ]
    assert (d, v) not in written


# -- work ------------------------------------------------------------------------------------------


def inner(eqn):
    """The programs inside an equation; a head's own is traced when it is compiled."""
    if eqn.primitive.name == "jax_sce_head":
        run = functools.partial(_partition._function(eqn.params["what"]), _chunks.LOOP)
        at = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]
        yield jax.make_jaxpr(_backend.flat(run, eqn.params["tree"]))(*at).jaxpr
    for x in jax.tree.leaves(
        eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
        if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
            yield getattr(x, "jaxpr", x)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for program in inner(eqn):
            yield from equations(program)


def operations(jaxpr):
    """Of the matrix products; of a cond, the most of its branches."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            a = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(a[i] for i in contracted)
            continue
        parts = [operations(program) for program in inner(eqn)]
        if not any(parts):
            continue
        assert name != "while", "a loop whose length is not known"
        times = eqn.params["length"] if name == "scan" else 1
        total += times * (max(parts) if name == "cond" else sum(parts))
    return total


def gradient_jaxpr(reduction, argnums=(0, 1), chunk_size=256, has_aux=False, **static):
    n, d, v = LARGE

    loss = functools.partial(
        head, reduction=reduction, chunk_size=chunk_size, return_aux=has_aux, **static
    )

    def total(hidden, kernel, labels):
        out = loss(hidden, kernel, labels)
        return (jnp.sum(out[0]), out[1]) if has_aux else jnp.sum(out)

    fn = jax.value_and_grad(total, argnums, has_aux=has_aux) if argnums else total
    at = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, d), (d, v))]
    at.append(jax.ShapeDtypeStruct((n,), jnp.int32))
    return jax.make_jaxpr(fn)(*at)


@pytest.mark.parametrize(
    ("reduction", "argnums", "products", "static"),
    [
        ("mean", (), 2, {}),
        ("none", (), 2, {}),
        ("mean", (0, 1), 6, {}),
        ("sum", (0, 1), 6, {"label_smoothing": 0.1, "z_loss": 0.1}),
        ("mean", (0, 1), 6, {"has_aux": True}),  # that is not differentiated
        ("none", (0, 1), 8, {}),
        ("mean", (0,), 4, {}),  # the other is frozen
        ("mean", (1,), 4, {}),
        ("mean", (0, 1), 6, {"chunk_size": 300}),
    ],
)
def test_work(reduction, argnums, products, static):
    """In units of N D V; chunks that do not divide may add one chunk in seven."""
    found = operations(gradient_jaxpr(reduction, argnums, **static).jaxpr) / math.prod(LARGE)
    assert products <= found <= products * (1.15 if "chunk_size" in static else 1.0)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("why", ["ignore_index", "weights"])
def test_examples_that_do_not_count_are_left_out_of_the_work(why, differentiated, monkeypatch):
    """Of 64 examples in chunks of 16."""
    rows = []
    logits = _head._logits

    def counted(chunk, precision):
        jax.debug.callback(lambda: rows.append(len(chunk.hidden)))
        return logits(chunk, precision)

    monkeypatch.setattr(_head, "_logits", counted)
    arguments = arrays(64, D, V, np.float32, bias=None)
    loss = functools.partial(head, chunk_size=16, ignore_index=IGNORED, reduction="mean")

    @jax.jit
    def run(hidden, kernel, rest):
        fn = functools.partial(loss, **rest)
        return (
            jax.grad(fn, argnums=(0, 1))(hidden, kernel) if differentiated else fn(hidden, kernel)
        )

    labels = np.asarray(arguments["labels"])
    for count in (64, 24, 16, 8, 0):
        live = rng(count).permuted(np.tile(np.arange(8) < count // 8, (8, 1)), axis=1).reshape(-1)
        if why == "ignore_index":
            rest = {"labels": np.where(live, labels, IGNORED)}
        else:
            rest = {"labels": labels, "weights": live.astype(np.float32)}
        rows.clear()
        jax.block_until_ready(run(arguments["hidden"], arguments["kernel"], rest))
        jax.effects_barrier()
        assert sum(rows) == (count if differentiated else math.ceil(count / 16) * 16)


# -- errors ----------------------------------------------------------------------------------------

GOOD = {
    "hidden": np.zeros((4, D), np.float32),
    "kernel": np.zeros((D, V), np.float32),
    "labels": np.zeros(4, np.int32),
}
FLOATS = one_hot(GOOD["labels"], V)
ERRORS = {
    "integer hidden": ({"hidden": np.zeros((4, D), int)}, TypeError, "hidden.*floating.*int"),
    "scalar hidden": ({"hidden": 1.0}, ValueError, r"hidden.*\(\.\.\., features\).*\(\)"),
    "kernel transposed": (
        {"hidden": np.zeros((2, 2, D), np.float32), "kernel": np.zeros((V, D), np.float32)},
        ValueError,
        r"kernel must have shape \(3, classes\).*\(2, 2, 3\), got \(5, 3\); pass its transpose$",
    ),
    "kernel of other features": (
        {"kernel": np.zeros((V, V), np.float32)},
        ValueError,
        r"kernel must have shape \(3, classes\).*\(4, 3\), got \(5, 5\)$",
    ),
    "kernel of rank 1": ({"kernel": np.zeros(D)}, ValueError, r"kernel.*\(3, classes\).*\(3,\)"),
    "kernel of ids": ({"kernel": np.zeros((D, V), int)}, TypeError, "kernel.*floating.*int"),
    "no classes": (
        {"kernel": np.zeros((D, 0))},
        ValueError,
        r"kernel.*at least one class.*\(3, 0\)",
    ),
    "bias of another shape": (
        {"bias": np.zeros(D)},
        ValueError,
        r"bias must have shape \(5,\), got \(3,\)",
    ),
    "bias a scalar": ({"bias": 1.0}, ValueError, r"bias must have shape \(5,\), got \(\)"),
    "integer bias": ({"bias": np.zeros(V, int)}, TypeError, "bias.*floating.*int"),
    "too few labels": (
        {"labels": np.zeros(3, int)},
        ValueError,
        r"labels must have shape \(4,\) \(class ids\) or \(4, 5\) \(distributions\), got \(3,\)",
    ),
    "one label": ({"labels": 0}, ValueError, r"labels.*got \(\)"),
    "float labels": (
        {"labels": np.zeros(4)},
        TypeError,
        "labels must have an integer dtype.*float",
    ),
    "bool labels": (
        {"labels": np.zeros(4, bool)},
        TypeError,
        "labels must have an integer dtype.*bool",
    ),
    "other distributions": (
        {"labels": np.zeros((4, D))},
        ValueError,
        r"labels.*\(4, 5\) \(distributions\), got \(4, 3\)",
    ),
    "labels of None": ({"labels": None}, TypeError, "labels must be an array, got None"),
    "ignore_index of distributions": (
        {"labels": FLOATS, "ignore_index": 0},
        ValueError,
        "ignore_index must be None unless labels are class ids",
    ),
    "ignore_index a float": ({"ignore_index": 1.0}, TypeError, "ignore_index.*integer.*1.0"),
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size must be positive, got 0"),
    "chunk_size below 0": ({"chunk_size": -3}, ValueError, "chunk_size must be positive, got -3"),
    "chunk_size a float": (
        {"chunk_size": 1.5},
        TypeError,
        "chunk_size must be an integer or None, got 1.5",
    ),
    "unknown reduction": ({"reduction": "avg"}, ValueError, "reduction.*none.*sum.*mean.*avg"),
    "weights of a class each": ({"weights": np.ones(5)}, ValueError, r"weights.*\(4,\).*\(5,\)"),
    "a dtype of integers": ({"dtype": "int8"}, TypeError, "dtype must be float16, .*, got int8"),
    "a dtype that is none": (
        {"dtype": 3.0},
        TypeError,
        "dtype must be a floating-point dtype.*3.0",
    ),
    "precision": ({"precision": "most"}, TypeError, "precision must be .*, got 'most'"),
    "class_weights": ({"class_weights": np.ones(4)}, ValueError, r"class_weights.*\(5,\).*\(4,\)"),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap.*0.*0.0"),
    "label_smoothing": ({"label_smoothing": -0.1}, ValueError, "label_smoothing.*-0.1"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_cannot_be_right_raises(what):
    bad, error, message = ERRORS[what]
    with pytest.raises(error, match=message):
        head(**GOOD | bad)


# -- many devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_examples_that_are_split_over_devices_stay_where_they_are(reduction):
    """Under plain jit: what crosses devices is the kernel's gradient, once, and single numbers."""
    n, d, v = 64, 32, 37
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    arguments = arrays(n, d, v, np.float32)
    labels = arguments["labels"].at[::3].set(IGNORED)
    weights = jnp.asarray(cotangents(n), jnp.float32)

    def total(loss, hidden, kernel, labels, weights):
        losses = loss(hidden, kernel, labels, ignore_index=IGNORED, reduction=reduction)
        return jnp.sum(losses * (weights if reduction == "none" else 1.0))

    at = arguments["hidden"], arguments["kernel"], labels, weights
    want = jax.jit(jax.value_and_grad(functools.partial(total, naive), (0, 1)))(*at)
    placed = [jax.device_put(x, s) for x, s in zip(at, (split, whole, split, split), strict=True)]
    ours = jax.value_and_grad(
        functools.partial(total, functools.partial(head, chunk_size=16)), (0, 1)
    )
    fn = jax.jit(ours, out_shardings=(whole, (split, whole)))
    compiled = fn.lower(*placed).compile()
    lines = compiled.as_text().splitlines()
    moved = [x for x in lines if re.search(r"= .*\b(all-gather|all-to-all|collective-permute)", x)]
    for line in moved:
        assert largest_array(line + " f32[1]") < n * d / 8, line
    sums = [x for x in lines if re.search(r"= .*\ball-reduce(-start)?\(", x)]
    assert any(largest_array(line + " f32[1]") >= d * v for line in sums)  # the check sees them
    got = compiled(*placed)
    assert_close(got, want, rtol=1e-5)


def test_inside_shard_map_over_the_batch():
    n, d, v = 64, 8, 37
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    arguments = arrays(n, d, v, np.float32)
    labels = arguments["labels"].at[::3].set(IGNORED)
    loss = functools.partial(head, ignore_index=IGNORED, chunk_size=3)
    split = jax.shard_map(
        loss, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data")
    )

    @jax.jit
    def run(hidden, kernel):
        results = []
        for fn in (split, functools.partial(naive, ignore_index=IGNORED)):
            losses, pull = jax.vjp(lambda h, k, fn=fn: fn(h, k, labels), hidden, kernel)
            results.append((losses, pull(jnp.asarray(cotangents(n), jnp.float32))))
        return results

    assert_close(*run(arguments["hidden"], arguments["kernel"]), rtol=1e-5)
    text = run.lower(arguments["hidden"], arguments["kernel"]).compile().as_text()
    before, entry = text.split("\nENTRY")
    assert "all-reduce" in entry  # the kernel's gradient, once
    assert "all-reduce(" not in before  # not in the loop over the chunks


@pytest.mark.parametrize(
    ("specs", "reduction", "is_set"),
    covering(
        [(P("data", "model"), P()), (P("data"), P(None, "model"))], ["none", "mean"], [True, False]
    ),
    ids=str,
)
def test_on_a_mesh_with_explicit_axes(specs, reduction, is_set):
    """Of `jax.set_mesh`, or one that only the arrays know."""
    examples_spec, kernel_spec = specs
    n, d, v = (16, 4), 8, 40
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    arguments = arrays(n, d, v, np.float32)
    at = arguments["hidden"], arguments["kernel"]

    def of(loss, labels):
        def losses(hidden, kernel):
            loss_of = functools.partial(loss, reduction=reduction)
            return loss_of(hidden, kernel, labels)

        return jax.jit(losses), jax.jit(jax.grad(lambda *at: jnp.sum(losses(*at)), argnums=(0, 1)))

    want = [fn(*at) for fn in of(naive, arguments["labels"])]
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        hidden, labels = (
            jax.device_put(x, NamedSharding(mesh, examples_spec))
            for x in (at[0], arguments["labels"])
        )
        kernel = jax.device_put(at[1], NamedSharding(mesh, kernel_spec))
        got = [fn(hidden, kernel) for fn in of(head, labels)]
    of_examples = (*examples_spec, None, None)
    of_loss = P(*of_examples[:2]) if reduction == "none" else P()
    assert jax.typeof(got[0]).sharding.spec == of_loss
    assert jax.typeof(got[1][0]).sharding.spec == P(*of_examples[:3])
    assert_close(jax.device_get(got), jax.device_get(want), rtol=1e-5)


def test_on_a_mesh_with_some_explicit_axes():
    """The compiler lays out what lies between."""
    types = AxisType.Explicit, AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "model"), axis_types=types)
    examples = P("data", "sequence")
    given = arrays((4, 6), 3, 6, np.float32, bias=None)
    want = naive(**given)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, examples)
    placed = {k: jax.device_put(x, whole if k == "kernel" else rows) for k, x in given.items()}

    def losses(placed):
        (each, aux), mean = head(**placed, return_aux=True), head(**placed, reduction="mean")
        return each, mean, aux.log_normalizer

    each, mean, log_normalizer = jax.jit(losses)(placed)
    for x, spec in ((each, examples), (log_normalizer, examples), (mean, P())):
        assert jax.typeof(x).sharding.spec == spec
    assert_close(jax.device_get([each, mean]), [want, want.mean()], rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0, 8), (4, 3, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_nothing_to_compute_on_a_mesh_with_explicit_axes(reduction, shape):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    hidden, labels = put(jnp.ones(shape), "data"), put(jnp.zeros(shape[:-1], jnp.int32), "data")
    kernel = put(jnp.ones((shape[-1], 6)), None, "model")
    losses, pull = jax.vjp(lambda *at: head(*at, labels, reduction=reduction), hidden, kernel)
    of_hidden, of_kernel = pull(jnp.ones_like(losses))
    assert of_hidden.shape == shape
    if shape[-1] == 0:
        np.testing.assert_allclose(losses, np.log(6), rtol=1e-6)
    else:
        assert np.sum(losses) == 0
        np.testing.assert_array_equal(of_kernel, np.zeros_like(kernel))


def test_the_chunks_are_smaller_the_more_classes_there_are():
    shapes = (8192, 8), (8, 2**16)
    at = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    loss = functools.partial(head, labels=jnp.zeros(8192, jnp.int32), reduction="mean")
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*at).jaxpr
    sizes = [x.aval.size for e in equations(jaxpr) for x in e.outvars if hasattr(x.aval, "size")]
    assert max(sizes) <= _chunks.LOOP.gradients.logits < 8192 * 2**16


def test_a_loop_has_a_shard_for_each_device_if_that_divides_the_examples():
    size, plan = _chunks.LOOP.values, _chunks.Plan
    assert _chunks.plan(64, 5, 8, size, 16) == plan(shards=8, per_shard=8, chunk=2)
    assert _chunks.plan(12, 5, 8, size, 16) == plan(shards=4, per_shard=3, chunk=3)
    assert _chunks.plan(7, 5, 8, size, 16) == plan(shards=1, per_shard=7, chunk=7)
    assert _chunks.plan(0, 5, 8, size, 16) == plan(shards=1, per_shard=0, chunk=1)
