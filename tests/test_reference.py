"""The specification itself, against numbers worked out by hand and central differences."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import cotangents, rng

from jax_sce import reference

LOG2, LOG3 = math.log(2), math.log(3)
INTEGER = reference.softmax_cross_entropy_with_integer_labels
DENSE = reference.softmax_cross_entropy

# Softmax of these: (1/2, 1/2), (1/3, 2/3), (1/4, 3/4); normalizers 2, 3, 4.
LOGITS = np.log([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
IDS = np.array([0, 1, 0])
COSTS = np.array([LOG2, LOG3 - LOG2, 2 * LOG2])  # -log of 1/2, 2/3, 1/4
NORMALIZERS = np.array([LOG2, LOG3, 2 * LOG2])

BY_HAND = {
    "plain": ({}, COSTS),
    "weights": ({"weights": np.array([2.0, 0.0, 0.5])}, COSTS * [2, 0, 0.5]),
    "class_weights": ({"class_weights": np.array([2.0, 3.0])}, COSTS * [2, 3, 2]),
    "z_loss": ({"z_loss": 0.5}, COSTS + 0.5 * NORMALIZERS**2),
    "sum": ({"reduction": "sum"}, COSTS.sum()),
    "mean": ({"reduction": "mean"}, COSTS.mean()),
    "ignored": ({"ignore_index": 1}, COSTS * [1, 0, 1]),
    "ignored in a mean": ({"ignore_index": 1, "reduction": "mean"}, (COSTS[0] + COSTS[2]) / 2),
    "weighted mean": (
        {
            "weights": np.array([1.0, 2.0, 0.5]),
            "class_weights": np.array([2.0, 3.0]),
            "reduction": "mean",
        },
        (2 * COSTS[0] + 6 * COSTS[1] + COSTS[2]) / (2 + 6 + 1),
    ),
    "label_smoothing": (
        {"label_smoothing": 0.5},
        0.75 * COSTS + 0.25 * np.array([LOG2, LOG3, 2 * LOG2 - LOG3]),
    ),
    "examples masked": ({"where": np.array([[True], [False], [True]])}, COSTS * [1, 0, 1]),
    "class masked": (
        {"where": np.array([[True, True], [False, True], [True, False]])},
        [LOG2, 0.0, 0.0],
    ),
    "smoothing over a masked class": (
        {"where": np.array([[True, True], [False, True], [True, False]]), "label_smoothing": 0.5},
        [LOG2, 0.0, 0.0],
    ),
}


@pytest.fixture(autouse=True)
def default_promotion(x64, lax_promotion):
    """The formulas are written for JAX's defaults."""


@pytest.mark.parametrize(("options", "want"), BY_HAND.values(), ids=BY_HAND)
def test_integer_labels_by_hand(options, want):
    np.testing.assert_allclose(INTEGER(LOGITS, IDS, **options), want, rtol=1e-14, atol=1e-15)


def test_distributions_by_hand():
    got = DENSE(LOGITS, np.array([[1.0, 3.0], [0.0, 0.0], [0.5, 0.5]]))
    np.testing.assert_allclose(got, [4 * LOG2, 0, 0.5 * (2 * LOG2 + 2 * LOG2 - LOG3)], rtol=1e-14)


def test_a_mean_of_distributions_divides_by_the_weights_alone():
    options = {"weights": np.array([1.0, 2.0, 0.5]), "class_weights": np.array([2.0, 3.0])}
    got = DENSE(LOGITS, np.eye(2)[IDS], reduction="mean", **options)
    want = (2 * COSTS[0] + 6 * COSTS[1] + COSTS[2]) / 3.5
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_a_soft_cap_by_hand():
    got = INTEGER(np.array([[3.0, 0.0]]), np.array([1]), softcap=2.0)
    np.testing.assert_allclose(got, [np.log1p(np.exp(2 * np.tanh(1.5)))], rtol=1e-14)


@pytest.mark.parametrize("label", [-1, 2, -100])
def test_a_label_outside_the_classes_is_nan(label):
    labels = np.array([0, label, 0])
    np.testing.assert_array_equal(np.isnan(INTEGER(LOGITS, labels)), [False, True, False])
    assert np.isnan(INTEGER(LOGITS, labels, reduction="mean"))
    assert not np.isnan(INTEGER(LOGITS, labels, ignore_index=label)).any()


MASK = np.array([[True, True, False, True], [True] * 4, [False, True, True, True]])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("where", [None, MASK], ids=["all", "class mask"])
@pytest.mark.parametrize("fn", [INTEGER, DENSE], ids=["integer", "dense"])
def test_its_derivatives_are_those_of_its_values(fn, where, reduction):
    """By central differences, whose own error is some 1e-9."""
    labels = np.array([1, 0, 3])
    floats = {
        "logits": rng(50).normal(size=(3, 4)),
        "weights": np.array([0.5, 2.0, 1.0]),
        "class_weights": np.array([0.5, 1.0, 2.0, 1.5]),
        "label_smoothing": np.array(0.2),
        "z_loss": np.array(0.1),
        "softcap": np.array(3.0),
    }
    if fn is DENSE:
        floats["labels"] = rng(51).random((3, 4))
    rest = {} if fn is DENSE else {"labels": labels}

    @jax.jit
    def scalar(floats):
        losses = functools.partial(fn, where=where, reduction=reduction, **rest)(**floats)
        return jnp.vdot(losses, cotangents(losses.shape))

    gradients = jax.jit(jax.grad(scalar))({k: jnp.asarray(v) for k, v in floats.items()})
    for name, value in floats.items():
        numeric = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            step = np.zeros(value.shape)
            step[index] = 1e-5
            difference = scalar({**floats, name: value + step}) - scalar(
                {**floats, name: value - step}
            )
            numeric[index] = difference / 2e-5
        np.testing.assert_allclose(gradients[name], numeric, atol=1e-8, err_msg=name)


def test_it_is_plain_jax():
    """No rule of its own: nothing in it can share a mistake with what it is compared with."""
    for fn, labels in ((INTEGER, jnp.asarray(IDS)), (DENSE, jnp.eye(2)[IDS])):
        text = str(jax.make_jaxpr(lambda z, fn=fn, labels=labels: fn(z, labels))(LOGITS))
        assert "custom_vjp" not in text
