"""An assertion for your own softmax cross-entropy: does it agree with the naive formula?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .. import reference
from ._oracle import wide


def assert_matches_reference(
    loss_fn: Callable[[Array, Array], Array],
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    rtol: float | None = None,
    **options: Any,
) -> None:
    """Assert that `loss_fn(logits, labels)` has the value and the gradient of the naive formula.

    The loss runs eagerly, under `jax.jit`, and row by row under `jax.vmap`. Its gradient is taken with a
    different cotangent for each row, because a uniform one hides errors. The naive formula
    (`jax_sce.reference`) runs in float64 on the same logits.

    Args:
      loss_fn: Maps logits [N, V] and labels to losses [N].
      logits: [N, V], any floating dtype.
      labels: [N] integers, or [N, V] distributions, for which the gradient with respect to the labels
        is compared too.
      rtol: The error allowed, relative to the largest entry of a row; None means 32 units of roundoff
        of float32, and for gradients of the logits' dtype.
      **options: Passed to the formula, for a loss that smooths, weights classes or caps: scalars, and
        `class_weights`. Arrays with an entry for each example do not go through the `jax.vmap` mode.

    Raises:
      AssertionError: A value or a gradient differs; the message says by how much and in which mode.
      ValueError: Logits or labels have another shape.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jax_sce.testing import assert_matches_reference
      >>> logits, labels = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]]), jnp.array([1, 2])
      >>> assert_matches_reference(optax.softmax_cross_entropy_with_integer_labels, logits, labels)
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape [N, V], got {logits.shape}")
    integer = jnp.issubdtype(labels.dtype, jnp.integer) and labels.ndim == 1
    if labels.shape != (logits.shape[:1] if integer else logits.shape):
        raise ValueError(
            f"labels must be integers of shape {logits.shape[:1]} or distributions of shape "
            f"{logits.shape}, got {labels.dtype} of shape {labels.shape}"
        )
    # Small, of either sign, different in each row, and exact in 16 bits.
    cotangent = np.resize([1.0, -0.5, 0.25, 2.0, -1.5], logits.shape[:1])
    expected = _expected(logits, labels, integer, cotangent, options)

    argnums = (0,) if integer else (0, 1)
    roundoff = float(np.finfo(np.float32).eps)
    loss_rtol = 32 * roundoff if rtol is None else rtol

    def value_and_gradient(fn):
        losses, pull = jax.vjp(lambda *args: fn(*args, *((labels,) if integer else ())),
                               *(logits, labels)[: len(argnums)])  # fmt: skip
        if losses.shape != logits.shape[:1]:
            raise AssertionError(f"the losses have shape {losses.shape}, not {logits.shape[:1]}")
        return losses, pull(jnp.asarray(cotangent, losses.dtype))

    by_row = jax.vmap(lambda z, y: loss_fn(z[None], y[None])[0])
    for mode, fn in {"eager": loss_fn, "jit": jax.jit(loss_fn), "vmap": by_row}.items():
        losses, gradients = value_and_gradient(fn)
        _assert_close(f"loss ({mode})", losses, expected[0], loss_rtol)
        for name, got, want in zip(("logits", "labels"), gradients, expected[1], strict=False):
            eps = 0.0 if rtol is not None else 2 * float(jnp.finfo(got.dtype).eps)
            _assert_close(f"gradient by the {name} ({mode})", got, want, loss_rtol + eps)


def _expected(logits, labels, integer, cotangent, options):
    """Loss and gradients of the naive formula in float64, as NumPy arrays."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        floats = [jnp.asarray(wide(logits))] + ([] if integer else [jnp.asarray(wide(labels))])
        ids = [jnp.asarray(np.asarray(labels))] if integer else []
        naive = (
            reference.softmax_cross_entropy_with_integer_labels
            if integer
            else reference.softmax_cross_entropy
        )

        @jax.jit
        def run(floats, cotangent):
            losses, pull = jax.vjp(lambda *floats: naive(*floats, *ids, **options), *floats)
            return losses, pull(cotangent)

        return jax.tree.map(np.asarray, run(floats, jnp.asarray(cotangent)))


def _assert_close(what: str, got: Array, want: np.ndarray, rtol: float) -> None:
    """Relative to each row's largest entry: an element near a zero crossing has no digits to keep."""
    values = wide(got)
    scale = np.max(np.abs(want), axis=-1, keepdims=True) if want.ndim > 1 else np.abs(want)
    error = np.abs(values - want) / np.where(scale == 0, 1, scale)
    np.testing.assert_array_less(
        error, rtol, err_msg=f"{what}: relative error of {np.max(error):.2e}"
    )
