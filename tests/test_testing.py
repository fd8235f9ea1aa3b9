"""`assert_matches_reference` passes what is right and fails the mistakes that others made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import BOTH, DENSE, INTEGER, cotangents, covering, one_hot, rng

from jax_sce.testing import assert_matches_reference, collectives

N, V = 6, 5
LOGITS = rng(60).normal(size=(N, V)).astype(np.float32)
IDS = np.array([0, 4, 1, 1, 3, 2], np.int32)
DISTRIBUTIONS = rng(61).random((N, V)).astype(np.float32)
OPTIONS = {
    "plain": {},
    "all": {
        "label_smoothing": 0.1,
        "class_weights": np.linspace(0.5, 2, V).astype(np.float32),
        "z_loss": 0.1,
        "softcap": 3.0,
    },
}


@pytest.mark.parametrize(
    ("kind", "options", "dtype"), covering(list(BOTH), list(OPTIONS), ["float32", "bfloat16"])
)
def test_ours_match(kind, options, dtype):
    options = OPTIONS[options]
    labels = IDS if kind == "integer" else DISTRIBUTIONS
    loss = functools.partial(BOTH[kind], **options)
    assert_matches_reference(loss, jnp.asarray(LOGITS, dtype), labels, **options)


def test_ours_match_in_forward_mode_and_in_float64(x64):
    for kind, labels in (("integer", IDS), ("dense", DISTRIBUTIONS.astype(np.float64))):
        loss = functools.partial(BOTH[kind], forward_mode=True)
        assert_matches_reference(loss, LOGITS.astype(np.float64), labels, rtol=1e-12)


def test_confident_rows_match():
    logits = np.array([[12.0, 0, 1], [17.0, 0, -3], [1e6 + 2, 1e6 - 1, 1e6]], np.float32)
    assert_matches_reference(INTEGER, logits, np.zeros(3, np.int32))
    assert_matches_reference(DENSE, logits, one_hot(np.zeros(3, int), 3))


def test_optax_matches_where_it_does_not_cancel(lax_promotion):
    theirs = optax.softmax_cross_entropy_with_integer_labels
    assert_matches_reference(jax.jit(theirs), LOGITS, IDS)
    assert_matches_reference(jax.jit(optax.softmax_cross_entropy), LOGITS, DISTRIBUTIONS)


# -- mistakes ------------------------------------------------------------------------------------


def rule(forward, backward):
    """A loss of ids whose derivative by the logits is `backward(logits, labels, g)`."""

    @jax.custom_vjp
    def loss(logits, labels):
        return forward(logits, labels)

    loss.defvjp(
        lambda z, y: (forward(z, y), (z, y)), lambda kept, g: (backward(*kept, g[:, None]), None)
    )
    return loss


def normalizer(z):
    return jax.nn.logsumexp(z, axis=-1)


def picked(z, y):
    return jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]


def usual(z, y):
    return normalizer(z) - picked(z, y)


def one_hots(z, y):
    return jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)


def gradient(z, y, g):
    return g * (jax.nn.softmax(z) - one_hots(z, y))


def with_z_loss(z, y):
    return usual(z, y) + 0.1 * normalizer(z) ** 2


def capped(z):
    return 3 * jnp.tanh(z / 3)


def smooth(z, y):
    return 0.9 * usual(z, y) + 0.1 * (normalizer(z) - z.mean(-1))


CONFIDENT = np.array([[17.0, 0, -3], [0.0, 15.0, 3]], np.float32)
IDS2 = np.array([0, 1], np.int32)

MISTAKES = {
    "cotangent ignored": (rule(usual, lambda z, y, g: gradient(z, y, 1 + 0 * g)), {}, None),
    "cotangent averaged": (rule(usual, lambda z, y, g: gradient(z, y, g.mean())), {}, None),
    "cotangent of the z-loss dropped": (rule(with_z_loss, gradient), {"z_loss": 0.1}, None),
    "slope of the soft-cap dropped": (
        rule(lambda z, y: usual(capped(z), y), lambda z, y, g: gradient(capped(z), y, g)),
        {"softcap": 3.0},
        None,
    ),
    "smoothing not in the gradient": (rule(smooth, gradient), {"label_smoothing": 0.1}, None),
    "smoothing over the other classes": (
        lambda z, y: smooth(z, y) * 1.02,
        {"label_smoothing": 0.1},
        None,
    ),
    "value cancels": (rule(usual, gradient), {}, (CONFIDENT, IDS2)),
    "gradient cancels": (
        rule(INTEGER, lambda z, y, g: g * (jax.nn.softmax(z) - one_hots(z, y))),
        {},
        (CONFIDENT, IDS2),
    ),
    "-1 is the last class": (
        rule(lambda z, y: usual(z, y % V), lambda z, y, g: gradient(z, y % V, g)),
        {},
        (LOGITS, np.array([0, -1, 1, 1, 3, 2], np.int32)),
    ),
    "16 bits kept": (
        lambda z, y: usual(z, y),
        {},
        (jnp.asarray(LOGITS, jnp.bfloat16), IDS),
    ),
    "padding counted": (
        lambda z, y: usual(jnp.pad(z, ((0, 0), (0, 3))), y),
        {},
        None,
    ),
    "gradient off by a hundred-thousandth": (
        rule(usual, lambda z, y, g: gradient(z, y, g) * (1 + 1e-5)),
        {},
        None,
    ),
    "wrong shape": (lambda z, y: usual(z, y)[:, None], {}, None),
    "a mean": (lambda z, y: usual(z, y).mean(), {}, None),
}


@pytest.mark.parametrize(("loss", "options", "data"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_fails(loss, options, data, lax_promotion):
    logits, labels = (LOGITS, IDS) if data is None else data
    with pytest.raises((AssertionError, IndexError)):
        assert_matches_reference(jax.jit(loss), logits, labels, **options)


def dense_with(by_logits, by_labels):
    @jax.custom_vjp
    def loss(z, y):
        return optax.softmax_cross_entropy(z, y)

    loss.defvjp(
        lambda z, y: (loss(z, y), (z, y)),
        lambda kept, g: (g[:, None] * by_logits(*kept), g[:, None] * by_labels(*kept)),
    )
    return loss


def minus_log_softmax(z, y):
    del y
    return -jax.nn.log_softmax(z)


@pytest.mark.parametrize(
    ("by_logits", "by_labels"),
    [
        pytest.param(lambda z, y: jax.nn.softmax(z) - y, minus_log_softmax, id="mass forgotten"),
        pytest.param(
            lambda z, y: jax.nn.softmax(z) * y.sum(-1, keepdims=True) - y,
            lambda z, y: jnp.zeros_like(y),
            id="labels' cotangent dropped",
        ),
    ],
)
def test_a_mistake_with_distributions_fails(by_logits, by_labels, lax_promotion):
    with pytest.raises(AssertionError):
        assert_matches_reference(dense_with(by_logits, by_labels), LOGITS, DISTRIBUTIONS)


def test_the_message_says_what_differs_and_in_which_mode():
    with pytest.raises(AssertionError, match=r"loss \(eager\).*relative error of"):
        assert_matches_reference(lambda z, y: INTEGER(z, y) * 1.001, LOGITS, IDS)

    def only_wrong_under_jit(z, y):
        traced = isinstance(z, jax.core.Tracer) and not hasattr(z, "primal")
        return INTEGER(z, y) * (1.5 if traced else 1.0)

    with pytest.raises(AssertionError, match=r"\((jit|vmap)\)"):
        assert_matches_reference(only_wrong_under_jit, LOGITS, IDS)


def test_a_tolerance_can_be_given():
    def off(z, y):
        return INTEGER(z, y) * (1 + 1e-4)

    assert_matches_reference(off, LOGITS, IDS, rtol=1e-3)
    with pytest.raises(AssertionError):
        assert_matches_reference(off, LOGITS, IDS, rtol=1e-5)
    assert np.unique(cotangents(N)).size > 1


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("%b = f32[64]{0} all-gather(%a), dimensions={0}", 256),
        ("%b = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), dimensions={0}", 256),
        ("%b = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a)", 32),
        ("%b = f32[8]{0} all-reduce-start(%a), to_apply=%add", 32),
        ("%b = f32[1]{0} reduce-scatter(%a), to_apply=%add", 32),
        ("%b = f8e4m3fn[64]{0} all-gather(%a)", 64),
        ("%b = f32[8]{0} ragged-all-to-all(%a)", 32),
    ],
)
def test_collectives_counts_all_that_is_sent(line, size):
    class Program:
        def as_text(self):
            return f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n  {line}\n}}"

    (found,) = collectives(Program())
    assert (found.bytes, found.in_loop) == (size, False)
