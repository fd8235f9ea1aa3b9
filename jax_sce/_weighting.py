"""Apply class weights, z-loss, example weights and the reduction to the loss and log-normalizer of each
row. Losses that must not count are set to 0 before any arithmetic, because 0 times NaN is NaN, in
derivatives too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from . import _axis
from ._arguments import Options
from ._axis import AxisName
from ._elementary import times
from ._rules import Out


def only(mask: Array | None, x: Array, other: float = 0) -> Array:
    """`x` where the mask is True, `other` elsewhere. Without a mask, `x`."""
    return x if mask is None else jnp.where(mask, x, other)


class Losses(NamedTuple):
    """The results for each example, [N...]."""

    loss: Array  # weighted; 0 if the example does not count
    log_normalizer: Array  # 0 if the example does not count
    entropy: Array | None  # with `return_aux`
    target_entropy: Array | None  # for a teacher
    valid: Array | None  # bool: see `Options.valid`; None for all


def weighted(options: Options, out: Out, class_weight: Array | None) -> Losses:
    """Apply class weights, z-loss and example weights, all [N...]. A finite loss of weight 0 is
    multiplied by 0, not replaced by 0, because it is the derivative with respect to that weight."""
    kept, loss, log_normalizer = options.valid, out.loss, out.log_normalizer
    if options.weights is not None:
        of_class = loss if class_weight is None else times(class_weight, loss)
        finite = jnp.isfinite(of_class) & jnp.isfinite(log_normalizer)
        kept = options.where((options.weights != 0) | finite).valid
    loss, log_normalizer = only(kept, loss), only(kept, log_normalizer)
    if class_weight is not None:
        loss = times(class_weight, loss)
    if options.z_loss is not None:
        loss = loss + options.z_loss * jnp.square(log_normalizer)
    if options.weights is not None:
        loss = example_weights(options, loss) * loss
    entropy, target_entropy = (
        None if x is None else only(options.counts, x) for x in (out.entropy, out.target_entropy)
    )
    log_normalizer = only(options.counts, log_normalizer)
    return Losses(loss, log_normalizer, entropy, target_entropy, options.valid)


def excuse(labels: Array, options: Options) -> tuple[Array, Options]:
    """Replace a bad class id, -1, by 0 where its example does not count. Such an example of weight 0 is
    made invalid."""
    if options.weights is not None:
        options = options.where(~((labels < 0) & (options.weights == 0)))
    return only(options.valid, labels), options


def class_weight_of(labels: Array, options: Options) -> Array | None:
    """[N...], the class weight of each label."""
    weights, axis_name = options.class_weights, options.axis_name
    if weights is None:
        return None
    place = jnp.maximum(labels, 0) - _axis.offset(axis_name, weights.size)
    if axis_name is None:
        return weights[place]
    is_here = (place >= 0) & (place < weights.size)
    return _axis.total(axis_name, jnp.where(is_here, weights[jnp.where(is_here, place, 0)], 0))


def example_weights(options: Options, like: Array) -> Array:
    """[N...], the weights of the valid examples, in the shape and dtype of `like`."""
    weights = jnp.ones_like(like) if options.weights is None else options.weights
    return only(options.valid, weights)


def mean_weights(options: Options, labels: Array | None, like: Array) -> Array | int:
    """The weights, [N...]: a mean divides by their sum. If all are 1, the number of examples instead.
    `labels` are class ids, or None for other labels."""
    class_weights = None if labels is None else options.class_weights
    if options.weights is None and options.valid is None and class_weights is None:
        return like.size
    if labels is None:
        return example_weights(options, like)
    labels, options = excuse(labels, options)
    weight, of_class = example_weights(options, like), class_weight_of(labels, options)
    return weight if of_class is None else weight * of_class


def reduce_losses(
    losses: Array, weights: Array | int, reduction: str, batch_axis: AxisName = None
) -> Array:
    """Reduce losses that are already weighted. A mean divides by the sum of `weights`; if that is 0, the
    mean and its gradient are 0."""
    if reduction == "none":
        return losses
    total = _axis.total(batch_axis, jnp.sum(losses))
    if reduction == "sum":
        return total
    if not isinstance(weights, Array):
        return total / jax.core.max_dim(weights * _axis.size(batch_axis), 1)
    weight = _axis.total(batch_axis, jnp.sum(weights))
    return jnp.where(weight == 0, 0, total / jnp.where(weight == 0, 1, weight))
