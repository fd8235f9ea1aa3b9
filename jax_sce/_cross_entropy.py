"""The losses on logits. Their options are arithmetic around two differentiation rules."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from . import _arguments, _axis, _backend, _rows, _split
from ._arguments import Options
from ._axis import AxisName
from ._elementary import below
from ._label_check import checked, is_class
from ._rows import Rows, Statistics, Targets
from ._weighting import Losses, class_weight_of, excuse, mean_weights, reduce_losses, weighted


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    reduction: str = "none",
    axis_name: AxisName = None,
    forward_mode: bool = False,
) -> Array:
    r"""Softmax cross-entropy between logits and distributions over the classes.

    With softmax :math:`o_c = e^{z_c} / \sum_k e^{z_k}`, log-normalizer
    :math:`L = \log \sum_k e^{z_k}` and smoothed targets :math:`y'_c = (1 - e) y_c + e / V`, the loss of
    an example is

    .. math:: w \left( \sum_c w_c\, y'_c\, (-\log o_c) + \zeta L^2 \right).

    The targets need not sum to one. The gradient is analytic:
    :math:`\partial E / \partial z_c = o_c \sum_k y_k - y_c` and
    :math:`\partial E / \partial y_c = -\log o_c`.

    Args:
      logits: [N..., V] with the classes on `axis`; any floating dtype. 16-bit logits are computed in
        float32.
      labels: The shape of `logits`. Floats; integers and bools serve as one-hot rows.
      axis: The axis of the classes, or several, which are taken as one; None means all.
      where: Bools, whose rank decides: of the examples' rank, [N...], the examples to keep; of the
        logits' rank, the classes to keep, `[1, V]` for all examples alike. Axes of size 1 broadcast. An
        example that keeps no class has loss 0, and a distribution's target on a masked class is
        left out.
      label_smoothing: e, a scalar in [0, 1]; V counts the row's classes that `where` keeps.
      class_weights: [V], the weight of each class.
      weights: [N...], the weight of each example; 0 leaves it out.
      z_loss: A scalar; adds `z_loss * L**2` to each example, not class-weighted.
      softcap: A positive scalar c; the logits become `c * tanh(logits / c)` first.
      reduction: "none" for [N...], "sum", or "mean": the sum over the sum of `weights` of the examples
        that count, and 0 if there are none.
      axis_name: The mesh axis, or axes, over which the classes are split inside `jax.shard_map`. V is
        then the number of classes on this device, in every argument that has classes. Labels stay
        global, and the loss is that of whole rows, the same on all devices of the axis. A "mean" or
        "sum" is over the examples of this device. With `check_vma=False` differentiate outside the
        `jax.shard_map`: inside, JAX multiplies gradients by the size of the axis.
      forward_mode: Differentiate by a `jax.custom_jvp` of the same form instead of a `jax.custom_vjp`,
        for `jax.jvp`, `jax.jacfwd`, `jax.linearize` and reverse over forward mode.

    Returns:
      The loss: [N...] or a scalar, float32 (float64 for float64 logits). NaN for a row of logits that
      are all -inf, or of which one is +inf or NaN (after the soft-cap); that row's gradient is NaN and
      no other's. A logit of -inf is an absent class: it costs +inf if its target is not 0.

    Raises:
      TypeError, ValueError: An argument has the wrong type, shape or range; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sce import softmax_cross_entropy
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
      >>> with jnp.printoptions(precision=4):
      ...     print(softmax_cross_entropy(logits, labels))
      [0.2761 1.8018]
      >>> print(f"{softmax_cross_entropy(logits, labels, reduction='mean'):.4f}")
      1.0390

    References:
      Bridle (1990), "Probabilistic interpretation of feedforward classification network outputs", for
      the loss and its derivative; Szegedy et al. (2016), arXiv:1512.00567, for label smoothing;
      Chowdhery et al. (2022), arXiv:2204.02311, section 5, for the z-loss; Gemma Team (2024),
      arXiv:2408.00118, for the soft-cap.

    See also:
      `softmax_cross_entropy_with_integer_labels`, where each example has one class.
    """
    checked = inputs(
        logits, labels, axis, where, has_ids=False, label_smoothing=label_smoothing,
        class_weights=class_weights, weights=weights, z_loss=z_loss, softcap=softcap,
        reduction=reduction, axis_name=axis_name, forward_mode=forward_mode)  # fmt: skip
    return loss_of(checked)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    reduction: str = "none",
    axis_name: AxisName = None,
    forward_mode: bool = False,
) -> Array:
    r"""Softmax cross-entropy between logits and the index of the right class.

    With softmax :math:`o_c = e^{z_c} / \sum_k e^{z_k}`, the loss of an example with label y is
    :math:`-\log o_y`, and its gradient :math:`o_c - [c = y]`. With options it is

    .. math:: w \left( \sum_c w_c\, y'_c\, (-\log o_c) + \zeta L^2 \right),
       \quad y'_c = (1 - e) [c = y] + e / V, \quad L = \log \sum_k e^{z_k}.

    Args:
      logits: [N..., V] with the classes on `axis`; any floating dtype. 16-bit logits are computed in
        float32.
      labels: [N...], integers in [0, V) of any integer dtype. With several class axes, an index into
        those axes flattened in the order given. (Without x64, JAX cuts 64-bit labels that are passed to
        your own jitted function before this one sees them.)
      axis: The axis of the classes, or several, which are taken as one; None means all.
      where: Bools, whose rank decides: of the examples' rank, [N...], the examples to keep; of the
        logits' rank, the classes to keep, `[1, V]` for all examples alike. Axes of size 1 broadcast. An
        example that keeps no class has loss 0; a label on a masked class costs +inf.
      ignore_index: Examples with this label count nowhere: loss 0, gradient 0.
      label_smoothing: e, a scalar in [0, 1]; V counts the row's classes that `where` keeps.
      class_weights: [V], the weight of each class.
      weights: [N...], the weight of each example; 0 leaves it out.
      z_loss: A scalar; adds `z_loss * L**2` to each example, not class-weighted.
      softcap: A positive scalar c; the logits become `c * tanh(logits / c)` first.
      reduction: "none" for [N...], "sum", or "mean": the sum over the sum of
        `weights * class_weights[label]` of the examples that count, and 0 if there are none.
      axis_name: The mesh axis, or axes, over which the classes are split inside `jax.shard_map`. V is
        then the number of classes on this device, in every argument that has classes. Labels stay
        global, and the loss is that of whole rows, the same on all devices of the axis. A "mean" or
        "sum" is over the examples of this device. With `check_vma=False` differentiate outside the
        `jax.shard_map`: inside, JAX multiplies gradients by the size of the axis.
      forward_mode: Differentiate by a `jax.custom_jvp` of the same form instead of a `jax.custom_vjp`,
        for `jax.jvp`, `jax.jacfwd`, `jax.linearize` and reverse over forward mode.

    Returns:
      The loss: [N...] or a scalar, float32 (float64 for float64 logits). NaN, with a gradient of NaN in
      that row alone, for a label outside [0, V) (-1 too), and for a row of logits that are all -inf, or
      of which one is +inf or NaN (after the soft-cap). A logit of -inf is an absent class, and costs
      +inf as the label. Under `jax.experimental.checkify.checkify` with user checks, the first label
      outside [0, V) is an error that tells it and its position.

    Raises:
      TypeError, ValueError: An argument has the wrong type, shape or range; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sce import softmax_cross_entropy_with_integer_labels
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> labels = jnp.array([0, 1])
      >>> with jnp.printoptions(precision=4):
      ...     print(softmax_cross_entropy_with_integer_labels(logits, labels))
      [0.2761 2.9518]
      >>> confident = jnp.array([17.0, 0.0])
      >>> print(f"{softmax_cross_entropy_with_integer_labels(confident, 0):.3e}")
      4.140e-08

    References:
      Bridle (1990), "Probabilistic interpretation of feedforward classification network outputs", for
      the loss and its derivative; Szegedy et al. (2016), arXiv:1512.00567, for label smoothing;
      Chowdhery et al. (2022), arXiv:2204.02311, section 5, for the z-loss; Gemma Team (2024),
      arXiv:2408.00118, for the soft-cap.

    See also:
      `softmax_cross_entropy`, where the labels are distributions.
    """
    checked = inputs(
        logits, labels, axis, where, has_ids=True, ignore_index=ignore_index,
        label_smoothing=label_smoothing, class_weights=class_weights, weights=weights,
        z_loss=z_loss, softcap=softcap, reduction=reduction, axis_name=axis_name,
        forward_mode=forward_mode)  # fmt: skip
    return loss_of(checked)


# -- from the arguments to the loss -------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "labels", "mask", "options"],
    meta_fields=["axes"],
)
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments, checked."""

    logits: Array
    labels: Array  # class ids, [N...], or distributions in the shape of the logits
    mask: Array | None  # bool, of the logits' rank: the classes to keep
    options: Options
    axes: tuple[int, ...]  # of the classes

    @property
    def has_ids(self) -> bool:
        return self.labels.ndim < self.logits.ndim


def inputs(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None,
    where: ArrayLike | None,
    *,
    has_ids: bool,
    ignore_index: int | None = None,
    **options,
) -> Inputs:
    """The arguments of either loss, by their public names."""
    logits = _arguments.floating("logits", logits)
    axes = _arguments.class_axes(axis, logits.ndim)
    batch = _arguments.batch_shape(logits.shape, axes)
    if has_ids:
        labels, ignore_index = _arguments.class_ids(labels, ignore_index)
    else:
        labels = _arguments.real("labels", labels)
    _arguments.shape("labels", labels, batch if has_ids else logits.shape)
    num_classes = _arguments.num_classes(logits, axes)
    checked = _arguments.options(
        logits.dtype, batch, num_classes, ignore_index=ignore_index, **options
    )
    examples, mask = _arguments.masks(where, logits.shape, axes)
    return Inputs(logits, labels, mask, checked.where(examples), axes)


@functools.partial(jax.jit, inline=True)
def loss_of(inputs: Inputs) -> Array:
    """The loss. Jitted when it is called eagerly; inlined into an enclosing jit."""
    options, labels = inputs.options, inputs.labels
    axes = tuple(axis - inputs.logits.ndim for axis in inputs.axes)
    rows, uniform = _rows_of(inputs, axes)
    if inputs.has_ids:
        options = options.where(_arguments.not_ignored(labels, options.ignore_index))
        num_classes = rows.num_classes * _axis.size(options.axis_name)
        labels = class_index(labels, num_classes, options.where(_keeps_class(rows)))
    of_examples = losses(rows, labels, options, uniform)
    loss, options = of_examples.loss, dataclasses.replace(options, valid=of_examples.valid)
    weights = mean_weights(options, labels if inputs.has_ids else None, loss)
    return reduce_losses(loss, weights, options.reduction, options.batch_axis)


def _rows_of(inputs: Inputs, axes: tuple[int, ...]) -> tuple[Rows, Array | None]:
    """The rows; and for smoothing one over the number of classes that the mask keeps of each, [N, 1]."""
    mask, options = inputs.mask, inputs.options
    rows = rows_of(inputs.logits, axes, options)
    if mask is None:
        return rows, None
    # Expand the class axes alone: a mask that all examples share stays small.
    sizes = [n if a in inputs.axes else m for a, (n, m) in
             enumerate(zip(rows.logits.shape, mask.shape, strict=True))]  # fmt: skip
    mask = jnp.broadcast_to(mask, sizes)
    rows = dataclasses.replace(rows, mask=mask)
    if options.label_smoothing is None:
        return rows, None
    count = jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)
    count = _axis.total(options.axis_name, count)
    return rows, 1 / jnp.maximum(count, 1).astype(rows.dtype)


def _keeps_class(rows: Rows) -> Array | None:
    """bool, [N...]: the examples that keep a class; None for all. Only checkify uses this: the row
    operations find it in their own pass."""
    kept = [_axis.total(rows.axis_name, x.squeeze(rows.axes)) for x in _rows.keeps_class(rows)]
    return kept[0] > 0 if kept else None


def rows_of(logits: Array, axes: tuple[int, ...], options: Options) -> Rows:
    """Rows without a mask; `axes` are counted from the last."""
    softcap, first_class = options.softcap, None
    if softcap is not None:
        softcap = softcap.reshape((1,) * logits.ndim)
    rows = Rows(logits, None, softcap, None, axes, options.axis_name)
    if options.axis_name is not None:
        first = _axis.offset(options.axis_name, rows.num_classes)
        first_class = jnp.asarray(first, jnp.int32).reshape((1,) * logits.ndim)
    return dataclasses.replace(rows, first_class=first_class)


def class_index(labels: Array, num_classes: int, options: Options) -> Array:
    """Labels as int32, -1 for those outside [0, V)."""
    labels = checked(labels, num_classes, options.counts)
    good = is_class(labels, num_classes)
    return jnp.where(good, jnp.where(good, labels, 0).astype(jnp.int32), -1)


def losses(rows: Rows, labels: Array, options: Options, uniform: Array | None = None) -> Losses:
    """The loss of each example. Labels are class ids, [N...], -1 for a bad one, or distributions."""
    has_ids = labels.ndim < rows.logits.ndim
    class_weight = None
    if has_ids:
        labels, options = excuse(labels, options)
    if has_ids and options.label_smoothing is None:
        rule = _label_rule_forward if options.forward_mode else _label_rule
        out = rule(*_axis.vary_alike(rows), labels, options.counts)
        class_weight = class_weight_of(labels, options)
    else:  # the targets carry the class weights
        rule = _target_rule_forward if options.forward_mode else _target_rule
        targets = _targets(rows, rows.expand(labels) if has_ids else labels, options, uniform)
        out = rule(*_axis.vary_alike(rows, targets), options.counts)
    for kept in out.kept:
        options = options.where(kept > 0)
    return weighted(options, out.loss, out.log_normalizer, class_weight)


def _targets(rows: Rows, labels: Array, options: Options, uniform: Array | None) -> Targets:
    one = (1,) * rows.logits.ndim
    smoothing, weights = options.label_smoothing, options.class_weights
    if uniform is None:
        num_classes = rows.num_classes * _axis.size(rows.axis_name)
        uniform = jnp.full(one, 1 / num_classes, rows.dtype)
    if smoothing is not None:
        smoothing = smoothing.reshape(one)
    if weights is not None:
        sizes = [rows.logits.shape[axis] for axis in rows.axes]
        order = sorted(range(len(sizes)), key=lambda i: rows.axes[i])
        shape = [n if a - len(one) in rows.axes else 1 for a, n in enumerate(rows.logits.shape)]
        weights = weights.reshape(sizes).transpose(order).reshape(shape)
    return Targets(labels, smoothing, uniform, weights)


# -- rules --------------------------------------------------------------------------------------------
# Each gives the loss and the log-normalizer of every row, and honours a cotangent of both. Rows that do
# not count have a derivative of exactly 0, whatever their logits hold: the caller gives them a
# cotangent of 0 and replaces their values. What is saved for the derivative is the arguments and some
# numbers a row. Those are [N...] here: XLA for CPU is slow on [N, 1].


class _Out(NamedTuple):
    loss: Array  # [N...]
    log_normalizer: Array  # [N...]
    kept: list[Array]  # empty without a mask, else [N...]: 1.0 for rows that keep a class, or 0.0


def _squeezed(rows: Rows, statistics: tuple[Array, ...], count: int) -> list[Any]:
    """The first of the statistics, [N...], and a list of the others."""
    squeezed = [x.squeeze(rows.axes) for x in statistics]
    return [*squeezed[:count], squeezed[count:]]


def _expanded(rows: Rows, counts: Array | None) -> Array | None:
    return None if counts is None else rows.expand(counts)


class _LabelResiduals(NamedTuple):
    rows: Rows
    labels: Array  # [N...]
    counts: Array | None  # [N...]
    distance: Array  # [N...], the label's logit less the maximum
    stats: Statistics  # [N...] each


@jax.custom_vjp
def _label_rule(rows: Rows, labels: Array, counts: Array | None) -> "_Out":
    return _label_fwd(rows, labels, counts)[0]


def _label_fwd(rows, labels, counts):
    statistics = _split.whole_label_statistics(
        rows, rows.expand(labels), rows.axis_name, _backend.label_statistics
    )
    *numbers, kept = _squeezed(rows, statistics, 3)
    counts, (highest, tail, at_label) = _rows.without_empty_rows(counts, numbers, kept)
    stats = Statistics(highest, tail)
    distance = jnp.where(labels < 0, jnp.nan, at_label - highest)
    out = _Out(_rows.label_loss(distance, stats), _rows.log_normalizer(stats), kept)
    return out, _LabelResiduals(rows, labels, counts, distance, stats)


def _label_bwd(residuals, cotangents):
    rows, labels, counts, distance, stats = residuals
    g = _axis.total_cotangent(rows.axis_name, tuple(cotangents[:2]))
    factors = (_rows.only(counts, x, stats.tail) for x in _rows.label_factors(distance, stats, *g))
    operands = map(rows.expand, (labels, stats.max, *factors))
    return _backend.label_cotangent(rows, *operands), None, None


_label_rule.defvjp(_label_fwd, _label_bwd)


class _TargetResiduals(NamedTuple):
    rows: Rows
    targets: Targets
    counts: Array | None  # [N...]
    target_sum: Array  # [N...]
    stats: Statistics  # [N...] each


@jax.custom_vjp
def _target_rule(rows: Rows, targets: Targets, counts: Array | None) -> "_Out":
    return _target_fwd(rows, targets, counts)[0]


def _target_fwd(rows, targets, counts):
    statistics = _split.whole_target_statistics(
        rows, targets, rows.axis_name, _backend.target_statistics
    )
    *numbers, kept = _squeezed(rows, statistics, 4)
    counts, numbers = _rows.without_empty_rows(counts, numbers, kept)
    highest, tail, target_sum, target_dot = numbers
    stats = Statistics(highest, tail)
    loss = _rows.target_loss(target_sum, target_dot, stats)
    out = _Out(loss, _rows.log_normalizer(stats), kept)
    return out, _TargetResiduals(rows, targets, counts, target_sum, stats)


def _costs(rows, targets, counts, stats, g_loss):
    """The cotangent of the targets' values, [N, V]."""
    costs = _rows.target_costs(rows, targets, *map(rows.expand, (*stats, g_loss)))
    return _rows.only(_expanded(rows, counts), costs, costs)


def _target_bwd(residuals, cotangents):
    rows, targets, counts, target_sum, stats = residuals
    g_loss, g_log_normalizer = _axis.total_cotangent(rows.axis_name, tuple(cotangents[:2]))
    costs = _costs(rows, targets, counts, stats, g_loss)
    of_targets = _rows.targets_cotangent(rows, targets, costs)
    # A row that is not finite is NaN, 0 times that too; but if it does not count, it is 0.
    probe = stats.tail + target_sum
    g_loss = jnp.where((g_loss == 0) & ~jnp.isfinite(probe), jnp.nan, g_loss)
    factors = [_rows.only(counts, g, probe) for g in (g_loss, g_log_normalizer)]
    operands = map(rows.expand, (*stats, target_sum, *factors))
    return _backend.target_cotangent(rows, targets, *operands), of_targets, None


_target_rule.defvjp(_target_fwd, _target_bwd)


# Forward mode: the same maps, contracted with a tangent. Under `jax.checkpoint`, reverse mode over the
# tangent keeps the arguments and the row statistics, and no array of the logits' size.


@jax.custom_jvp
def _label_rule_forward(rows: Rows, labels: Array, counts: Array | None) -> "_Out":
    return _label_fwd(rows, labels, counts)[0]


@_label_rule_forward.defjvp
def _label_jvp(primals, tangents):
    out, residuals = _label_fwd(*primals)

    @jax.checkpoint
    def tangent(residuals, rows_dot):
        rows, labels, counts, distance, stats = residuals
        z_dot = _rows.tangent_of(Rows.values, rows, rows_dot)

        def dot(*g):
            factors = [
                _rows.only(counts, x, stats.tail) for x in _rows.label_factors(distance, stats, *g)
            ]
            operands = map(rows.expand, (labels, stats.max, *factors))
            of_values = _rows.label_cotangent_of_values(rows, *operands, subtract=below)
            return jnp.sum(of_values * z_dot, rows.axes)

        return _by_outputs(dot, rows, distance, out.kept)

    return out, tangent(residuals, tangents[0])


@jax.custom_jvp
def _target_rule_forward(rows: Rows, targets: Targets, counts: Array | None) -> "_Out":
    return _target_fwd(rows, targets, counts)[0]


@functools.partial(_target_rule_forward.defjvp, symbolic_zeros=True)
def _target_jvp(primals, tangents):
    out, residuals = _target_fwd(*primals)
    # The cost of an absent class is infinite, and infinity times a tangent of 0 is NaN: leave out the
    # targets altogether where they are not differentiated.
    _, moving = _rows.moving_arguments(("rows", "targets"), primals[:2], tangents[:2])

    @jax.checkpoint
    def tangent(residuals, moving):
        rows, targets, counts, target_sum, stats = residuals

        def dot(*g):
            sums = jnp.zeros_like(target_sum)
            if "rows" in moving:
                operands = map(rows.expand, (*stats, target_sum, *g))
                of_values = _rows.target_cotangent_of_values(
                    rows, targets, *operands, subtract=below
                )
                probe = rows.expand(stats.tail + target_sum)
                of_values = _rows.only(_expanded(rows, counts), of_values, probe)
                z_dot = _rows.tangent_of(Rows.values, rows, moving["rows"])
                sums += jnp.sum(of_values * z_dot, rows.axes)
            if "targets" in moving:
                costs = _costs(rows, targets, counts, stats, g[0])
                y_dot = _rows.tangent_of(lambda y: y.values(rows), targets, moving["targets"])
                sums += jnp.sum(costs * y_dot, rows.axes)
            return sums

        return _by_outputs(dot, rows, target_sum, out.kept)

    return out, tangent(residuals, moving)


def _by_outputs(dot, rows: Rows, like: Array, kept: list[Array]) -> "_Out":
    """The tangents of both outputs; `dot(g_loss, g_log_normalizer)` contracts one pair of cotangents."""
    one, zero = jnp.ones_like(like), jnp.zeros_like(like)
    both = jnp.stack([dot(one, zero), dot(zero, one)])
    loss, log_normalizer = _axis.total(rows.axis_name, both)
    return _Out(loss, log_normalizer, [jnp.zeros_like(x) for x in kept])
