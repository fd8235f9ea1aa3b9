"""The losses on logits. The options are arithmetic around the rule of `_rules.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array

from . import _arguments, _axis, _rows, _rules, _sparse, _teacher
from ._arguments import Options
from ._aux import CrossEntropyAux, aux_of
from ._axis import AxisName
from ._elementary import weigh
from ._label_check import class_index
from ._rows import STATIC, Rows, Targets
from ._rules import Kind
from ._sparse import SparseTargets
from ._targets import Sparse
from ._teacher import TeacherRows
from ._types import ArrayLike, Reduction
from ._weighting import Losses, class_weight_of, excuse, mean_weights, reduce_losses, weighted


# fmt: off
@overload
def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike | Sparse, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, temperature: ArrayLike | None = None,
    reduction: Reduction = "none", axis_name: AxisName = None, return_aux: Literal[False] = False,
    forward_mode: bool = False,
) -> Array: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike | Sparse, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, temperature: ArrayLike | None = None,
    reduction: Reduction = "none", axis_name: AxisName = None, return_aux: Literal[True],
    forward_mode: bool = False,
) -> tuple[Array, CrossEntropyAux]: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike | Sparse, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, temperature: ArrayLike | None = None,
    reduction: Reduction = "none", axis_name: AxisName = None, return_aux: bool,
    forward_mode: bool = False,
) -> Array | tuple[Array, CrossEntropyAux]: ...


def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike | Sparse, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, temperature: ArrayLike | None = None,
    reduction: Literal["none", "sum", "mean"] = "none", axis_name: AxisName = None,
    return_aux: bool = False, forward_mode: bool = False,
) -> Array | tuple[Array, CrossEntropyAux]:
    """Softmax cross-entropy between logits and distributions over the classes.

    For forward mode (`jax.jvp`, `check_grads`) pass `forward_mode=True`.

    The loss of an example with logits z and targets y is

        w (sum_c w_c y'_c (-log o_c) + z_loss L^2)

        o_c  = e^z_c / sum_k e^z_k      softmax
        L    = log sum_k e^z_k          log-normalizer
        y'_c = (1 - e) y_c + e / V      smoothed targets

    where w comes from `weights`, w_c from `class_weights`, and e is the
    `label_smoothing`. The targets need not sum to one. Without options the
    gradient with respect to z_c is o_c sum_k y_k - y_c, and the gradient with
    respect to y_c is -log o_c.

    Args:
      logits: [N..., V], with the classes on `axis`. The dtype is float16,
        bfloat16, float32 or float64, as for all float arguments. The loss of
        16-bit logits is computed in float32.
      labels: Distributions, in the shape of `logits`: floats, or integers or
        bools such as one-hot rows. Or a `Sparse`, which lists a few classes of
        each example.
      axis: The axis of the classes. Several axes are flattened into one; None
        means all.
      where: Bools, True to keep. With the rank of the examples, [N...], a mask
        of examples. With the rank of the logits, a mask of classes, e.g.
        `[1, V]` for all examples. Axes of size 1 broadcast. An example without
        a kept class has loss 0. A target on a masked class is ignored.
      label_smoothing: e, a number in [0, 1]. V counts the classes that `where`
        keeps in the row.
      class_weights: [V], the weight of each class.
      weights: [N...], the weight of each example. A number or axes of size 1
        broadcast. An example of weight 0 does not count.
      z_loss: A number; adds `z_loss * L**2` to each loss. Class weights do not
        apply to it.
      softcap: A positive number c; the logits become `c * tanh(logits / c)`.
      temperature: A positive number, or one for each example, [N...]; axes of
        size 1 broadcast. The logits are divided by it, after the soft-cap. It
        is differentiable.
      reduction: "none" returns [N...]. "sum" adds the losses up. "mean" divides
        this sum by the sum of `weights` over the examples that count, and is 0
        if there are none.
      axis_name: Inside `jax.shard_map`, the mesh axis over which the classes
        are split, or a tuple of axes. V in the shapes is then the number of
        classes on this device; elsewhere (smoothing, the range of class ids) it
        counts those of all devices. Distributions are split like the logits;
        the ids of a `Sparse` are global. The loss covers the classes of all
        devices and is the same on all devices of the axis. "mean" and "sum"
        reduce over the examples of this device. With `check_vma=False`,
        differentiate outside of `shard_map`: inside, JAX multiplies gradients
        by the axis size.
      return_aux: Also return a `CrossEntropyAux`: each example's
        log-normalizer, prediction and entropy. Log-normalizer and entropy are
        differentiated exactly. Prediction and entropy each read the logits once
        more, if you use them.
      forward_mode: Differentiate with a `jax.custom_jvp` of the same formulas
        instead of a `jax.custom_vjp`. `jax.jvp`, `jax.jacfwd`, `jax.linearize`
        and reverse over forward mode need it.

    Returns:
      The loss, [N...] or a scalar, in float32 (float64 for float64 logits).
      With `return_aux`, the pair (loss, aux). The loss and the gradient of a
      row are NaN if its logits are all -inf or, after the soft-cap, contain
      +inf or NaN; gradients of other rows are not affected. A logit of -inf
      marks an absent class. If its target is not 0, the loss is +inf.

    Raises:
      TypeError, ValueError: An argument has the wrong type, shape or range. The
        message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sce import softmax_cross_entropy
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
      >>> with jnp.printoptions(precision=4):
      ...     print(softmax_cross_entropy(logits, labels))
      [0.2761 1.8018]
      >>> mean = softmax_cross_entropy(logits, labels, reduction="mean")
      >>> print(f"{mean:.4f}")
      1.0390

    References:
      Bridle (1990), "Probabilistic interpretation of feedforward classification
      network outputs", for the loss and its derivative; Szegedy et al. (2016),
      arXiv:1512.00567, for label smoothing; Chowdhery et al. (2022),
      arXiv:2204.02311, section 5, for the z-loss; Gemma Team (2024),
      arXiv:2408.00118, for the soft-cap.

    See also:
      `softmax_cross_entropy_with_integer_labels`, for one class per example.
    """
    return _rules.call(loss_of, inputs(
        logits, labels, axis, where, has_ids=False, label_smoothing=label_smoothing,
        class_weights=class_weights, weights=weights, z_loss=z_loss, softcap=softcap,
        temperature=temperature, reduction=reduction, axis_name=axis_name, return_aux=return_aux,
        forward_mode=forward_mode))
# fmt: on


# fmt: off
@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0, class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0, softcap: ArrayLike | None = None,
    temperature: ArrayLike | None = None, reduction: Reduction = "none", axis_name: AxisName = None,
    return_aux: Literal[False] = False, forward_mode: bool = False,
) -> Array: ...


@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0, class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0, softcap: ArrayLike | None = None,
    temperature: ArrayLike | None = None, reduction: Reduction = "none", axis_name: AxisName = None,
    return_aux: Literal[True], forward_mode: bool = False,
) -> tuple[Array, CrossEntropyAux]: ...


@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0, class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0, softcap: ArrayLike | None = None,
    temperature: ArrayLike | None = None, reduction: Reduction = "none", axis_name: AxisName = None,
    return_aux: bool, forward_mode: bool = False,
) -> Array | tuple[Array, CrossEntropyAux]: ...


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None, *, ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0, class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0, softcap: ArrayLike | None = None,
    temperature: ArrayLike | None = None, reduction: Literal["none", "sum", "mean"] = "none",
    axis_name: AxisName = None, return_aux: bool = False, forward_mode: bool = False,
) -> Array | tuple[Array, CrossEntropyAux]:
    """Softmax cross-entropy between logits and class ids.

    For forward mode (`jax.jvp`, `check_grads`) pass `forward_mode=True`.

    The loss of an example with logits z and label y is -log o_y, where o is the
    softmax of z. Its gradient is o_c - [c = y]. With options the loss is

        w (sum_c w_c y'_c (-log o_c) + z_loss L^2)

        o_c  = e^z_c / sum_k e^z_k          softmax
        L    = log sum_k e^z_k              log-normalizer
        y'_c = (1 - e) [c = y] + e / V      smoothed targets

    where w comes from `weights`, w_c from `class_weights`, and e is the
    `label_smoothing`.

    Args:
      logits: [N..., V], with the classes on `axis`. The dtype is float16,
        bfloat16, float32 or float64, as for all float arguments. The loss of
        16-bit logits is computed in float32.
      labels: [N...], integers in [0, V) of any integer dtype. With several
        class axes: indices into these axes, flattened in the order given.
        (Without x64, `jax.jit` truncates 64-bit NumPy integers that you pass to
        your own jitted function, before this function sees them.)
      axis: The axis of the classes. Several axes are flattened into one; None
        means all.
      where: Bools, True to keep. With the rank of the examples, [N...], a mask
        of examples. With the rank of the logits, a mask of classes, e.g.
        `[1, V]` for all examples. Axes of size 1 broadcast. An example without
        a kept class has loss 0. If the label's class is masked, the
        loss is +inf.
      ignore_index: Examples with this label do not count: loss 0, gradient 0.
      label_smoothing: e, a number in [0, 1]. V counts the classes that `where`
        keeps in the row.
      class_weights: [V], the weight of each class.
      weights: [N...], the weight of each example. A number or axes of size 1
        broadcast. An example of weight 0 does not count.
      z_loss: A number; adds `z_loss * L**2` to each loss. Class weights do not
        apply to it.
      softcap: A positive number c; the logits become `c * tanh(logits / c)`.
      temperature: A positive number, or one for each example, [N...]; axes of
        size 1 broadcast. The logits are divided by it, after the soft-cap. It
        is differentiable.
      reduction: "none" returns [N...]. "sum" adds the losses up. "mean" divides
        this sum by the sum of `weights * class_weights[label]` over the
        examples that count, and is 0 if there are none.
      axis_name: Inside `jax.shard_map`, the mesh axis over which the classes
        are split, or a tuple of axes. V in the shapes is then the number of
        classes on this device; elsewhere (smoothing, the range of class ids) it
        counts those of all devices. Labels are global class ids. The loss
        covers the classes of all devices and is the same on all devices of the
        axis. "mean" and "sum" reduce over the examples of this device. With
        `check_vma=False`, differentiate outside of `shard_map`: inside, JAX
        multiplies gradients by the axis size.
      return_aux: Also return a `CrossEntropyAux`: each example's
        log-normalizer, prediction and entropy, and the rank of its label.
        Log-normalizer and entropy are differentiated exactly. Prediction,
        entropy and rank each read the logits once more, if you use them.
      forward_mode: Differentiate with a `jax.custom_jvp` of the same formulas
        instead of a `jax.custom_vjp`. `jax.jvp`, `jax.jacfwd`, `jax.linearize`
        and reverse over forward mode need it.

    Returns:
      The loss, [N...] or a scalar, in float32 (float64 for float64 logits).
      With `return_aux`, the pair (loss, aux). The loss and the gradient of a
      row are NaN if its label lies outside [0, V), -1 included, or if its
      logits are all -inf or, after the soft-cap, contain +inf or NaN; gradients
      of other rows are not affected. A logit of -inf marks an absent class. If
      it is the label, the loss is +inf. `jax.experimental.checkify.checkify`
      with user checks reports the first label outside [0, V) and its position.

    Raises:
      TypeError, ValueError: An argument has the wrong type, shape or range. The
        message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sce import softmax_cross_entropy_with_integer_labels
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> labels = jnp.array([0, 1])
      >>> with jnp.printoptions(precision=4):
      ...     print(softmax_cross_entropy_with_integer_labels(logits, labels))
      [0.2761 2.9518]
      >>> confident = jnp.array([17.0, 0.0])
      >>> loss = softmax_cross_entropy_with_integer_labels(confident, 0)
      >>> print(f"{loss:.3e}")
      4.140e-08

    References:
      Bridle (1990), "Probabilistic interpretation of feedforward classification
      network outputs", for the loss and its derivative; Szegedy et al. (2016),
      arXiv:1512.00567, for label smoothing; Chowdhery et al. (2022),
      arXiv:2204.02311, section 5, for the z-loss; Gemma Team (2024),
      arXiv:2408.00118, for the soft-cap.

    See also:
      `softmax_cross_entropy`, for distributions.
    """
    return _rules.call(loss_of, inputs(
        logits, labels, axis, where, has_ids=True, ignore_index=ignore_index,
        label_smoothing=label_smoothing, class_weights=class_weights, weights=weights,
        z_loss=z_loss, softcap=softcap, temperature=temperature, reduction=reduction,
        axis_name=axis_name, return_aux=return_aux, forward_mode=forward_mode))
# fmt: on


# -- from the arguments to the loss -------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The checked arguments."""

    logits: Array
    labels: Array | Sparse  # class ids, [N...], or distributions in the logits' shape
    mask: Array | None  # bool, with the logits' rank: the classes to keep
    options: Options
    axes: tuple[int, ...] = dataclasses.field(metadata=STATIC)  # of the classes

    @property
    def has_ids(self) -> bool:
        return not isinstance(self.labels, Sparse) and self.labels.ndim < self.logits.ndim


_FOR_DISTRIBUTIONS = "; for distributions use softmax_cross_entropy"
_FOR_IDS = "; for class ids use softmax_cross_entropy_with_integer_labels"


def inputs(
    logits: ArrayLike, labels: Any, axis: int | Sequence[int] | None, where: ArrayLike | None,
    *, has_ids: bool, ignore_index: int | None = None, **options: Any,
) -> Inputs:  # fmt: skip
    """Check the arguments of either loss. The keywords are the public argument names."""
    logits = _arguments.array("logits", logits, "floating")
    axes = _arguments.class_axes(axis, logits.ndim)
    batch = _arguments.batch_shape(logits.shape, axes)
    num_classes = _arguments.num_classes(logits, axes)
    if isinstance(labels, Sparse) and not has_ids:
        labels = _arguments.sparse(labels, batch)
    else:
        expected, other, advice = logits.shape, batch, _FOR_IDS
        if has_ids:
            expected, other, advice = batch, logits.shape, _FOR_DISTRIBUTIONS
        labels, ignore_index = _arguments.labels(labels, has_ids, ignore_index, advice)
        _arguments.shape("labels", labels, expected, advice if labels.shape == other else "")
    given = _arguments.options(
        logits.dtype, batch, num_classes, ignore_index=ignore_index, **options
    )
    _arguments.split_over("logits", logits, given.axis_name)
    examples, mask = _arguments.masks(where, logits.shape, axes)
    return Inputs(logits, labels, mask, given.where(examples), axes)


@jax.jit
def loss_of(inputs: Inputs) -> Any:
    """The loss, or (loss, aux) with `return_aux`. It is jitted, so that an eager call and its derivative
    are one program each. (With `inline=True`, JAX 0.10 would run the derivative op by op.)"""
    options: Options = inputs.options
    labels: Any = inputs.labels
    axes = tuple(axis - inputs.logits.ndim for axis in inputs.axes)
    rows = rows_of(inputs.logits, axes, options.axis_name, options.softcap, options.temperature)
    if inputs.mask is not None:
        rows = dataclasses.replace(rows, mask=rows.expand_classes(inputs.mask))
    if inputs.has_ids:
        options = options.where(_arguments.not_ignored(labels, options.ignore_index))
    num_classes = rows.num_classes * _axis.size(options.axis_name)
    reported = options  # for checkify only: the row operations compute `kept` themselves
    for kept in _rows.keeps_class(rows):
        reported = reported.where(_axis.total(rows.axis_name, kept.squeeze(rows.axes)) > 0)
    labels = checked(labels, num_classes, reported.counts, inputs.has_ids)
    of_examples = losses(rows, labels, options)
    loss, options = of_examples.loss, dataclasses.replace(options, valid=of_examples.valid)
    weights = mean_weights(options, labels if inputs.has_ids else None, loss)
    loss = reduce_losses(loss, weights, options.reduction, options.batch_axis)
    if not options.return_aux:
        return loss
    ids = labels if inputs.has_ids else None
    return loss, aux_of(rows, ids, of_examples, options.counts)


def checked(labels: Any, num_classes: int, counts: Array | None, has_ids: bool) -> Any:
    """Class ids as int32: -1 for a bad label, V for padding of a `Sparse`. Distributions and a `Teacher`
    are returned as they are."""
    if isinstance(labels, Sparse):
        given: Any = labels.ids
        is_empty = given < 0
        reported = ~is_empty if counts is None else ~is_empty & counts[..., None]
        ids = class_index(given, num_classes, reported)
        return Sparse(jnp.where(is_empty, num_classes, ids), labels.values)
    return class_index(labels, num_classes, counts) if has_ids else labels


def rows_of(
    logits: Array, axes: tuple[int, ...], axis_name: AxisName, softcap: Array | None,
    temperature: Array | None,
) -> Rows:  # fmt: skip
    """`Rows` without a mask, from a scalar soft-cap and temperatures [N...]. `axes` are negative."""
    one = (1,) * logits.ndim
    softcap = None if softcap is None else softcap.reshape(one)
    temperature = None if temperature is None else jnp.expand_dims(temperature, axes)
    rows = Rows(logits, axes, None, softcap, temperature, axis_name=axis_name)
    if axis_name is None:
        return rows
    first = jnp.asarray(_axis.offset(axis_name, rows.num_classes), jnp.int32)
    return dataclasses.replace(rows, first_class=first.reshape(one))


def losses(rows: Rows, labels: Array | Sparse | TeacherRows, options: Options) -> Losses:
    """The loss of each example, [N...]. In `labels`, -1 is a bad class id, and V is padding of a
    `Sparse`."""
    kind: Kind = _rules.DISTRIBUTIONS
    class_weight, targets = None, None
    if isinstance(labels, TeacherRows):
        kind = _teacher.DIVERGENCE if labels.divergence else _teacher.CROSS_ENTROPY
        rows, targets = _axis.vary_alike(rows, labels.rows)
    elif isinstance(labels, Sparse):
        kind, targets = _sparse.SPARSE, _sparse_targets(rows, labels, options)
        rows, targets = _axis.vary_alike(rows, targets)
    elif labels.ndim == rows.logits.ndim:
        rows, targets = _axis.vary_alike(rows, _targets(rows, None, labels, options))
    else:
        labels, options = excuse(labels, options)
        if options.label_smoothing is not None:
            targets = _targets(rows, rows.expand(labels), None, options)
            rows, targets = _axis.vary_alike(rows, targets)
        else:  # here the class weights are not part of the targets, but multiply the loss
            kind, targets, (rows,) = _rules.IDS, labels, _axis.vary_alike(rows)
            class_weight = class_weight_of(labels, options)
    rule = _rules.rule_forward if options.forward_mode else _rules.rule
    # JAX's error about forward mode quotes this line: its comment tells the user what to do.
    out = rule(kind, options.return_aux, rows, targets, options.counts)  # jvp: forward_mode=True
    for kept in out.kept:
        options = options.where(kept > 0)
    return weighted(options, out, class_weight)


def _sparse_targets(rows: Rows, labels: Any, options: Options) -> SparseTargets:
    ids = rows.expand_last(labels.ids)
    values = rows.expand_last(labels.values).astype(rows.dtype)
    values = jnp.where(ids == rows.num_classes * _axis.size(rows.axis_name), 0, values)
    uniform = None
    if options.label_smoothing is not None:
        uniform = _targets(rows, None, None, options)
        values = (1 - options.label_smoothing) * values
    if options.class_weights is not None:
        place = jnp.clip(rows.places(ids), 0, rows.num_classes - 1)
        values = weigh(values, options.class_weights[place])
    return SparseTargets(ids, values, uniform)


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
