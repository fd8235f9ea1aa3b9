"""Weights and reductions: arithmetic on losses, in which what does not count cannot be heard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import DENSE, INTEGER, TOLERANCE, covering, exact_loss, rng

from jax_sce import linear_softmax_cross_entropy
from jax_sce._elementary import times
from jax_sce._weighting import reduce_losses


def test_sum_and_mean():
    losses, weights = jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 1.0, 2.0])
    np.testing.assert_array_equal(reduce_losses(losses, weights, "none"), losses)
    assert reduce_losses(losses, weights, "sum") == 9.0
    assert reduce_losses(losses, weights, "mean") == 2.25


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], []], ids=str)
def test_a_mean_over_no_weight_is_zero_and_so_are_its_derivatives(weights):
    weights = jnp.asarray(weights, jnp.float32)
    losses = jnp.ones(weights.shape)
    value, gradients = jax.value_and_grad(reduce_losses, (0, 1))(losses, weights, "mean")
    assert value == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, jnp.zeros(weights.shape))
    with jax.debug_nans(True), jax.debug_infs(True):
        jax.grad(reduce_losses)(losses, weights, "mean")


def test_a_weight_of_zero_leaves_out_a_loss_of_infinity_and_nothing_else():
    weights = jnp.array([0.0, 0.0, 0.0, 1.0, 2.0])
    losses = jnp.array([jnp.inf, jnp.nan, 3.0, jnp.inf, 3.0])
    np.testing.assert_array_equal(times(weights, losses), [0.0, jnp.nan, 0.0, jnp.inf, 6.0])
    by_weights = jax.grad(lambda weights: times(weights, losses).sum())(weights)
    np.testing.assert_array_equal(by_weights[jnp.array([0, 2, 4])], [0.0, 3.0, 3.0])


@pytest.mark.parametrize(
    ("kind", "shape", "reduction"),
    covering(["integer", "dense", "linear"], [(), (3, 1)], ["none", "mean"], strength=1),
    ids=str,
)
def test_weights_that_serve_several_examples(kind, shape, reduction):
    """As if they were written out, in the derivative by them as well."""
    labels = jnp.arange(12).reshape(3, 4) % 5
    logits = jnp.sin(jnp.arange(60.0)).reshape(3, 4, 5)
    weights = 0.5 + jnp.arange(float(np.prod(shape))).reshape(shape)

    def loss(logits, weights):
        if kind == "linear":
            eye = jnp.eye(5)
            out = linear_softmax_cross_entropy(
                logits, eye, labels, weights=weights, reduction=reduction
            )
        else:
            given = labels if kind == "integer" else jax.nn.one_hot(labels, 5)
            function = INTEGER if kind == "integer" else DENSE
            out = function(logits, given, weights=weights, reduction=reduction)
        return jnp.sum(jnp.square(out))

    def written_out(logits, weights):
        return loss(logits, jnp.broadcast_to(weights, (3, 4)))

    got, want = (jax.value_and_grad(f, (0, 1))(logits, weights) for f in (loss, written_out))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_mean_divides_by_class_weights_though_nothing_else_weighs():
    logits, labels = rng(5).normal(size=(3, 4)).astype(np.float32), np.array([0, 3, 3], np.int32)
    weights = np.array([2, 1, 1, 0.25], np.float32)
    got = INTEGER(logits, labels, class_weights=weights, reduction="mean")
    want = np.average(exact_loss(logits, labels), weights=weights[labels])
    np.testing.assert_allclose(got, want, rtol=TOLERANCE["loss"])


def test_the_mean_of_one_example_is_its_loss():
    logits, label = np.array([[1, 2, 4]], np.float32), np.array([1], np.int32)
    assert INTEGER(logits, label, reduction="mean") == INTEGER(logits, label)[0]


def test_only_a_weight_of_zero_excuses_what_is_wrong():
    """And it excuses nothing that is right: the derivative by the weight is the loss."""
    logits = rng(6).normal(size=(6, 3)).astype(np.float32)
    logits[4, 0], logits[5, 1] = np.inf, -np.inf
    labels, weights = np.int32([7, 7, 0, 1, 2, 1]), np.float32([0, 1, 0, 1, 0, 0])
    losses, pull = jax.vjp(lambda w: INTEGER(logits, labels, weights=w), weights)
    want = exact_loss(logits[2:4], labels[2:4])
    np.testing.assert_allclose(losses, [0, np.nan, 0, want[1], 0, 0], rtol=TOLERANCE["loss"])
    (of_weights,) = pull(jnp.ones(6))
    np.testing.assert_allclose(of_weights[2:4], want, rtol=TOLERANCE["loss"])
