"""float32 losses and gradients against float64, where the usual formulas cancel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import (
    BOTH,
    INTEGER,
    TOLERANCE,
    exact_gradient,
    exact_loss,
    rng,
    targets_like,
    wide,
)


@functools.lru_cache
def compiled(kind, forward_mode):
    fn = functools.partial(BOTH[kind], forward_mode=forward_mode)

    @jax.jit
    def value_and_gradient(logits, labels):
        losses, pull = jax.vjp(lambda z: fn(z, labels), logits)
        return losses, pull(jnp.ones_like(losses))[0]

    return value_and_gradient


def check(kind, logits, labels, forward_mode=False):
    """A loss within 1e-6, each element of the gradient within (6 + |z_j - max|) 2^-22; relative."""
    logits = np.asarray(logits, np.float32)
    targets = targets_like(labels, logits.shape[-1], kind)
    losses, gradient = compiled(kind, forward_mode)(logits, targets)
    np.testing.assert_allclose(
        losses, exact_loss(logits, labels), rtol=TOLERANCE["loss"], atol=TOLERANCE["underflow"]
    )
    want = exact_gradient(logits, labels)
    distance = wide(logits).max(-1, keepdims=True) - wide(logits)
    allowed = (6 + distance) * TOLERANCE["gradient"] * np.abs(want) + TOLERANCE["underflow"]
    np.testing.assert_array_less(np.abs(gradient - want), allowed)


def confident(num_classes, gaps, seed=0):
    """Label 0 leads by `gap`; the others lie up to 3 below the second."""
    generator = rng(seed)
    others = -np.asarray(gaps)[:, None] - 3 * generator.random((len(gaps), num_classes - 1))
    others[:, 0] = -np.asarray(gaps)
    return np.concatenate([np.zeros((len(gaps), 1)), others], -1)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_confident_predictions_keep_their_digits(kind, num_classes):
    gaps = np.linspace(5, 80, 76)
    logits = confident(num_classes, gaps)
    check(kind, logits, np.zeros(len(gaps), np.int32))


@pytest.mark.parametrize("kind", BOTH)
def test_confidently_wrong_predictions_keep_their_digits(kind):
    gaps = np.linspace(5, 80, 76)
    check(kind, confident(10, gaps), np.resize(np.arange(1, 10, dtype=np.int32), len(gaps)))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6, 1e8, -1e8])
def test_a_common_offset_costs_nothing(kind, offset):
    spread = rng(1).normal(0, max(1, abs(offset) * 2.0**-22), (76, 10))
    logits = np.float32(offset) + spread.astype(np.float32)
    check(kind, logits, rng(2).integers(0, 10, 76, dtype=np.int32))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("num_classes", [65, 1024, 50257, 131072])
def test_long_rows_keep_their_digits(kind, num_classes):
    logits = np.concatenate(
        [
            rng(3).normal(0, 1e-3, (1, num_classes)),
            rng(4).normal(0, 3, (2, num_classes)),
            confident(num_classes, [5, 20, 40, 80]),
        ]
    )
    labels = np.array([5, 0, int(np.argmax(logits[2].astype(np.float32))), 0, 0, 0, 0], np.int32)
    check(kind, logits, labels)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("scale", [1e-3, 1e-1, 1.0, 10.0, 100.0])
def test_any_scale_keeps_its_digits(kind, scale):
    check(kind, rng(5).normal(0, scale, (76, 10)), rng(6).integers(0, 10, 76, dtype=np.int32))


@pytest.mark.parametrize("kind", BOTH)
def test_ties_keep_their_digits(kind):
    logits = np.repeat(confident(10, [5, 20, 80]), 4, 0)
    for row, ties in enumerate([2, 3, 9, 10] * 3):
        logits[row, :ties] = 0.0
    for label in (0, 1, 9):
        check(kind, logits, np.full(12, label, np.int32))


@pytest.mark.parametrize("kind", BOTH)
def test_the_forward_mode_rule_is_as_exact(kind):
    gaps = np.linspace(5, 80, 76)
    check(kind, confident(10, gaps), np.zeros(76, np.int32), forward_mode=True)
    check(kind, rng(7).normal(0, 10, (76, 10)), np.full(76, 3, np.int32), forward_mode=True)


@pytest.mark.parametrize("kind", BOTH)
def test_smoothed_losses_keep_their_digits(kind):
    logits, smoothing = confident(10, np.linspace(1, 40, 76)).astype(np.float32), np.float32(1e-3)
    labels = np.zeros(76, np.int32)
    got = BOTH[kind](logits, targets_like(labels, 10, kind), label_smoothing=smoothing)
    by_class = np.stack([exact_loss(logits, np.full(76, c)) for c in range(10)], -1)
    targets = (1 - wide(smoothing)) * (np.arange(10) == 0) + wide(smoothing) / 10
    np.testing.assert_allclose(got, by_class @ targets, rtol=TOLERANCE["loss"])


@pytest.mark.parametrize("mask", ["no mask", "nothing masked", "class mask"])
@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [(10, "float32"), (65, "float32"), (1024, "float32"), (128, "bfloat16")],
)
@pytest.mark.parametrize("kind", BOTH)
def test_soft_capped_rows_keep_their_digits(kind, num_classes, dtype, mask):
    """The maximum is one entry, though tanh may round differently each time that it is read."""
    logits = jnp.asarray(rng(9).normal(0, 5, (64, num_classes)), dtype)
    logits = logits.at[:16, 3].set(60.0)  # with a cap of 30: leads by 8 to 15
    where = np.ones((64, num_classes), bool)
    where[:, num_classes // 2] = mask != "class mask"
    labels = np.argmax(np.where(where, wide(logits), -np.inf), -1).astype(np.int32)
    targets = targets_like(labels, num_classes, kind)
    cap = 30.0

    @jax.jit
    def loss(logits):
        return BOTH[kind](logits, targets, where=None if mask == "no mask" else where, softcap=cap)

    capped = np.where(where, cap * np.tanh(wide(logits) / cap), -np.inf)
    # A capped logit is rounded at its own size, and its distance to the maximum with it.
    np.testing.assert_allclose(loss(logits), exact_loss(capped, labels), rtol=4 * cap * 2.0**-23)


# -- the tables of the design --------------------------------------------------------------------

TABLE = {
    "gap 10": ([10.0, 0.0], 4.5398899e-05),
    "gap 17": ([17.0, 0.0], 4.1399376e-08),
    "offset 1e6": ([1e6 + 2, 1e6 - 1], 0.0485873516),
    "tie at 1e8": ([1e8, 1e8], 0.6931471806),
}


@pytest.mark.parametrize(("logits", "true"), TABLE.values(), ids=TABLE)
@pytest.mark.parametrize("kind", BOTH)
def test_the_table_of_losses(kind, logits, true):
    logits = np.array(logits, np.float32)
    np.testing.assert_allclose(exact_loss(logits, 0), true, rtol=1e-8)
    got = BOTH[kind](logits, targets_like(np.int32(0), 2, kind))
    np.testing.assert_allclose(got, exact_loss(logits, 0), rtol=1.2e-7)


@pytest.mark.parametrize("logits", [row[0] for row in TABLE.values()], ids=TABLE)
def test_the_table_can_tell_the_usual_formula_apart(logits, lax_promotion):
    logits = np.array(logits, np.float32)
    usual = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.int32(0))
    assert abs(usual - exact_loss(logits, 0)) > 1e-3 * exact_loss(logits, 0)


@pytest.mark.parametrize("gap", [10.0, 15.0, 17.0, 30.0, 80.0])
@pytest.mark.parametrize("kind", BOTH)
def test_the_gradient_at_the_label_of_a_confident_row(kind, gap):
    logits = np.array([gap, 0.0], np.float32)
    got = jax.grad(BOTH[kind])(logits, targets_like(np.int32(0), 2, kind))
    np.testing.assert_allclose(got, exact_gradient(logits, np.int32(0)), rtol=2e-7)


# -- 16 bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("num_classes", [10, 256])
def test_16_bits_are_only_storage(kind, dtype, num_classes):
    """The loss is that of the widened logits, and the gradient is rounded once, at the end."""
    logits = np.concatenate(
        [rng(8).normal(0, 3, (5, num_classes)), confident(num_classes, [5, 12, 15, 30])]
    )
    logits = jnp.asarray(logits, dtype)
    labels = np.zeros(9, np.int32)
    targets = targets_like(labels, num_classes, kind)
    losses, gradient = compiled(kind, False)(logits, targets)
    widened, _ = compiled(kind, False)(logits.astype(jnp.float32), targets)
    assert (losses.dtype, gradient.dtype) == (jnp.float32, logits.dtype)
    # Not bit by bit: XLA may order the sums of the two programs differently.
    np.testing.assert_allclose(losses, widened, rtol=TOLERANCE["rounded"])
    np.testing.assert_allclose(losses, exact_loss(logits, labels), rtol=TOLERANCE["loss"])
    rounding, floor = TOLERANCE[dtype]
    want = exact_gradient(logits, labels)
    float32_error = (6 + wide(logits).max(-1, keepdims=True) - wide(logits)) * 2.0**-22
    allowed = np.abs(want) * (rounding + 2 * float32_error) + floor
    np.testing.assert_array_less(np.abs(wide(gradient) - want), allowed * 1.0000001)


@pytest.mark.parametrize("num_classes", [257, 307, 2049, 2058, 4099])
def test_any_number_of_classes_can_be_cut_in_blocks(num_classes):
    """Primes, and numbers that leave a rest of which no block width is a divisor."""
    logits = rng(9).normal(size=(3, num_classes)).astype(np.float32)
    labels = np.array([0, num_classes // 2, num_classes - 1], np.int32)
    got = INTEGER(logits, labels)
    np.testing.assert_allclose(got, exact_loss(logits, labels), rtol=TOLERANCE["loss"])
