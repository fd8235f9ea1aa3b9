"""optax's own tests of these two losses, run against ours."""

import functools

import jax.test_util
import numpy as np
import pytest
from numpy.testing import assert_allclose
from optax.losses import _classification, _classification_test

import jax_sce

NAMES = ("softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels")


@pytest.fixture(autouse=True)
def ours_in_place_of_theirs(lax_promotion, monkeypatch, request):
    """optax checks gradients in forward mode too, for which ours have a rule of their own."""
    # Theirs draw a mask that now and then leaves no class, which is an error here.
    np.random.seed(0)  # noqa: NPY002
    forward_mode = "Reverse" not in request.node.nodeid
    called = []

    def recorded(name):
        fn = functools.partial(getattr(jax_sce, name), forward_mode=forward_mode)
        return lambda *args, **kwargs: called.append(name) or fn(*args, **kwargs)

    # Some of theirs ask for the same numbers of another layout to 1e-7, NumPy's default, which is less
    # than one unit in the last place; XLA may round a fused sum of another layout otherwise by that.
    closeness = functools.partial(assert_allclose, rtol=2.0**-23)
    monkeypatch.setattr(np.testing, "assert_allclose", closeness)
    for name in NAMES:
        monkeypatch.setattr(_classification, name, recorded(name))
    if not forward_mode:
        check = functools.partial(jax.test_util.check_grads, modes=["rev"])
        monkeypatch.setattr(jax.test_util, "check_grads", check)
    yield
    assert called  # optax's tests reach the functions by the name that is patched


class TestDenseForward(_classification_test.SoftmaxCrossEntropyTest):
    pass


class TestIntegerForward(_classification_test.SoftmaxCrossEntropyWithIntegerLabelsTest):
    pass


class TestDenseReverse(_classification_test.SoftmaxCrossEntropyTest):
    pass


class TestIntegerReverse(_classification_test.SoftmaxCrossEntropyWithIntegerLabelsTest):
    pass
