"""From the loss of each example to what the caller asked for: weights, z-loss, and the reduction."""

import jax.numpy as jnp
from jax import Array

from . import _axis
from ._axis import AxisName

REDUCTIONS = ("none", "sum", "mean")


def both(a: Array | None, b: Array | None) -> Array | None:
    """The examples that two masks keep; None keeps all."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def times(weight: Array, loss: Array) -> Array:
    """`weight * loss`, where a weight of 0 leaves out even a loss of +inf. NaN stays NaN.

    The derivative with respect to a weight of 0 is the loss still, wherever that is finite.
    """
    return weight * jnp.where((weight == 0) & jnp.isposinf(loss), 0, loss)


def reduce_losses(losses: Array, weights: Array, reduction: str, batch: AxisName = None) -> Array:
    """Reduce losses that are weighted already. `weights` are what a mean divides by.

    A mean over no weight is 0, and so is its gradient. `batch` is the mesh axis over which the examples
    are split, if the reduction is over all of them.
    """
    if reduction == "none":
        return losses
    total = _axis.total(batch, jnp.sum(losses))
    if reduction == "sum":
        return total
    weight = _axis.total(batch, jnp.sum(weights))
    return jnp.where(weight == 0, 0, total / jnp.where(weight == 0, 1, weight))
