"""The specification: the losses as naive formulas, without a derivative rule.

They are slow, but short enough to check by reading. The tests of this
library compare the losses with them, in float64 and for finite logits. In
float32 they can lose digits, even all of them, where the losses do not.
`jax.grad` differentiates them.

Both functions take logits [N..., V] with the classes on the last axis.
`where` is a mask of classes, [N..., V]. The other options are those of the
functions of the same name in `jax_sce`.

Example:
  >>> import jax.numpy as jnp
  >>> from jax_sce import reference
  >>> logits, labels = jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5])
  >>> print(f"{reference.softmax_cross_entropy(logits, labels):.4f}")
  0.8133
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._types import Reduction

__all__ = ["softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"]


@functools.partial(jax.jit, static_argnames=("reduction",))
def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None = None, *,
    label_smoothing: ArrayLike = 0.0, class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0, softcap: ArrayLike | None = None,
    temperature: ArrayLike | None = None, reduction: Reduction = "none",
) -> Array:  # fmt: skip
    """`weights * (sum_c w_c y'_c (-log o_c) + z_loss L^2)`, [N...] or a scalar.

    Labels are distributions, [N..., V].

    Raises:
      ValueError: The shapes do not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> print(f"{softmax_cross_entropy(jnp.zeros(4), jnp.eye(4)[2]):.4f}")
      1.3863
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    kept = jnp.ones(logits.shape, bool) if where is None else jnp.asarray(where)
    kept = jnp.broadcast_to(kept, logits.shape)
    labels = jnp.where(kept, labels, 0)
    denominator = jnp.ones(logits.shape[:-1], logits.dtype)
    return _loss(logits, labels, kept, denominator, label_smoothing, class_weights, weights,
                 z_loss, softcap, temperature, reduction)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("ignore_index", "reduction"))
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None = None, *,
    ignore_index: int | None = None, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike | None = None, reduction: Reduction = "none",
) -> Array:  # fmt: skip
    """`softmax_cross_entropy` for class ids, [N...], with `y_c = [c = label]`.

    Raises:
      ValueError: The shapes do not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = softmax_cross_entropy_with_integer_labels(jnp.zeros(4), 2)
      >>> print(f"{loss:.4f}")
      1.3863
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    num_classes = logits.shape[-1]
    kept = jnp.ones(logits.shape, bool) if where is None else jnp.asarray(where)
    kept = jnp.broadcast_to(kept, logits.shape)
    if ignore_index is not None:
        kept &= (labels != ignore_index)[..., None]
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
    denominator = jnp.ones(labels.shape, logits.dtype)
    if class_weights is not None:
        denominator = jnp.sum(one_hot * class_weights, axis=-1)
    loss = _loss(logits, one_hot, kept, denominator, label_smoothing, class_weights, weights,
                 z_loss, softcap, temperature, reduction)  # fmt: skip
    bad = ((labels < 0) | (labels >= num_classes)) & jnp.any(kept, axis=-1)
    if weights is not None:
        bad &= jnp.asarray(weights) != 0
    return jnp.where(bad if reduction == "none" else jnp.any(bad), jnp.nan, loss)


def _loss(logits, labels, kept, denominator, label_smoothing, class_weights, weights, z_loss,
          softcap, temperature, reduction):  # fmt: skip
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if temperature is not None:
        logits = logits / jnp.expand_dims(jnp.asarray(temperature), -1)
    example_kept = jnp.any(kept, axis=-1)
    logits = jnp.where(kept | ~example_kept[..., None], logits, -jnp.inf)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    count = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1)
    targets = (1 - label_smoothing) * labels + label_smoothing * kept / count
    if class_weights is not None:
        targets = targets * class_weights
    costs = log_normalizer[..., None] - logits
    costs = targets * jnp.where((targets == 0) & jnp.isneginf(logits), 0, costs)
    weights = jnp.ones(denominator.shape, logits.dtype) if weights is None else weights
    weights = jnp.where(example_kept, weights, 0)
    losses = jnp.sum(costs, axis=-1) + z_loss * log_normalizer**2
    losses = weights * jnp.where((weights == 0) & ~jnp.isfinite(losses), 0, losses)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return jnp.sum(losses)
    total = jnp.sum(weights * denominator)
    return jnp.where(total == 0, 0, jnp.sum(losses) / jnp.where(total == 0, 1, total))
