"""Storey 2: the losses on logits. Their options are arithmetic around two differentiation rules."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from . import _axis, _checks, _rows
from ._axis import AxisName
from ._kernels import is_symbolic_zero
from ._label_check import checked, is_class
from ._reduction import REDUCTIONS, both, reduce_losses, times
from ._rows import Rows, Statistics, Targets


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
      where: Bools that broadcast to N... (examples to keep) or else to the logits (classes to keep).
        Give a mask of classes the logits' rank, `[1, V]`, lest it be taken for one of examples. An
        example of which nothing is kept has loss 0. The mass of a distribution on a class that is left
        out is left out too.
      label_smoothing: e, a scalar in [0, 1]; V counts the row's classes that `where` keeps.
      class_weights: [V], the weight of each class.
      weights: [N...], the weight of each example; 0 leaves it out.
      z_loss: A scalar; adds `z_loss * L**2` to each example, not class-weighted.
      softcap: A positive scalar c; the logits become `c * tanh(logits / c)` first.
      reduction: "none" for [N...], "sum", or "mean": the sum over the sum of `weights` of the examples
        that count, and 0 if there are none.
      axis_name: The mesh axis, or axes, over which the classes are split inside `jax.shard_map`: then V
        is the number of classes on this device, in the logits and in all that has classes, and the
        loss is that of whole rows, the same on all devices of the axis. A "mean" or "sum" is over the
        examples of this device. Under `check_vma=False` differentiate outside the `jax.shard_map`:
        inside, JAX adds up the losses of these devices, and gradients are as many times too large.
      forward_mode: Differentiate by a `jax.custom_jvp` of the same form instead of a `jax.custom_vjp`,
        for `jax.jvp`, `jax.jacfwd`, `jax.linearize` and reverse over forward mode.

    Returns:
      The loss: [N...] or a scalar, float32 (float64 for float64 logits). NaN for a row of logits that
      are all -inf, or of which one is +inf or NaN (after the soft-cap); that row's gradient is NaN and
      no other's. A logit of -inf is an absent class, and costs +inf if it has mass.

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
    return run(
        *read_targets(
            logits,
            labels,
            axis,
            where,
            reduction=reduction,
            axis_name=axis_name,
            forward_mode=forward_mode,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            weights=weights,
            z_loss=z_loss,
            softcap=softcap,
        )
    )


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
        those axes flattened in the order given.
      axis: The axis of the classes, or several, which are taken as one; None means all.
      where: Bools that broadcast to N... (examples to keep) or else to the logits (classes to keep).
        Give a mask of classes the logits' rank, `[1, V]`, lest it be taken for one of examples. An
        example of which nothing is kept has loss 0; a label on a class left out costs +inf.
      ignore_index: Examples with this label count nowhere: loss 0, gradient 0.
      label_smoothing: e, a scalar in [0, 1]; V counts the row's classes that `where` keeps.
      class_weights: [V], the weight of each class.
      weights: [N...], the weight of each example; 0 leaves it out.
      z_loss: A scalar; adds `z_loss * L**2` to each example, not class-weighted.
      softcap: A positive scalar c; the logits become `c * tanh(logits / c)` first.
      reduction: "none" for [N...], "sum", or "mean": the sum over the sum of
        `weights * class_weights[label]` of the examples that count, and 0 if there are none.
      axis_name: The mesh axis, or axes, over which the classes are split inside `jax.shard_map`: then V
        is the number of classes on this device, in the logits and in all that has classes, and the
        loss is that of whole rows, the same on all devices of the axis. A "mean" or "sum" is over the
        examples of this device. Under `check_vma=False` differentiate outside the `jax.shard_map`:
        inside, JAX adds up the losses of these devices, and gradients are as many times too large.
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
    return run(
        *read_labels(
            logits,
            labels,
            axis,
            where,
            ignore_index=ignore_index,
            reduction=reduction,
            axis_name=axis_name,
            forward_mode=forward_mode,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            weights=weights,
            z_loss=z_loss,
            softcap=softcap,
        )
    )


# -- from the arguments to the loss -------------------------------------------------------------------


class Setting(NamedTuple):
    """What is known when tracing."""

    axes: tuple[int, ...]  # of the classes
    ignore_index: int | None
    reduction: str
    forward_mode: bool
    classes: AxisName  # the mesh axis over which the classes are split
    batch: AxisName = None  # that of the examples, if a reduction is over all of them


class Arguments(NamedTuple):
    """The arrays, checked."""

    logits: Array
    labels: Array  # [N...], or the shape of the logits
    where: Array | None  # bool, of the logits' rank: the classes to keep
    options: "Options"

    @property
    def has_ids(self) -> bool:
        return self.labels.ndim < self.logits.ndim


def read_targets(
    logits: ArrayLike, labels: ArrayLike, axis: Any, where: ArrayLike | None, **options: Any
) -> tuple[Setting, Arguments]:
    """The arguments of `softmax_cross_entropy`, by those names."""
    logits = _checks.floating("logits", logits)
    axes = _checks.class_axes(axis, logits.ndim)
    labels = _checks.real("labels", labels)
    _checks.shape("labels", labels, logits.shape)
    return _read(logits, axes, labels, where, **options)


def read_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Any,
    where: ArrayLike | None,
    *,
    ignore_index: int | None,
    **options: Any,
) -> tuple[Setting, Arguments]:
    """Those of `softmax_cross_entropy_with_integer_labels`."""
    logits = _checks.floating("logits", logits)
    axes = _checks.class_axes(axis, logits.ndim)
    labels = _checks.integers("labels", labels)
    _checks.shape("labels", labels, _rows_shape(logits, axes))
    ignored = _checks.integer_or_none("ignore_index", ignore_index)
    return _read(logits, axes, labels, where, ignore_index=ignored, **options)


def _read(
    logits: Array,
    axes: tuple[int, ...],
    labels: Array,
    where: ArrayLike | None,
    *,
    reduction: str,
    axis_name: AxisName,
    forward_mode: bool,
    ignore_index: int | None = None,
    **options: Any,
) -> tuple[Setting, Arguments]:
    _checks.one_of("reduction", reduction, REDUCTIONS)
    classes = _checks.axis_name(axis_name)
    forward_mode = _checks.flag("forward_mode", forward_mode)
    rows_shape, num_classes = _rows_shape(logits, axes), _checks.num_classes(logits, axes)
    checked_options = check_options(logits.dtype, rows_shape, num_classes, **options)
    kept, mask = _read_where(_checks.boolean_or_none("where", where), logits.shape, axes, classes)
    if kept is not None:
        checked_options = checked_options.keeping(kept)
    setting = Setting(axes, ignore_index, reduction, forward_mode, classes)
    return setting, Arguments(logits, labels, mask, checked_options)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def run(setting: Setting, arguments: Arguments) -> Array:
    """The loss. Compiled as one where nothing else is; within another compilation, as if it were written
    there."""
    logits, labels, where, options = arguments
    view, options = _view(logits, where, options, setting)
    if arguments.has_ids:
        options = options.ignoring(labels, setting.ignore_index)
        num_classes = view.rows.num_classes * _axis.size(setting.classes)
        index = class_index(labels, num_classes, options)
        loss = label_losses(view, index, options, setting.forward_mode).loss
        weights = label_weights(index, options, setting.classes, loss.dtype)
    else:
        loss = target_losses(view, labels, setting.axes, options, setting.forward_mode).loss
        weights = example_weights(options, loss.shape, loss.dtype)
    return reduce_losses(loss, weights, setting.reduction, setting.batch)


# -- options ------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """The checked arguments; None where an option is not used, so that it costs nothing."""

    kept: Array | None  # bool, [N...], the examples to keep
    weights: Array | None  # [N...]
    smoothing: Array | None  # scalar
    class_weights: Array | None  # [V]
    z_loss: Array | None  # scalar
    softcap: Array | None  # scalar

    def keeping(self, kept: Array) -> "Options":
        return self._replace(kept=both(self.kept, kept))

    def ignoring(self, labels: Array, ignore_index: int | None) -> "Options":
        """Without the examples of that label, compared without wrapping."""
        if ignore_index is None:
            return self
        info = jnp.iinfo(labels.dtype)
        if not info.min <= ignore_index <= info.max:
            return self
        return self.keeping(labels != jnp.asarray(ignore_index, labels.dtype))

    @property
    def counts(self) -> Array | None:
        """[N...], the examples that are kept and have a weight other than 0."""
        return both(self.kept, None if self.weights is None else self.weights != 0)


def check_options(
    dtype: jnp.dtype,
    rows_shape: tuple[int, ...],
    num_classes: int,
    *,
    label_smoothing: ArrayLike,
    class_weights: ArrayLike | None,
    weights: ArrayLike | None,
    z_loss: ArrayLike,
    softcap: ArrayLike | None,
) -> Options:
    """The options for logits of that dtype, checked and in the dtype that they are computed in."""
    dtype = _rows.compute_dtype(dtype)
    smoothing = _scalar_or_none("label_smoothing", label_smoothing, dtype)
    _checks.number_in("label_smoothing", label_smoothing, 0, 1, "[0, 1]")
    cap, of_class, of_example = None, None, None
    if softcap is not None:
        _checks.number_in("softcap", softcap, 0, float("inf"), "(0, inf)")
        cap = _checks.scalar("softcap", softcap).astype(dtype)
    if class_weights is not None:
        of_class = _checks.real("class_weights", class_weights).astype(dtype)
        _checks.shape("class_weights", of_class, (num_classes,))
    if weights is not None:
        of_example = _checks.real("weights", weights).astype(dtype)
        _checks.shape("weights", of_example, rows_shape)
    return Options(
        kept=None,
        weights=of_example,
        smoothing=smoothing,
        class_weights=of_class,
        z_loss=_scalar_or_none("z_loss", z_loss, dtype),
        softcap=cap,
    )


def _scalar_or_none(name: str, x: ArrayLike, dtype: jnp.dtype) -> Array | None:
    """A scalar option as an array; None for the number zero, which switches it off."""
    array = _checks.scalar(name, x).astype(dtype)
    return None if isinstance(x, int | float) and x == 0 else array


def _rows_shape(logits: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(logits.shape) if axis not in axes)


class _View(NamedTuple):
    """Logits, and which classes of them there are."""

    rows: Rows
    classes_kept: Array | None  # bool, [N... or 1..., V]
    share: Array | None  # [N... or 1...], one over the number of classes kept in the row


def logits_view(
    logits: Array, axes: tuple[int, ...], axis_name: AxisName, options: Options
) -> _View:
    """All classes are there."""
    return _View(Rows(logits, None, None, options.softcap, axes, axis_name), None, None)


def _view(
    logits: Array, where: Array | None, options: Options, setting: Setting
) -> tuple[_View, Options]:
    axes, classes = setting.axes, setting.classes
    if where is None:
        return logits_view(logits, axes, classes, options), options
    # Expand the class axes alone: a mask that all examples share stays small.
    sizes = [logits.shape[a] if a in axes else size for a, size in enumerate(where.shape)]
    classes_kept = _rows.classes_last(jnp.broadcast_to(where, sizes), axes)
    count = _axis.total(classes, jnp.sum(classes_kept, axis=-1, dtype=jnp.int32))
    kept = jnp.broadcast_to(count > 0, _rows_shape(logits, axes))
    share = 1 / jnp.maximum(count, 1).astype(_rows.compute_dtype(logits.dtype))
    rows = Rows(logits, where, count > 0, options.softcap, axes, classes)
    return _View(rows, classes_kept, share), options.keeping(kept)


def _read_where(
    where: Array | None, logits_shape: tuple[int, ...], axes: tuple[int, ...], classes: AxisName
) -> tuple[Array | None, Array | None]:
    """`where` as a mask of examples, [N...], or as one of classes, of the logits' rank."""
    if where is None:
        return None, None
    rows_shape = tuple(size for axis, size in enumerate(logits_shape) if axis not in axes)
    # Where the classes are split, there may be just one on each device.
    is_of_rows = classes is None and where.ndim == len(logits_shape)
    if is_of_rows and all(where.shape[axis] == 1 for axis in axes):
        where = where.squeeze(axes)
    if where.ndim < len(logits_shape) and _broadcasts(where.shape, rows_shape):
        return jnp.broadcast_to(where, rows_shape), None
    if _broadcasts(where.shape, logits_shape):
        return None, where.reshape((1,) * (len(logits_shape) - where.ndim) + where.shape)
    raise ValueError(
        f"where must broadcast to the examples, {rows_shape}, or to the logits, {logits_shape}, "
        f"got {where.shape}"
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    tail = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))


def class_index(labels: Array, num_classes: int, options: Options) -> Array:
    """Labels as int32, -1 for those outside [0, V)."""
    labels = checked(labels, num_classes, options.counts)
    good = is_class(labels, num_classes)
    return jnp.where(good, jnp.where(good, labels, 0).astype(jnp.int32), -1)


# -- the loss of each example -------------------------------------------------------------------------


class Losses(NamedTuple):
    """Of each example, [N...]."""

    loss: Array  # weighted; 0 if it does not count
    log_normalizer: Array  # 0 if it does not count


def label_losses(view: _View, index: Array, options: Options, forward_mode: bool) -> Losses:
    """Of class ids, [N...], -1 for a bad one."""
    index, options = _excused(index, options)
    if options.smoothing is None:
        rule = _label_rule_forward if forward_mode else _label_rule
        loss, log_normalizer = rule(*_axis.vary_alike(view.rows), index, options.counts)
        class_weight = _class_weight(index, options, view.rows.axis_name)
    else:
        loss, log_normalizer = _target_rule_of(forward_mode)(
            *_axis.vary_alike(view.rows, _targets(view, index, None, options)), options.counts
        )
        class_weight = None  # the targets carry it
    return _finish(options, loss, log_normalizer, class_weight)


def target_losses(
    view: _View, labels: Array, axes: tuple[int, ...], options: Options, forward_mode: bool
) -> Losses:
    """Of distributions with the classes on `axes`."""
    loss, log_normalizer = _target_rule_of(forward_mode)(
        *_axis.vary_alike(view.rows, _targets(view, labels, axes, options)), options.counts
    )
    return _finish(options, loss, log_normalizer, None)


def _excused(index: Array, options: Options) -> tuple[Array, Options]:
    """A bad class id is none where its example does not count."""
    if options.weights is not None:
        options = options.keeping(~((index < 0) & (options.weights == 0)))
    if options.kept is not None:
        index = jnp.where(options.kept, index, 0)
    return index, options


def label_weights(index: Array, options: Options, axis_name: AxisName, dtype: jnp.dtype) -> Array:
    """[N...], `weights * class_weights[label]` of the examples that are kept."""
    index, options = _excused(index, options)
    weight = example_weights(options, index.shape, dtype)
    class_weight = _class_weight(index, options, axis_name)
    return weight if class_weight is None else weight * class_weight


def example_weights(options: Options, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """[N...], of the examples that are kept."""
    weights = jnp.ones(shape, dtype) if options.weights is None else options.weights
    return weights if options.kept is None else jnp.where(options.kept, weights, 0)


def _class_weight(index: Array, options: Options, axis_name: AxisName) -> Array | None:
    if options.class_weights is None:
        return None
    num_classes = options.class_weights.size
    place = jnp.maximum(index, 0) - _axis.offset(axis_name, num_classes)
    if axis_name is None:
        return options.class_weights[place]
    is_here = (place >= 0) & (place < num_classes)
    weight = jnp.where(is_here, options.class_weights[jnp.where(is_here, place, 0)], 0)
    return _axis.total(axis_name, weight)


def _targets(view: _View, labels: Array, axes: tuple[int, ...] | None, options: Options) -> Targets:
    rows = view.rows
    return Targets(
        labels,
        view.classes_kept,
        view.share,
        options.smoothing,
        options.class_weights,
        axes,
        rows.num_classes,
        _rows.compute_dtype(rows.logits.dtype),
        rows.axis_name,
    )


def _finish(
    options: Options, loss: Array, log_normalizer: Array, class_weight: Array | None
) -> Losses:
    """Apply what comes after the rule: the class weight, the z-loss, the weights of the examples.

    What must not count is made 0 before any arithmetic, for 0 times NaN is NaN, in derivatives too. A
    loss of weight 0 is kept where it is finite: it is the derivative with respect to that weight.
    """
    live = options.kept
    if options.weights is not None:
        weighted = loss if class_weight is None else times(class_weight, loss)
        harmless = (options.weights != 0) | (jnp.isfinite(weighted) & jnp.isfinite(log_normalizer))
        live = both(live, harmless)
    if live is not None:
        loss, log_normalizer = jnp.where(live, loss, 0), jnp.where(live, log_normalizer, 0)

    if class_weight is not None:
        loss = times(class_weight, loss)
    if options.z_loss is not None:
        loss = loss + options.z_loss * jnp.square(log_normalizer)
    if options.weights is not None or options.kept is not None:
        loss = example_weights(options, loss.shape, loss.dtype) * loss
    if options.counts is not None:
        log_normalizer = jnp.where(options.counts, log_normalizer, 0)
    return Losses(loss, log_normalizer)


# -- rules --------------------------------------------------------------------------------------------
# Each gives the loss and the log-normalizer of every row, and honours a cotangent of both. Rows outside
# `counts` have a derivative of exactly 0, whatever their logits hold: the caller gives them a cotangent
# of 0 and replaces their values. What is saved for the derivative is the arguments and some numbers a
# row.


class _LabelResiduals(NamedTuple):
    rows: Rows
    labels: Array  # [N...]
    counts: Array | None  # [N...]
    gap: Array  # [N...], the label's logit less the largest
    stats: Statistics  # [N...] each


@jax.custom_vjp
def _label_rule(rows: Rows, labels: Array, counts: Array | None) -> tuple[Array, Array]:
    return _label_fwd(rows, labels, counts)[0]


def _label_fwd(rows, labels, counts):
    stats, gap = _rows.label_statistics(rows, labels)
    out = _rows.label_loss(gap, stats), _rows.log_normalizer(stats)
    return out, _LabelResiduals(rows, labels, counts, gap, stats)


def _label_bwd(residuals, cotangents):
    rows, labels, counts, gap, stats = residuals
    cotangents = _axis.total_cotangent(rows.axis_name, cotangents)
    pulled = _rows.pull_label(rows, labels, counts, gap, stats, *cotangents)
    return _of_rows(rows, *pulled), None, None


_label_rule.defvjp(_label_fwd, _label_bwd)


def _target_rule_of(forward_mode: bool):
    return _target_rule_forward if forward_mode else _target_rule


class _TargetResiduals(NamedTuple):
    rows: Rows
    targets: Targets
    counts: Array | None  # [N...]
    mass: Array  # [N...], the sum of the targets
    stats: Statistics  # [N...] each


@jax.custom_vjp
def _target_rule(rows: Rows, targets: Targets, counts: Array | None) -> tuple[Array, Array]:
    return _target_fwd(rows, targets, counts)[0]


def _target_fwd(rows, targets, counts):
    stats, mass, moment = _rows.target_statistics(rows, targets)
    out = _rows.target_loss(mass, moment, stats), _rows.log_normalizer(stats)
    return out, _TargetResiduals(rows, targets, counts, mass, stats)


def _target_bwd(residuals, cotangents):
    rows, targets, counts, mass, stats = residuals
    cotangents = _axis.total_cotangent(rows.axis_name, cotangents)
    pulled = _rows.pull_target(rows, targets, counts, mass, stats, *cotangents)
    of_targets = _rows.cost_cotangent(rows, targets, stats, cotangents[0])
    of_targets = _rows.pull(targets, _rows.only(counts, of_targets, of_targets))
    return _of_rows(rows, *pulled), of_targets, None


_target_rule.defvjp(_target_fwd, _target_bwd)


def _of_rows(rows: Rows, logits: Array, softcap: Array | None) -> Rows:
    """Their cotangent; a mask has none."""
    return dataclasses.replace(rows, logits=logits, where=None, some_kept=None, softcap=softcap)


# Forward mode: the same maps, contracted with a tangent. Under `jax.checkpoint`, reverse mode over the
# tangent keeps the arguments and the row statistics, and no array of the logits' size.


@jax.custom_jvp
def _label_rule_forward(rows: Rows, labels: Array, counts: Array | None) -> tuple[Array, Array]:
    return _label_fwd(rows, labels, counts)[0]


@_label_rule_forward.defjvp
def _label_jvp(primals, tangents):
    out, residuals = _label_fwd(*primals)

    @jax.checkpoint
    def tangent(residuals, rows_dot):
        rows, labels, counts, gap, stats = residuals
        z_dot = _rows.push(rows, rows_dot)
        one, zero = jnp.ones_like(gap), jnp.zeros_like(gap)
        tell = stats.tail[..., None]

        def cotangent(*g):
            return _rows.only(counts, _rows.label_cotangent(rows, labels, gap, stats, *g), tell)

        dots = [jnp.sum(cotangent(*g) * z_dot, -1) for g in ((one, zero), (zero, one))]
        return tuple(_axis.total(rows.axis_name, jnp.stack(dots)))

    return out, tangent(residuals, tangents[0])


@jax.custom_jvp
def _target_rule_forward(rows: Rows, targets: Targets, counts: Array | None) -> tuple[Array, Array]:
    return _target_fwd(rows, targets, counts)[0]


@functools.partial(_target_rule_forward.defjvp, symbolic_zeros=True)
def _target_jvp(primals, tangents):
    out, residuals = _target_fwd(*primals)
    views = {"rows": (tangents[0], primals[0]), "targets": (tangents[1], primals[1])}
    # The cost of an absent class is infinite, and infinity times a tangent of 0 is NaN: leave out the
    # targets altogether where they are not differentiated.
    moving = {name: _instantiate(*view) for name, view in views.items() if _moves(view[0])}

    @jax.checkpoint
    def tangent(residuals, moving):
        rows, targets, counts, mass, stats = residuals
        one, zero = jnp.ones_like(mass), jnp.zeros_like(mass)
        dots = []
        for g in ((one, zero), (zero, one)):
            dot = zero
            if "rows" in moving:
                of_rows = _rows.target_cotangent(rows, targets, mass, stats, *g)
                of_rows = _rows.only(counts, of_rows, (stats.tail + mass)[..., None])
                dot += jnp.sum(of_rows * _rows.push(rows, moving["rows"]), -1)
            if "targets" in moving:
                of_targets = _rows.cost_cotangent(rows, targets, stats, g[0])
                of_targets = _rows.only(counts, of_targets, of_targets)
                dot += jnp.sum(of_targets * _rows.push(targets, moving["targets"]), -1)
            dots.append(dot)
        return tuple(_axis.total(rows.axis_name, jnp.stack(dots)))

    return out, tangent(residuals, moving)


def _moves(tangent) -> bool:
    leaves = jax.tree.leaves(tangent, is_leaf=is_symbolic_zero)
    return not all(map(is_symbolic_zero, leaves))


def _instantiate(tangent, primal):
    def zeros(x, like):
        if not is_symbolic_zero(x):
            return x
        return _axis.vary(jnp.zeros(x.shape, x.dtype), _axis.varying(like))

    return jax.tree.map(zeros, tangent, primal, is_leaf=is_symbolic_zero)
