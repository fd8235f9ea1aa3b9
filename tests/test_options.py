"""Every option, alone and with every other, against the naive formula in float64, with derivatives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    BOTH,
    TOLERANCE,
    cotangents,
    derivatives,
    one_hot,
    reference_derivatives,
    rng,
    sparse,
)

N, V = 5, 7
LOGITS = rng(10).normal(size=(N, V))
LABELS = np.array([3, 0, 6, 2, 3], np.int32)
TARGETS = rng(11).random((N, V)) * np.array([[1.0], [0.3], [2.0], [1.0], [0.0]])  # sums are not one
KINDS = BOTH | {"sparse": sparse}
IDS = np.array([[3, 0, 3, -1], [1, -1, -1, 5], [6, 6, 6, 6], [4, 0, 2, 1], [0, 1, 2, 3]], np.int32)

CLASS_MASK = np.ones((N, V), bool)
CLASS_MASK[[0, 0, 1, 3], [1, 6, 4, 0]] = False
CLASS_MASK[4] = False  # nothing left of this example

# Arrays; those that are floats are differentiated.
ARRAYS = {
    "keep classes": {"where": CLASS_MASK},
    "keep examples": {"where": np.array([True, False, True, True, True])},
    "label_smoothing": {"label_smoothing": np.float64(0.15)},
    "class_weights": {"class_weights": np.array([0.5, 2.0, 1.0, 0.25, 3.0, 0.0, 1.5])},
    "weights": {"weights": np.array([1.0, 0.5, 0.0, 2.0, 0.25])},
    "z_loss": {"z_loss": np.float64(0.3)},
    "softcap": {"softcap": np.float64(1.5)},
    "temperature": {"temperature": np.array([0.5, 2.0, 1.5, 0.25, 1.0])},
}
STATIC = {
    "ignore_index": {"ignore_index": 3},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
}
OPTIONS = ARRAYS | STATIC


def clash(options):
    keys = [key for option in options for key in OPTIONS[option]]
    return len(set(keys)) < len(keys)


def sets_of(names):
    """Sets of four options, so that every pair that can be together is in one of them."""
    pairs = [pair for pair in itertools.combinations(names, 2) if not clash(pair)]
    while pairs:
        chosen = list(pairs[0])
        while len(chosen) < 4:
            fitting = [o for o in names if o not in chosen and not clash([*chosen, o])]
            chosen.append(max(fitting, key=lambda o: sum(set(p) <= {*chosen, o} for p in pairs)))
        yield tuple(name for name in names if name in chosen)
        pairs = [pair for pair in pairs if not set(pair) <= set(chosen)]


def names_for(kind):
    return [o for o in OPTIONS if kind == "integer" or o != "ignore_index"]


def cases():
    for kind in KINDS:
        names = names_for(kind)
        everything = tuple(o for o in names if o not in ("keep examples", "sum"))
        sets = [(), *sets_of(names), everything]
        for options in [*sets, *((name,) for name in names)]:
            marks = () if options in sets else pytest.mark.thorough
            yield pytest.param(kind, options, marks=marks, id="-".join([kind, *options]))


CASES = list(cases())


def test_every_pair_is_in_a_case():
    for kind in KINDS:
        for pair in itertools.combinations(names_for(kind), 2):
            together = [p for p in CASES if p.values[0] == kind and set(pair) <= set(p.values[1])]
            assert bool(together) == (not clash(pair))


TANGENT_CASES = ((), ("keep classes",), ("class_weights",), ("z_loss",), ("mean",))


def arguments_of(kind, options):
    arrays, static = {}, {}
    for option in options:
        (static if option in STATIC else arrays).update(OPTIONS[option])
    labels = {
        "integer": {"labels": LABELS},
        "dense": {"labels": TARGETS},
        "sparse": {"ids": IDS, "values": TARGETS[:, :4] - 0.2},
    }[kind]
    arguments = {"logits": LOGITS, **labels, **arrays}
    return {name: jnp.asarray(x) for name, x in arguments.items()}, static


def expected(kind, arguments, static):
    cotangent = 0.7 if static.get("reduction", "none") != "none" else cotangents(N)
    arguments = dict(arguments)
    if arguments.get("where") is not None and arguments["where"].ndim == 1:
        arguments["where"] = arguments["where"][:, None]
    return cotangent, reference_derivatives(kind, arguments, cotangent, **static)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_options_agree_with_the_naive_formula(kind, options, x64):
    arguments, static = arguments_of(kind, options)
    cotangent, want = expected(kind, arguments, static)
    ours = functools.partial(derivatives, functools.partial(KINDS[kind], **static))
    assert_trees_close(jax.jit(ours)(arguments, cotangent), want)


@pytest.mark.parametrize(
    ("kind", "options"), [p for p in CASES if p.values[1] in TANGENT_CASES or len(p.values[1]) > 4]
)
def test_options_agree_in_the_forward_mode_rule(kind, options, x64):
    arguments, static = arguments_of(kind, options)
    cotangent, want = expected(kind, arguments, static)
    fn = functools.partial(KINDS[kind], forward_mode=True, **static)
    floats = {k: v for k, v in arguments.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    rest = {k: v for k, v in arguments.items() if k not in floats}
    direction = {k: rng(12).normal(size=v.shape) for k, v in floats.items()}

    @jax.jit
    def both_modes(floats, rest, direction):
        _, tangent = jax.jvp(lambda floats: fn(**floats, **rest), (floats,), (direction,))
        return derivatives(fn, floats | rest, cotangent), tangent

    got, tangent = both_modes(floats, rest, direction)
    assert_trees_close(got, want)
    # The tangent along a direction is the gradient in that direction.
    along = sum(np.sum(np.asarray(want[1][k]) * direction[k]) for k in floats)
    np.testing.assert_allclose(np.sum(tangent * cotangent), along, rtol=1e-11)


def assert_trees_close(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=TOLERANCE["float64"], err_msg="value")
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        assert got[1][name].dtype == want[1][name].dtype
        # Elements may cross zero: there, relative to the naive formula's terms, of size 1.
        np.testing.assert_allclose(
            got[1][name],
            want[1][name],
            rtol=TOLERANCE["float64"],
            atol=TOLERANCE["float64"],
            err_msg=f"gradient by {name}",
        )


@pytest.mark.parametrize("options", [(), *((name,) for name in names_for("integer")[:3])])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_integers_are_one_hot_distributions(options, reduction, x64):
    arrays = {k: jnp.asarray(v) for o in options for k, v in OPTIONS[o].items()}
    one_hots = jnp.asarray(one_hot(LABELS, V, np.float64))
    by_id = BOTH["integer"](LOGITS, LABELS, reduction=reduction, **arrays)
    by_distribution = BOTH["dense"](LOGITS, one_hots, reduction=reduction, **arrays)
    if options != ("keep classes",):  # where the two differ, on purpose, at a label that is masked
        np.testing.assert_allclose(by_id, by_distribution, rtol=TOLERANCE["float64"])


def test_smoothing_covers_the_classes_of_the_row_that_where_leaves(x64):
    """By hand: the same as the smoothed loss of the row without the masked classes."""
    kept = np.array([0, 2, 3])
    where = np.isin(np.arange(V), kept)
    for kind, labels, short in (
        ("integer", np.int32(2), np.int32(1)),
        ("dense", one_hot(2, V, np.float64), one_hot(1, 3, np.float64)),
    ):
        got = BOTH[kind](LOGITS[0], labels, where=where, label_smoothing=0.3)
        want = BOTH[kind](LOGITS[0, kept], short, label_smoothing=0.3)
        np.testing.assert_allclose(got, want, rtol=TOLERANCE["float64"])


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    "shape", [(N,), (1,), (N, V), (1, V), (N, 1), (1, 1)], ids=lambda shape: str(shape)
)
def test_where_broadcasts_to_the_examples_or_the_logits(kind, shape):
    logits, where = np.float32(LOGITS), rng(13).random(shape) < 0.6
    full = np.broadcast_to(where[:, None] if where.ndim == 1 else where, (N, V))
    labels = np.argmax(full, -1).astype(np.int32)  # on a class that is left
    labels = labels if kind == "integer" else one_hot(labels, V)
    want = BOTH[kind](logits, labels, where=full)
    got = BOTH[kind](logits, labels, where=where)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE["rounded"])
    np.testing.assert_array_equal(np.asarray(want)[~full.any(-1)], 0.0)


@pytest.mark.parametrize("kind", BOTH)
def test_the_rank_of_where_alone_decides_what_it_is_of(kind, x64):
    """As many examples as classes, and one example: the shapes do not tell."""
    square, mask = LOGITS[:, :N], np.arange(N) % 2 == 0
    ids = np.zeros(N, np.int32)
    labels = ids if kind == "integer" else one_hot(ids, N, np.float64)
    whole = np.asarray(BOTH[kind](square, labels))
    np.testing.assert_array_equal(BOTH[kind](square, labels, where=mask), np.where(mask, whole, 0))
    np.testing.assert_allclose(
        BOTH[kind](square, labels, where=mask[None]),
        BOTH[kind](square[:, mask], labels if kind == "integer" else labels[:, mask]),
        rtol=TOLERANCE["float64"],
    )
    one, label = square[0], labels[0]
    for keep in (True, False):  # the example, or each of its classes
        for where in (np.array(keep), np.array([keep])):
            np.testing.assert_array_equal(
                BOTH[kind](one, label, where=where), whole[0] if keep else 0
            )


@pytest.mark.parametrize("axis", [0, -2, (0, 2), (-1, 0), None], ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_axes_are_read_in_the_order_given(kind, axis, x64):
    shape = (2, 3, 4)
    axes = (0, 1, 2) if axis is None else np.atleast_1d(axis) % 3
    batch = [a for a in range(3) if a not in axes]
    logits = rng(14).normal(size=shape)
    last = logits.transpose(*batch, *axes).reshape(*(shape[a] for a in batch), -1)
    labels = rng(15).integers(0, last.shape[-1], last.shape[:-1], dtype=np.int32)
    targets = one_hot(labels, last.shape[-1], np.float64)
    targets_here = targets.reshape(*(shape[a] for a in [*batch, *axes]))
    targets_here = targets_here.transpose(np.argsort([*batch, *axes]))
    weights = np.linspace(0.5, 2, last.shape[-1])
    options = {"class_weights": weights, "softcap": 2.0, "label_smoothing": 0.1, "temperature": 0.7}

    @functools.partial(jax.jit, static_argnums=2)
    def losses_and_gradient(logits, labels, axis):
        losses, pull = jax.vjp(lambda z: BOTH[kind](z, labels, axis, **options), logits)
        return losses, pull(jnp.asarray(cotangents(losses.shape)))[0]

    labels, labels_here = (labels, labels) if kind == "integer" else (targets, targets_here)
    want_losses, want = losses_and_gradient(last, labels, -1)
    got_losses, got = losses_and_gradient(logits, labels_here, axis)
    np.testing.assert_allclose(got_losses, want_losses, rtol=TOLERANCE["float64"])
    got = got.transpose(*batch, *axes).reshape(last.shape)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE["float64"], atol=1e-15)


def test_class_masks_move_with_the_class_axis(x64):
    logits = LOGITS.T
    for kind, labels in (("integer", LABELS), ("dense", TARGETS.T)):
        options = {"label_smoothing": 0.2, "class_weights": np.linspace(0.5, 2, V)}
        got = BOTH[kind](logits, labels, 0, CLASS_MASK.T, **options)
        want = BOTH[kind](logits.T, labels.T, -1, CLASS_MASK, **options)
        np.testing.assert_allclose(got, want, rtol=TOLERANCE["float64"])


@pytest.mark.parametrize("kind", BOTH)
def test_scalar_options_of_python_numpy_and_jax_are_the_same(kind):
    logits = jnp.asarray(LOGITS, jnp.float32)
    labels = LABELS if kind == "integer" else jnp.asarray(TARGETS, jnp.float32)
    values = {"label_smoothing": 0.25, "z_loss": 0.5, "softcap": 2.0, "temperature": 0.5}
    want = BOTH[kind](logits, labels, **values)
    for make in (np.float32, np.float64, np.asarray, jnp.float32, jnp.bfloat16, jnp.float16):
        got = BOTH[kind](logits, labels, **{k: make(v) for k, v in values.items()})
        np.testing.assert_array_equal(got, want)
    zero = BOTH[kind](logits, labels, label_smoothing=jnp.zeros(()), z_loss=jnp.zeros(()))
    np.testing.assert_allclose(zero, BOTH[kind](logits, labels), rtol=TOLERANCE["loss"])
    endless = BOTH[kind](logits, labels, softcap=1e6)  # tanh(x) = x here, to 1e-12
    np.testing.assert_allclose(endless, BOTH[kind](logits, labels), rtol=TOLERANCE["loss"])
