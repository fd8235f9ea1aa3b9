"""Types in and out: what is computed in which type, and what comes back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import BOTH, DENSE, INTEGER, TOLERANCE, exact_loss, one_hot, rng

from jax_sce import Sparse, Teacher, linear_softmax_cross_entropy as HEAD

FLOATS = ("float16", "bfloat16", "float32", "float64")
LOGITS = rng(30).normal(size=(4, 6))
LABELS = np.array([1, 0, 5, 3])


def names(tree):
    return jax.tree.map(lambda x: x.dtype.name, tree)


@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("forward_mode", [False, True], ids=["reverse", "forward"])
@pytest.mark.parametrize("logits_type", FLOATS)
@pytest.mark.parametrize("labels_type", ["int32", *FLOATS])
def test_losses_are_float32_and_cotangents_have_the_type_of_their_input(
    logits_type, labels_type, forward_mode, wide
):
    if not wide and "float64" in (logits_type, labels_type):
        pytest.skip("there is no float64")
    with jax.enable_x64(wide):
        kind = "integer" if labels_type == "int32" else "dense"
        labels = LABELS if kind == "integer" else one_hot(LABELS, 6)
        arguments = {
            "logits": jnp.asarray(LOGITS, logits_type),
            "labels": jnp.asarray(labels, labels_type),
            "weights": jnp.ones(4, jnp.float16),
            "class_weights": jnp.ones(6, jnp.bfloat16),
            "z_loss": jnp.asarray(0.5, jnp.bfloat16),
            "softcap": jnp.asarray(3.0, jnp.float32),
        }
        floats = {k: v for k, v in arguments.items() if k != "labels" or kind == "dense"}
        rest = {k: v for k, v in arguments.items() if k not in floats}

        def loss(floats):
            losses = BOTH[kind](**floats, **rest, forward_mode=forward_mode)
            return losses.sum(), losses

        # Types alone: nothing is run.
        gradient, losses = jax.eval_shape(jax.grad(loss, has_aux=True), floats)
        assert losses.dtype == ("float64" if logits_type == "float64" else "float32")
        assert not losses.weak_type
        assert names(gradient) == names(floats)


@pytest.mark.parametrize("kind", BOTH)
def test_options_do_not_widen_the_loss(kind, x64):
    labels = LABELS if kind == "integer" else one_hot(LABELS, 6, np.float64)
    loss = BOTH[kind](
        LOGITS.astype(np.float32),
        labels,
        weights=np.ones(4),
        class_weights=np.ones(6),
        z_loss=np.float64(0.1),
        label_smoothing=np.float64(0.1),
        softcap=np.float64(3),
        reduction="mean",
    )
    assert loss.dtype == np.float32


@pytest.mark.parametrize("kind", BOTH)
def test_float64_logits_are_computed_in_float64(kind, x64):
    logits = np.array([40.0, 0.0])
    labels = np.int32(0) if kind == "integer" else np.array([1.0, 0.0])
    np.testing.assert_allclose(BOTH[kind](logits, labels), np.exp(-40.0), rtol=1e-15)


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"]
)
def test_floats_that_are_not_computed_are_refused_by_name(dtype):
    """Those of eight bits and fewer."""
    logits, ids = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
    odd = {"logits": logits, "hidden": logits, "kernel": logits.T, "bias": logits[:, 0]}
    odd = {name: x.astype(dtype) for name, x in odd.items()}
    message = "must have dtype float16, bfloat16, float32 or float64, got " + dtype
    with pytest.raises(TypeError, match="logits " + message):
        INTEGER(odd["logits"], ids)
    with pytest.raises(TypeError, match="logits " + message):
        jax.eval_shape(INTEGER, odd["logits"], ids)
    with pytest.raises(TypeError, match="labels " + message):
        DENSE(logits, odd["logits"])
    for name in ("hidden", "kernel", "bias"):
        good = {"hidden": logits, "kernel": logits.T, "bias": logits[:, 0]}
        with pytest.raises(TypeError, match=f"{name} {message}"):
            HEAD(**(good | {name: odd[name]}), labels=ids)
    with pytest.raises(TypeError, match="labels " + message):
        HEAD(logits, logits.T, logits[:, :4].astype(dtype))
    for labels, name in (
        (Teacher(odd["logits"], logits.T), "labels.hidden"),
        (Teacher(logits, odd["kernel"]), "labels.kernel"),
        (Teacher(logits, logits.T, bias=odd["bias"]), "labels.bias"),
        (Teacher(logits, logits.T, temperature=odd["bias"]), "labels.temperature"),
        (Teacher(logits, logits.T, softcap=odd["bias"][0]), "labels.softcap"),
        (Sparse(ids[:, None], odd["bias"][:, None]), "labels.values"),
    ):
        with pytest.raises(TypeError, match=f"{name} {message}"):
            HEAD(logits, logits.T, labels)


def test_under_strict_promotion_a_product_of_two_dtypes_is_refused_by_name():
    hidden, kernel = jnp.ones((2, 3), jnp.bfloat16), np.ones((3, 6), np.float32)
    of_two = (
        "kernel must have the dtype of {}hidden, bfloat16, under strict dtype promotion{}, "
        "got float32"
    )
    with pytest.raises(TypeError, match="^" + of_two.format("", ", unless dtype is given")):
        HEAD(hidden, kernel, [0, 1])
    with pytest.raises(TypeError, match=r"^labels\." + of_two.format("labels.", "")):
        HEAD(kernel.T, kernel, Teacher(jnp.ones((6, 3), jnp.bfloat16), kernel))
    with jax.numpy_dtype_promotion("standard"):
        jax.eval_shape(HEAD, hidden, kernel, jnp.zeros(2, jnp.int32))


def test_sparse_values_may_have_another_dtype_than_the_rest():
    """Under strict promotion."""
    logits, ids = LOGITS.astype(np.float32), LABELS[:, None]
    options = {"label_smoothing": np.float16(0.5), "class_weights": np.ones(6, np.float16)}

    @jax.jit
    def both(narrow):
        def loss(values):
            return jnp.sum(DENSE(logits, Sparse(ids, values), **options))

        return [jax.value_and_grad(loss)(x) for x in (narrow, narrow.astype(jnp.float32))]

    narrow, wide = both(jnp.full((4, 1), 0.75, jnp.bfloat16))
    assert names(narrow) == ("float32", "bfloat16")
    np.testing.assert_array_equal(narrow[0], wide[0])
    np.testing.assert_array_equal(narrow[1], wide[1].astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", BOTH)
def test_python_lists_and_numpy_arrays_are_arrays(kind):
    labels = LABELS if kind == "integer" else one_hot(LABELS, 6)
    want = BOTH[kind](jnp.asarray(LOGITS, jnp.float32), jnp.asarray(labels))
    for logits in (LOGITS, LOGITS.tolist(), jnp.asarray(LOGITS)):
        for given in (labels, labels.tolist()):
            got = BOTH[kind](logits, given)
            np.testing.assert_array_equal(got, want)
            assert (got.dtype, got.weak_type) == (jnp.float32, False)


def test_weakly_typed_logits_give_a_loss_of_a_definite_type():
    logits = jnp.stack([jnp.asarray(1.0), jnp.asarray(2.0)])
    weak = jax.lax.full_like(logits, 3.0) if logits.weak_type else jax.numpy.array([1.0, 2.0]) * 1
    assert INTEGER(weak, 0).weak_type is False
    scalar = jax.jit(lambda e: INTEGER(logits, 0, label_smoothing=e))(0.1)
    assert (scalar.dtype, scalar.weak_type) == (jnp.float32, False)


@pytest.mark.parametrize("labels_type", ["bool", "int8", "int32", "uint8"])
def test_one_hot_labels_of_any_type_are_distributions(labels_type):
    logits = jnp.asarray(LOGITS, jnp.float32)
    want = DENSE(logits, one_hot(LABELS, 6))
    # The native kernels read floats alone, so these are two programs: each within 16u.
    got = DENSE(logits, one_hot(LABELS, 6, labels_type))
    np.testing.assert_allclose(got, want, rtol=32 * 2.0**-24)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("weights_type", ["bool", "int8", "int32", "uint8"])
def test_weights_of_any_type_are_weights(kind, weights_type):
    logits = jnp.asarray(LOGITS, jnp.float32)
    labels = LABELS.astype(np.int32) if kind == "integer" else one_hot(LABELS, 6)
    weights, classes = np.array([1, 0, 1, 1]), np.array([1, 0, 1, 1, 1, 1])
    for reduction in ("none", "mean"):
        fn = functools.partial(BOTH[kind], logits, labels, reduction=reduction)
        got = fn(weights=weights.astype(weights_type), class_weights=classes.astype(weights_type))
        want = fn(weights=weights.astype(np.float32), class_weights=classes.astype(np.float32))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("weights_type", [jnp.bfloat16, jnp.float16, jnp.bool_, jnp.uint8])
def test_a_mean_counts_in_float32(weights_type):
    n = 70000  # beyond float16, bfloat16's 256 and uint8
    logits = jnp.zeros((n, 2), jnp.bfloat16)
    mean = INTEGER(
        logits, np.zeros(n, np.int32), weights=jnp.ones(n, weights_type), reduction="mean"
    )
    np.testing.assert_allclose(mean, np.log(2), rtol=1e-6)


# -- labels of every integer type, compared without wrapping -------------------------------------

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@pytest.mark.parametrize("num_classes", [127, 128, 255, 256, 1000])
def test_labels_of_any_integer_type_name_their_class(num_classes, x64):
    logits = rng(31).normal(size=(3, num_classes)).astype(np.float32)
    highest = [min(num_classes - 1, np.iinfo(kind).max) for kind in INTEGERS]
    labels = [np.array([0, i, i // 2], kind) for i, kind in zip(highest, INTEGERS, strict=True)]
    each, smoothed = jax.jit(
        lambda z: [[INTEGER(z, y, label_smoothing=e) for y in labels] for e in (0, 0.1)]
    )(logits)
    for y, got in zip(labels, each, strict=True):
        want = exact_loss(logits, y.astype(np.int64))
        np.testing.assert_allclose(got, want, rtol=TOLERANCE["loss"])
    wide = jax.jit(lambda z: [INTEGER(z, y.astype(np.int64), label_smoothing=0.1) for y in labels])(
        logits
    )
    np.testing.assert_array_equal(smoothed, wide)  # by the other rule


def test_labels_at_both_ends_of_every_integer_type():
    """Without x64, too: the lowest is class 0 or bad, the highest is bad, and each may be ignored."""
    logits, cases = rng(33).normal(size=(2, 6)).astype(np.float32), []
    for kind in INTEGERS:
        ends = np.array([np.iinfo(kind).min, np.iinfo(kind).max], kind)
        cases += [(ends, ignored) for ignored in (None, *ends, int(ends[0]), int(ends[1]))]
    losses = jax.jit(lambda z: [INTEGER(z, y, ignore_index=i) for y, i in cases])(logits)
    first = exact_loss(logits[:1], [0])[0]
    for (ends, ignored), got in zip(cases, losses, strict=True):
        want = np.array([first if ends[0] == 0 else np.nan, np.nan])
        if ignored is not None:
            want[ends == ignored] = 0
        np.testing.assert_allclose(got, want, rtol=TOLERANCE["loss"], err_msg=ends.dtype.name)


def test_a_label_that_is_the_number_of_classes_and_the_largest_of_its_type_is_bad():
    losses = INTEGER(np.zeros((2, 127), np.float32), np.array([126, 127], np.int8))
    np.testing.assert_allclose(losses, [np.log(127), np.nan], rtol=TOLERANCE["loss"])


@pytest.mark.parametrize(
    "labels",
    [
        np.array([2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**31) - 1, -(2**32), -(2**63)], np.int64),
        np.array([2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1], np.uint64),
        np.array([2**31, 2**32 - 1], np.uint32),
        np.array([-1, -128, 127, 6], np.int8),
        np.array([255, 6], np.uint8),
    ],
    ids=lambda labels: labels.dtype.name,
)
def test_labels_beyond_the_classes_never_wrap_into_them(labels, x64):
    logits = rng(32).normal(size=(len(labels), 6)).astype(np.float32)
    losses, pull = jax.vjp(lambda z: INTEGER(z, labels), logits)
    np.testing.assert_array_equal(losses, np.nan)
    np.testing.assert_array_equal(pull(jnp.ones_like(losses))[0], np.nan)


LOWEST = -(2**31)


class Wrapped:
    """As arrays of other libraries are: pandas, PyTorch."""

    def __init__(self, array):
        self.array = array

    def __array__(self, *args, **kwargs):
        return self.array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return self.array[index]


# Cut to 32 bits, these would be 0, 1, the highest class, and -1.
BEYOND = {
    "int64": np.array([2**32, 2**32 + 1, 2**40 + 5, -(2**32), LOWEST - 1], np.int64),
    "uint64": np.array([2**32, 2**32 + 1, 2**40 + 5, 2**63, 2**64 - 1], np.uint64),
    "ints": [2**32, 2**32 + 1, 2**40 + 5, -(2**32), LOWEST - 1],
    "scalars": [np.array(2**32), np.int64(2**32 + 1), 2**40 + 5, np.array(-(2**32)), LOWEST - 1],
    "others": Wrapped(np.array([2**32, 2**32 + 1, 2**40 + 5, -(2**32), LOWEST - 1], np.int64)),
}


def integer_and_head(labels, **options):
    """The losses on logits, and those of a head that gives the same logits."""
    logits = rng(32).normal(size=(len(labels), 6)).astype(np.float32)
    eye = np.eye(len(labels), dtype=np.float32)
    return INTEGER(logits, labels, **options), HEAD(eye, logits, labels, **options)


@pytest.mark.parametrize("kind", BEYOND)
def test_labels_of_64_bits_are_bad_without_x64_too(kind):
    labels = BEYOND[kind]
    for losses in integer_and_head(labels):
        np.testing.assert_array_equal(losses, np.nan)
    if kind != "uint64":  # beside good labels, and bad ones that fit
        for losses in integer_and_head([3, labels[0], -1, LOWEST, LOWEST + 1, 2**31 - 1, 5]):
            np.testing.assert_array_equal(np.isnan(losses), [False, *[True] * 5, False])
    np.testing.assert_array_equal(INTEGER(LOGITS[0], labels[0]), np.nan)


@pytest.mark.parametrize("kind", BEYOND)
def test_an_ignore_index_of_64_bits_is_honoured_without_x64_too(kind):
    for index in range(5):
        ignored = int(BEYOND[kind][index])
        for losses in integer_and_head(BEYOND[kind], ignore_index=ignored):
            np.testing.assert_array_equal(losses, np.where(np.arange(5) == index, 0, np.nan))


@pytest.mark.parametrize(
    "ignore_index", [-100, 0, LOWEST, LOWEST + 1, 2**31 - 1, 2**40, LOWEST - 1, 2**70]
)
def test_a_bad_label_is_not_ignored_for_another(ignore_index):
    """Whatever it becomes in 32 bits."""
    labels = np.array([2**32, LOWEST, LOWEST + 1, 2**31 - 1, 2**40, LOWEST - 1, -100, 1], np.int64)
    for losses in integer_and_head(labels, ignore_index=ignore_index):
        np.testing.assert_array_equal(np.asarray(losses) == 0, labels == ignore_index)
        np.testing.assert_array_equal(np.isnan(losses[:-1]), labels[:-1] != ignore_index)
        assert np.isfinite(losses[-1])


@pytest.mark.parametrize("ignore_index", [2**32, -(2**32), 2**70])
def test_labels_of_32_bits_are_not_ignored_for_an_index_beyond(ignore_index):
    labels = np.array([0, 1, 5], np.int64)
    for got, want in zip(
        integer_and_head(labels, ignore_index=ignore_index), integer_and_head(labels), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("labels_type", "ignore_index"),
    [("uint8", -100), ("int8", 255), ("uint8", 256), ("int8", -129), ("int32", 2**40)],
)
def test_an_ignore_index_that_labels_cannot_hold_ignores_nothing(labels_type, ignore_index):
    # Wrapped, these would be 156, -1, 0, 127 and 0.
    labels = np.array([0, 1, 5, 3], labels_type)
    got = INTEGER(LOGITS, labels, ignore_index=ignore_index)
    np.testing.assert_array_equal(got, INTEGER(LOGITS, labels))
    if labels_type == "int8":
        np.testing.assert_array_equal(
            np.isnan(INTEGER(LOGITS, np.array([-1, 127, 1, 2], "int8"), ignore_index=ignore_index)),
            [True, True, False, False],
        )


def test_labels_in_a_list_may_be_traced():
    for losses in jax.jit(lambda label: integer_and_head([label, 2]))(3):
        assert np.all(np.isfinite(losses))


def test_integers_of_64_bits_are_real_numbers_as_they_are():
    """As weights and as targets: without x64 JAX would make 1 of this one."""
    large = np.array([2**32 + 1, 1], np.int64)
    logits = np.zeros((2, 2), np.float32)
    want = np.log(2) * large
    np.testing.assert_allclose(INTEGER(logits, [0, 1], weights=large), want, rtol=1e-6)
    np.testing.assert_allclose(DENSE(logits, large[:, None] * [[1, 0]]), want, rtol=1e-6)


@pytest.mark.parametrize("ignore_index", [3, np.int64(3), np.uint8(3)])
def test_ignore_index_may_be_a_class_and_any_integer(ignore_index):
    losses = INTEGER(LOGITS, LABELS, ignore_index=ignore_index)
    np.testing.assert_array_equal(np.asarray(losses) == 0, LABELS == 3)


@pytest.mark.parametrize("labels", [[2**70], [2**63, -1], [2**40, -(2**99)]], ids=str)
def test_integers_of_python_of_any_size_are_bad_labels(labels):
    assert np.all(np.isnan(INTEGER(np.zeros((len(labels), 3), np.float32), labels)))
