"""The losses on logits. Their options are arithmetic around two differentiation rules."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from . import _arguments, _axis, _backend, _layout, _rows
from ._arguments import Options
from ._axis import AxisName
from ._elementary import below
from ._label_check import class_index
from ._rows import STATIC, Rows, Statistics, Targets
from ._weighting import Losses, class_weight_of, excuse, mean_weights, only, reduce_losses, weighted


class CrossEntropyAux(NamedTuple):
    """What else is known of each example; 0 and -1 for those that do not count."""

    log_normalizer: Array  # [N...], float32 (float64 for float64 inputs)
    prediction: Array  # [N...], int32, the largest logit's class, the lowest of several


# fmt: off
@overload
def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, reduction: str = "none", axis_name: AxisName = None,
    return_aux: Literal[False] = False, forward_mode: bool = False,
) -> Array: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, reduction: str = "none", axis_name: AxisName = None,
    return_aux: Literal[True], forward_mode: bool = False,
) -> tuple[Array, CrossEntropyAux]: ...


def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, reduction: str = "none", axis_name: AxisName = None,
    return_aux: bool = False, forward_mode: bool = False,
) -> Array | tuple[Array, CrossEntropyAux]:
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
      weights: [N...], the weight of each example; 0 leaves it out. A scalar, or axes of size 1, serve
        several.
      z_loss: A scalar; adds `z_loss * L**2` to each example, not class-weighted.
      softcap: A positive scalar c; the logits become `c * tanh(logits / c)` first.
      reduction: "none" for [N...], "sum", or "mean": the sum over the sum of `weights` of the examples
        that count, and 0 if there are none.
      axis_name: The mesh axis, or axes, over which the classes are split inside `jax.shard_map`. V is
        then the number of classes on this device; labels stay global, and the loss is that of whole
        rows, the same on all devices of the axis. "mean" and "sum" are over this device's examples. With
        `check_vma=False` differentiate outside: inside, JAX multiplies gradients by the axis size.
      return_aux: Also return a `CrossEntropyAux`, [N...] each: the log-normalizers, which are
        differentiated exactly, and the largest logits' classes; 0 and -1 for examples that do not count.
        The prediction takes a pass over the logits, if it is used.
      forward_mode: Differentiate by a `jax.custom_jvp` of the same form instead of a `jax.custom_vjp`,
        for `jax.jvp`, `jax.jacfwd`, `jax.linearize` and reverse over forward mode.

    Returns:
      The loss: [N...] or a scalar, float32 (float64 for float64 logits); with `return_aux` the pair of
      it and the aux. The loss is NaN for a row whose logits are all -inf, or include +inf or NaN (after
      the soft-cap); that row's gradient is NaN and no other's. A logit of -inf is an absent class: it
      costs +inf if its target is not 0.

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
    return loss_of(inputs(
        logits, labels, axis, where, has_ids=False, label_smoothing=label_smoothing,
        class_weights=class_weights, weights=weights, z_loss=z_loss, softcap=softcap,
        reduction=reduction, axis_name=axis_name, return_aux=return_aux,
        forward_mode=forward_mode))
# fmt: on


# fmt: off
@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0, class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0, softcap: ArrayLike | None = None,
    reduction: str = "none", axis_name: AxisName = None,
    return_aux: Literal[False] = False, forward_mode: bool = False,
) -> Array: ...


@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0, class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0, softcap: ArrayLike | None = None,
    reduction: str = "none", axis_name: AxisName = None,
    return_aux: Literal[True], forward_mode: bool = False,
) -> tuple[Array, CrossEntropyAux]: ...


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0, class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0, softcap: ArrayLike | None = None,
    reduction: str = "none", axis_name: AxisName = None,
    return_aux: bool = False, forward_mode: bool = False,
) -> Array | tuple[Array, CrossEntropyAux]:
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
      weights: [N...], the weight of each example; 0 leaves it out. A scalar, or axes of size 1, serve
        several.
      z_loss: A scalar; adds `z_loss * L**2` to each example, not class-weighted.
      softcap: A positive scalar c; the logits become `c * tanh(logits / c)` first.
      reduction: "none" for [N...], "sum", or "mean": the sum over the sum of
        `weights * class_weights[label]` of the examples that count, and 0 if there are none.
      axis_name: The mesh axis, or axes, over which the classes are split inside `jax.shard_map`. V is
        then the number of classes on this device; labels stay global, and the loss is that of whole
        rows, the same on all devices of the axis. "mean" and "sum" are over this device's examples. With
        `check_vma=False` differentiate outside: inside, JAX multiplies gradients by the axis size.
      return_aux: Also return a `CrossEntropyAux`, [N...] each: the log-normalizers, which are
        differentiated exactly, and the largest logits' classes; 0 and -1 for examples that do not count.
        The prediction takes a pass over the logits, if it is used.
      forward_mode: Differentiate by a `jax.custom_jvp` of the same form instead of a `jax.custom_vjp`,
        for `jax.jvp`, `jax.jacfwd`, `jax.linearize` and reverse over forward mode.

    Returns:
      The loss: [N...] or a scalar, float32 (float64 for float64 logits); with `return_aux` the pair of
      it and the aux. The loss is NaN, with a gradient of NaN in that row alone, for a label outside
      [0, V), -1 included, and for a row whose logits are all -inf, or include +inf or NaN (after the
      soft-cap). A logit of -inf is an absent class, and costs +inf as the label. Under
      `jax.experimental.checkify.checkify` with user checks, the first label outside [0, V) is an error
      that tells it and its position.

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
    return loss_of(inputs(
        logits, labels, axis, where, has_ids=True, ignore_index=ignore_index,
        label_smoothing=label_smoothing, class_weights=class_weights, weights=weights,
        z_loss=z_loss, softcap=softcap, reduction=reduction, axis_name=axis_name,
        return_aux=return_aux, forward_mode=forward_mode))
# fmt: on


# -- from the arguments to the loss -------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments, checked."""

    logits: Array
    labels: Array  # class ids, [N...], or distributions in the shape of the logits
    mask: Array | None  # bool, of the logits' rank: the classes to keep
    options: Options
    axes: tuple[int, ...] = dataclasses.field(metadata=STATIC)  # of the classes

    @property
    def has_ids(self) -> bool:
        return self.labels.ndim < self.logits.ndim


def inputs(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None, where: ArrayLike | None,
    *, has_ids: bool, ignore_index: int | None = None, **options: Any,
) -> Inputs:  # fmt: skip
    """The arguments of either loss, by their public names."""
    logits = _arguments.array("logits", logits, "floating")
    axes = _arguments.class_axes(axis, logits.ndim)
    batch = _arguments.batch_shape(logits.shape, axes)
    num_classes = _arguments.num_classes(logits, axes)
    labels, ignore_index = _arguments.labels(labels, has_ids, ignore_index)
    _arguments.shape("labels", labels, batch if has_ids else logits.shape)
    checked = _arguments.options(
        logits.dtype, batch, num_classes, ignore_index=ignore_index, **options
    )
    examples, mask = _arguments.masks(where, logits.shape, axes)
    return Inputs(logits, labels, mask, checked.where(examples), axes)


@functools.partial(jax.jit, inline=True)
def loss_of(inputs: Inputs) -> Any:
    """The loss, and the aux if it is asked for. Jitted when it is called eagerly; inlined into an
    enclosing jit."""
    options, labels = inputs.options, inputs.labels
    rows = rows_of(inputs.logits, tuple(axis - inputs.logits.ndim for axis in inputs.axes), options)
    if inputs.mask is not None:
        rows = dataclasses.replace(rows, mask=rows.expand_classes(inputs.mask))
    if inputs.has_ids:
        options = options.where(_arguments.not_ignored(labels, options.ignore_index))
        num_classes = rows.num_classes * _axis.size(options.axis_name)
        reported = options  # by checkify alone: the row operations find what is kept themselves
        for kept in _rows.keeps_class(rows):
            reported = reported.where(_axis.total(rows.axis_name, kept.squeeze(rows.axes)) > 0)
        labels = class_index(labels, num_classes, reported.counts)
    of_examples = losses(rows, labels, options)
    loss, options = of_examples.loss, dataclasses.replace(options, valid=of_examples.valid)
    weights = mean_weights(options, labels if inputs.has_ids else None, loss)
    loss = reduce_losses(loss, weights, options.reduction, options.batch_axis)
    if not options.return_aux:
        return loss
    return loss, CrossEntropyAux(of_examples.log_normalizer, prediction(rows, options.counts))


def prediction(rows: Rows, counts: Array | None) -> Array:
    """[N...], the class of the largest logit, the lowest of several; -1 for rows that do not count."""
    logits = _layout.classes_last(rows, rows.masked(lax.stop_gradient(rows.logits)))
    place = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    place += _axis.offset(rows.axis_name, rows.num_classes)
    place = _axis.first_place(rows.axis_name, jnp.max(logits, axis=-1), place)
    return only(counts, place, -1)


def rows_of(logits: Array, axes: tuple[int, ...], options: Options) -> Rows:
    """Rows without a mask; `axes` are counted from the last."""
    one = (1,) * logits.ndim
    softcap = None if options.softcap is None else options.softcap.reshape(one)
    rows = Rows(logits, None, softcap, None, axes, options.axis_name)
    if options.axis_name is None:
        return rows
    first = jnp.asarray(_axis.offset(options.axis_name, rows.num_classes), jnp.int32)
    return dataclasses.replace(rows, first_class=first.reshape(one))


def losses(rows: Rows, labels: Array, options: Options) -> Losses:
    """The loss of each example. Labels are class ids, [N...], -1 for a bad one, or distributions."""
    has_ids, class_weight = labels.ndim < rows.logits.ndim, None
    if has_ids:
        labels, options = excuse(labels, options)
    if has_ids and options.label_smoothing is None:
        rule = _label_rule_forward if options.forward_mode else _label_rule
        out = rule(*_axis.vary_alike(rows), labels, options.counts)
        class_weight = class_weight_of(labels, options)
    else:  # the targets carry the class weights
        rule = _target_rule_forward if options.forward_mode else _target_rule
        ids, dense = (rows.expand(labels), None) if has_ids else (None, labels)
        targets = _targets(rows, ids, dense, options)
        out = rule(*_axis.vary_alike(rows, targets), options.counts)
    for kept in out.kept:
        options = options.where(kept > 0)
    return weighted(options, out.loss, out.log_normalizer, class_weight)


def _targets(rows: Rows, ids: Array | None, dense: Array | None, options: Options) -> Targets:
    one = (1,) * rows.logits.ndim
    smoothing, weights = options.label_smoothing, options.class_weights
    if smoothing is None or rows.mask is None:
        num_classes = rows.num_classes * _axis.size(rows.axis_name)
        uniform = jnp.full(one, 1 / num_classes, rows.dtype)
    else:
        count = jnp.sum(rows.mask, axis=rows.axes, keepdims=True, dtype=jnp.int32)
        count = _axis.total(rows.axis_name, count)
        uniform = 1 / jnp.maximum(count, 1).astype(rows.dtype)
    if smoothing is not None:
        smoothing = smoothing.reshape(one)
    if weights is not None:
        sizes = [rows.logits.shape[axis] for axis in rows.axes]
        weights = weights.reshape(one[len(sizes) :] + tuple(sizes))
        weights = jnp.moveaxis(weights, range(-len(sizes), 0), rows.axes)
    return Targets(ids, dense, smoothing, uniform, weights)


# -- rules --------------------------------------------------------------------------------------------
# Each gives the loss and the log-normalizer of every row, and honours a cotangent of both. Rows that do
# not count have a derivative of exactly 0, whatever their logits hold: the caller gives them a
# cotangent of 0 and replaces their values. What is saved for the derivative is the arguments and some
# numbers a row. Those are [N...] here: XLA for CPU is slow on [N, 1].


class _Out(NamedTuple):
    loss: Array  # [N...]
    log_normalizer: Array  # [N...]
    kept: list[Array]  # empty without a mask, else [N...]: 1.0 for rows that keep a class, or 0.0


class _Residuals(NamedTuple):
    rows: Rows
    labels: Array | Targets  # class ids, [N...], or distributions
    counts: Array | None  # [N...]
    stats: Statistics  # [N...] each
    number: Array  # [N...], the label's distance `z_y - max`, or the sum of the targets


def _statistics(operation, rows: Rows, labels: Array | Targets, counts: Array | None):
    """The statistics of whole rows, [N...]: `kept`, and which rows count. Those that keep no class do
    not: their maximum, -inf, would be NaN in derivatives."""
    statistics = _rows.whole_statistics(rows, labels, rows.axis_name, operation)
    numbers = [x.squeeze(rows.axes) for x in statistics]
    if rows.mask is None:
        return counts, [], numbers
    *numbers, kept = numbers
    is_kept = kept > 0
    counts = is_kept if counts is None else counts & is_kept
    return counts, [kept], [jnp.where(is_kept, x, 0) for x in numbers]


def _label_fwd(rows, labels, counts):
    counts, kept, (highest, tail, at_label) = _statistics(
        _backend.label_statistics, rows, rows.expand(labels), counts
    )
    stats = Statistics(highest, tail)
    distance = jnp.where(labels < 0, jnp.nan, at_label - highest)
    out = _Out(stats.label_loss(distance), stats.log_normalizer(), kept)
    return out, _Residuals(rows, labels, counts, stats, distance)


def _label_operands(residuals, g):
    """Of `label_cotangent`, all but the rows."""
    rows, labels, counts, stats, distance = residuals
    factors = (_rows.counted(counts, x, stats.tail) for x in stats.label_factors(distance, *g))
    return map(rows.expand, (labels, stats.max, *factors))


def _label_bwd(residuals, cotangents):
    rows = residuals.rows
    g = _axis.total_cotangent(rows.axis_name, tuple(cotangents[:2]))
    return _backend.label_cotangent(rows, *_label_operands(residuals, g)), None, None


def _target_fwd(rows, targets, counts):
    counts, kept, (highest, tail, target_sum, target_dot) = _statistics(
        _backend.target_statistics, rows, targets, counts
    )
    stats = Statistics(highest, tail)
    out = _Out(stats.target_loss(target_sum, target_dot), stats.log_normalizer(), kept)
    return out, _Residuals(rows, targets, counts, stats, target_sum)


def _target_operands(residuals, g):
    """Of `target_cotangent`, all but the rows and the targets. A row that is not finite is NaN, 0 times
    that too; but if it does not count, it is 0."""
    rows, _, counts, stats, target_sum = residuals
    probe, (g_loss, g_log_normalizer) = stats.tail + target_sum, g
    g_loss = jnp.where((g_loss == 0) & ~jnp.isfinite(probe), jnp.nan, g_loss)
    factors = (_rows.counted(counts, x, probe) for x in (g_loss, g_log_normalizer))
    return map(rows.expand, (*stats, target_sum, *factors))


def _costs(residuals, g_loss):
    """The cotangent of the targets' values, [N, V]."""
    rows, targets, counts, stats, _ = residuals
    costs = _rows.target_costs(rows, targets, *map(rows.expand, (*stats, g_loss)))
    return _rows.counted(None if counts is None else rows.expand(counts), costs, costs)


def _target_bwd(residuals, cotangents):
    rows, targets = residuals[:2]
    g = _axis.total_cotangent(rows.axis_name, tuple(cotangents[:2]))
    of_targets = _rows.targets_cotangent(rows, targets, _costs(residuals, g[0]))
    of_rows = _backend.target_cotangent(rows, targets, *_target_operands(residuals, g))
    return of_rows, of_targets, None


def _reverse_mode(fwd, bwd):
    @jax.custom_vjp
    def rule(rows: Rows, labels: Array | Targets, counts: Array | None) -> _Out:
        return fwd(rows, labels, counts)[0]

    rule.defvjp(fwd, bwd)
    return rule


def _forward_mode(fwd, contraction):
    """The same maps, contracted with a tangent: `contraction(residuals, moving)` gives the function from
    the pair of cotangents to the inner product, [N, 1]. Under `jax.checkpoint`, reverse mode over that
    keeps the arguments and the row statistics, and no array of the logits' size."""

    @jax.custom_jvp
    def rule(rows: Rows, labels: Array | Targets, counts: Array | None) -> _Out:
        return fwd(rows, labels, counts)[0]

    @functools.partial(rule.defjvp, symbolic_zeros=True)
    def jvp(primals, dots):
        out, residuals = fwd(*primals)

        @jax.checkpoint
        def tangent(residuals, moving):
            rows, one = residuals.rows, jnp.ones_like(residuals.stats.tail)
            dot, zero = contraction(residuals, moving), jnp.zeros_like(one)
            both = [dot(g).squeeze(rows.axes) for g in ((one, zero), (zero, one))]
            return _axis.total(rows.axis_name, jnp.stack(both))

        # Leave out arguments that are not differentiated: infinity times their tangent, 0, is NaN.
        loss, log_normalizer = tangent(residuals, _rows.moving(primals[:2], dots[:2]))
        return out, _Out(loss, log_normalizer, [jnp.zeros_like(x) for x in out.kept])

    return rule


def _label_contraction(residuals, moving):
    rows = residuals.rows
    z_dot = _rows.tangent_of(Rows.values, (rows,), moving)

    def dot(g):
        operands = _label_operands(residuals, g)
        of_values = _rows.label_cotangent_of_values(rows, *operands, subtract=below)
        return _rows.sum_classes(rows, of_values * z_dot)

    return dot


def _target_contraction(residuals, moving):
    rows, targets = residuals[:2]
    z_dot = y_dot = None
    if 0 in moving:
        z_dot = _rows.tangent_of(Rows.values, (rows,), {0: moving[0]})
    if 1 in moving:
        y_dot = _rows.tangent_of(Targets.values, (targets, rows), {0: moving[1]})

    def dot(g):
        total = jnp.zeros_like(rows.expand(residuals.number))
        if z_dot is not None:
            operands = _target_operands(residuals, g)
            of_values = _rows.target_cotangent_of_values(rows, targets, *operands, subtract=below)
            total += _rows.sum_classes(rows, of_values * z_dot)
        if y_dot is not None:
            total += _rows.sum_classes(rows, _costs(residuals, g[0]) * y_dot)
        return total

    return dot


_label_rule = _reverse_mode(_label_fwd, _label_bwd)
_target_rule = _reverse_mode(_target_fwd, _target_bwd)
_label_rule_forward = _forward_mode(_label_fwd, _label_contraction)
_target_rule_forward = _forward_mode(_target_fwd, _target_contraction)
