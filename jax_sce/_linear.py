"""The loss of a linear head, from hidden states and kernel. The [N, V] logits are never stored.

With "mean" and "sum", the cotangents of all examples are known in the forward pass, up to one common
factor. So the forward rule computes the gradients along with the value (6NDV operations, as with stored
logits), and the backward rule scales them. With "none", the cotangents are known only in the backward
pass, so the backward rule computes the logits again.

References: computing gradients in the forward pass is Liger-Kernel's idea (Hsu et al., 2024,
arXiv:2410.10989); Wijmans et al. (2024), arXiv:2411.09009, recompute, as "none" does here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from . import _arguments, _axis, _cross_entropy, _head, _partition, _rules
from ._aux import CrossEntropyAux
from ._axis import AxisName
from ._head import Cotangents, Inputs, Values
from ._targets import Sparse, Teacher
from ._types import ArrayLike, Reduction
from ._weighting import mean_weights, reduce_losses


# fmt: off
@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike, kernel: ArrayLike, labels: ArrayLike | Sparse | Teacher, *,
    bias: ArrayLike | None = None, ignore_index: int | None = None, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, temperature: ArrayLike | None = None,
    reduction: Reduction = "none", axis_name: AxisName = None, chunk_size: int | None = None,
    dtype: DTypeLike | None = None, precision: PrecisionLike = None, return_aux: Literal[False] = False,
    forward_mode: bool = False,
) -> Array: ...


@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike, kernel: ArrayLike, labels: ArrayLike | Sparse | Teacher, *,
    bias: ArrayLike | None = None, ignore_index: int | None = None, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, temperature: ArrayLike | None = None,
    reduction: Reduction = "none", axis_name: AxisName = None, chunk_size: int | None = None,
    dtype: DTypeLike | None = None, precision: PrecisionLike = None, return_aux: Literal[True],
    forward_mode: bool = False,
) -> tuple[Array, CrossEntropyAux]: ...


@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike, kernel: ArrayLike, labels: ArrayLike | Sparse | Teacher, *,
    bias: ArrayLike | None = None, ignore_index: int | None = None, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, temperature: ArrayLike | None = None,
    reduction: Reduction = "none", axis_name: AxisName = None, chunk_size: int | None = None,
    dtype: DTypeLike | None = None, precision: PrecisionLike = None, return_aux: bool,
    forward_mode: bool = False,
) -> Array | tuple[Array, CrossEntropyAux]: ...


def linear_softmax_cross_entropy(
    hidden: ArrayLike, kernel: ArrayLike, labels: ArrayLike | Sparse | Teacher, *,
    bias: ArrayLike | None = None, ignore_index: int | None = None, label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None, weights: ArrayLike | None = None, z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None, temperature: ArrayLike | None = None,
    reduction: Literal["none", "sum", "mean"] = "none", axis_name: AxisName = None,
    chunk_size: int | None = None, dtype: DTypeLike | None = None, precision: PrecisionLike = None,
    return_aux: bool = False, forward_mode: bool = False,
) -> Array | tuple[Array, CrossEntropyAux]:
    """Softmax cross-entropy of a linear head, without storing its logits.

    For forward mode (`jax.jvp`, `check_grads`) pass `forward_mode=True`.

    The result is that of `softmax_cross_entropy_with_integer_labels(hidden @
    kernel + bias, labels)`, or of `softmax_cross_entropy` for other labels. The
    logits are computed one chunk of examples at a time, and accumulated in
    float32 (float64 for float64 inputs).

    With "mean" and "sum" the forward pass also computes the gradients. Together
    the two passes do as many operations as with stored logits. With "none" the
    backward pass computes the logits again. Examples that do not count, because
    of `ignore_index` or weight 0, cost next to nothing. But weight 0 saves
    nothing if the weights are differentiated, or in forward mode.

    If `jax.jit` partitions the program over devices, each device computes its
    own examples and classes, following the shardings of `hidden` and `kernel`.

    Pass all examples in one call, [N..., D]. `jax.vmap` over examples would
    make a gradient of the kernel, [D, V], for each of them.

    Args:
      hidden: [N..., D], in float16, bfloat16, float32 or float64, like all
        float arguments.
      kernel: [D, V]. For a tied embedding [V, D] pass `embedding.T` (XLA on CPU
        copies it once). If `hidden` and `kernel` differ in dtype, the matrix
        products are computed in the wider dtype; under
        `jax.numpy_dtype_promotion("strict")` you must set `dtype`.
      labels: [N...], integers in [0, V); [N..., V], distributions; a `Sparse`,
        which lists a few classes of each example; or a `Teacher`, the softmax
        of another head. (Without x64, `jax.jit` truncates 64-bit NumPy integers
        that you pass to your own jitted function, before this function sees
        them.)
      bias: [V].
      ignore_index: Examples with this label do not count: loss 0, gradient 0.
        Only for class ids.
      label_smoothing: e, a number in [0, 1].
      class_weights: [V], the weight of each class.
      weights: [N...], the weight of each example. A number or axes of size 1
        broadcast. An example of weight 0 does not count.
      z_loss: A number; adds `z_loss * L**2` to each loss, where L is the
        log-normalizer. Class weights do not apply to it.
      softcap: A positive number c; the logits become `c * tanh(logits / c)`.
      temperature: A positive number, or one for each example, [N...]; axes of
        size 1 broadcast. The logits are divided by it, after the soft-cap. It
        is differentiable.
      reduction: "none" returns [N...]. "sum" adds the losses up. "mean" divides
        this sum by the sum of `weights * class_weights[label]` (of `weights`,
        if labels are not class ids) over the examples that count, and is 0 if
        there are none.
      axis_name: Inside `jax.shard_map`, the mesh axis over which the classes
        are split, or a tuple of axes. V in the shapes is then the number of
        classes on this device; elsewhere (smoothing, the range of class ids) it
        counts those of all devices. Class ids are global; distributions are
        split like the classes. The loss covers the classes of all devices and
        is the same on all devices of the axis. "mean" and "sum" reduce over the
        examples of this device. With `check_vma=False`, differentiate outside
        of `shard_map`: inside, JAX multiplies gradients by the axis size.
      chunk_size: The number of examples in a chunk. The float32 logits of one
        chunk are held in memory. None chooses from shapes and platform: 256 to
        512 examples on CPU and 2048 to 8192 elsewhere, but fewer if their
        logits would exceed 128 MiB on CPU or 2 GiB elsewhere. Without gradients
        it chooses 64 to 256, and 1024 to 8192. Measured on CPU, where None
        chose 256: chunks of 128 took as long, with 0.6 to 0.8 of the temporary
        memory; chunks of 64, 32 and 16 took up to 1.3, 1.7 and 2.5 times as
        long, with 0.2 to 0.6 of it. For any chunk size, the gradient of a
        16-bit kernel is summed in a float32 array of the kernel's shape.
      dtype: The dtype of the matrix products, as in Flax's layers; None means
        the wider of `hidden` and `kernel`. bfloat16 with a float32 kernel is
        mixed precision: `hidden` and `kernel` are rounded once, before the
        products, and the kernel's gradient is summed and returned in float32.
      precision: The precision of the matrix products, as in `jax.numpy.dot`:
        None, "highest" and so on.
      return_aux: Also return a `CrossEntropyAux`: each example's
        log-normalizer, prediction and entropy and, for class ids, the rank of
        its label. Log-normalizer and entropy are differentiated exactly; with
        "mean" and "sum" their derivative computes the logits once more, if you
        use it.
      forward_mode: Differentiate the loop over the chunks with JAX's own rules.
        `jax.jvp`, `jax.jacfwd`, `jax.linearize` and reverse over forward mode
        need it.

    Returns:
      The loss, [N...] or a scalar, in float32 (float64 for float64 inputs).
      With `return_aux`, the pair (loss, aux). Bad labels and logits give NaN as
      in the losses on logits, and `checkify` reports bad labels in the same
      way. Gradients have the dtypes of their arguments and are accumulated in
      float32. (In float16, "mean" and "sum" compute the logits again in the
      backward pass, too: in the forward pass the scale of the gradients is not
      known, and they could leave the range of float16.)

    Raises:
      TypeError, ValueError: An argument has the wrong type, shape or range. The
        message names it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_sce import linear_softmax_cross_entropy
      >>> hidden = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
      >>> kernel = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, -1.0]])
      >>> labels = jnp.array([0, 1, -100])
      >>> losses = linear_softmax_cross_entropy(
      ...     hidden, kernel, labels, ignore_index=-100)
      >>> with jnp.printoptions(precision=4):
      ...     print(losses)
      [0.0949 0.1429 0.    ]
      >>> loss, gradient = jax.value_and_grad(
      ...     linear_softmax_cross_entropy, argnums=1
      ... )(hidden, kernel, labels, ignore_index=-100, reduction="mean")
      >>> print(f"{loss:.4f}", gradient.shape)
      0.1189 (2, 3)

    References:
      Hsu et al. (2024), "Liger Kernel", arXiv:2410.10989; Wijmans et al.
      (2024), "Cut your losses in large-vocabulary language models",
      arXiv:2411.09009. For the loss and its options, those of
      `softmax_cross_entropy_with_integer_labels`.

    See also:
      `softmax_cross_entropy_with_integer_labels` and `softmax_cross_entropy`,
      for logits that you have.
    """
    checked = inputs(
        hidden, kernel, labels, bias=bias, ignore_index=ignore_index, label_smoothing=label_smoothing,
        class_weights=class_weights, weights=weights, z_loss=z_loss, softcap=softcap,
        temperature=temperature, reduction=reduction, axis_name=axis_name, forward_mode=forward_mode,
        return_aux=return_aux, chunk_size=chunk_size, dtype=dtype, precision=precision)
    mesh = jax.typeof(checked.hidden).sharding.mesh
    if not mesh.explicit_axes:
        return _rules.call(loss_of, checked)
    if len(mesh.explicit_axes) < len(mesh.axis_names):
        return _rules.call(_in_automatic_mode(checked), checked)
    return _rules.call(_on_explicit_axes, checked)
# fmt: on


# -- from the arguments to the loss -------------------------------------------------------------------


def inputs(
    hidden: ArrayLike, kernel: ArrayLike, labels: Any, *, bias: ArrayLike | None,
    ignore_index: int | None, axis_name: AxisName, dtype: Any, **options: Any,
) -> Inputs:  # fmt: skip
    """Check the arguments of `linear_softmax_cross_entropy`. The keywords are its argument names."""
    hidden = _arguments.array("hidden", hidden, "floating")
    kernel = _arguments.array("kernel", kernel, "floating")
    batch, num_classes = _arguments.head(hidden, kernel)
    dtype = _arguments.product_dtype(dtype, hidden, kernel)
    if bias is not None:
        bias = _arguments.array("bias", bias, "floating", (num_classes,))
    labels, ignore_index, has_ids = _labels(labels, batch, num_classes, ignore_index)
    if ignore_index is not None and not has_ids:
        raise ValueError("ignore_index must be None unless labels are class ids; use weights")
    checked = _arguments.options(
        dtype, batch, num_classes, ignore_index=ignore_index, axis_name=axis_name, **options
    )
    _arguments.split_over("kernel", kernel, checked.axis_name)
    if has_ids:
        checked = checked.where(_arguments.not_ignored(labels, checked.ignore_index))
    if isinstance(labels, Teacher):
        for name in ("label_smoothing", "class_weights"):
            if getattr(checked, name) is not None:
                raise ValueError(f"{name} must not be given if labels are a Teacher")
    count = num_classes * _axis.size(checked.axis_name)
    labels = _cross_entropy.checked(labels, count, checked.counts, has_ids)
    # Keep a kernel that is wider than the products: its gradient must have its dtype. The rule narrows
    # it.
    kernel = kernel if kernel.dtype.itemsize >= dtype.itemsize else kernel.astype(dtype)
    return Inputs(hidden.astype(dtype), kernel, labels, bias, checked)


def _labels(
    labels: Any, batch: tuple[int, ...], num_classes: int, ignore_index: int | None
) -> tuple[Any, int | None, bool]:
    """The checked labels and `ignore_index`, and whether labels are class ids."""
    if isinstance(labels, Sparse):
        return _arguments.sparse(labels, batch), ignore_index, False
    if isinstance(labels, Teacher):
        return _arguments.teacher(labels, batch, num_classes), ignore_index, False
    has_ids = _arguments.rank_of_labels(labels) == len(batch)
    advice = f"; distributions have shape {(*batch, num_classes)}"
    labels, ignore_index = _arguments.labels(labels, has_ids, ignore_index, advice)
    if labels.shape != (batch if has_ids else (*batch, num_classes)):
        raise ValueError(
            f"labels must have shape {batch} (class ids) or {(*batch, num_classes)} (distributions), "
            f"got {labels.shape}"
        )
    return labels, ignore_index, has_ids


@jax.jit
def loss_of(inputs: Inputs) -> Any:
    """The loss, or (loss, aux) with `return_aux`."""
    options = inputs.options
    # Treat an example of weight 0 as invalid if its hidden state is not finite: 0 times NaN is NaN.
    if options.weights is not None:
        harmless = (options.weights != 0) | jnp.all(jnp.isfinite(inputs.hidden), axis=-1)
        inputs = dataclasses.replace(inputs, options=options.where(harmless))
    inputs = _varied(inputs)
    if options.forward_mode:
        loss, aux = _partition.by_loop(_head.values_forward, inputs)
    else:
        # float16 gradients of unknown scale could leave its range: let the backward rule compute them.
        sums = options.reduction != "none" and inputs.hidden.dtype != jnp.float16
        # JAX's error about forward mode quotes this line: its comment tells the user what to do.
        loss, aux = _rule(sums, inputs)  # jvp: forward_mode=True
    if options.reduction != "none":
        like = _head.nothing(inputs, inputs.batch).loss
        ids: Any = inputs.labels if inputs.has_ids else None
        weights = mean_weights(inputs.options, ids, like)
        loss = reduce_losses(loss, weights, options.reduction, options.batch_axis)
    return (loss, aux) if options.return_aux else loss


def _on_explicit_axes(inputs: Inputs) -> Any:
    """The loss on a mesh with explicit axes. The shardings are known while tracing: use
    `jax.shard_map`."""
    sharding = jax.typeof(inputs.hidden).sharding
    layout = _partition.layout_of_arrays(inputs, sharding.mesh.shape)
    options = dataclasses.replace(
        inputs.options, axis_name=layout.classes or None, batch_axis=layout.all_examples or None
    )
    inputs = dataclasses.replace(inputs, options=options)
    in_specs, out_specs = _partition.specs_of(inputs, layout)

    def on_each_device(inputs: Inputs) -> Any:
        return loss_of(_partition.gathered(inputs, layout))

    on = functools.partial(NamedSharding, sharding.mesh)
    inputs = jax.tree.map(jax.sharding.reshard, inputs, jax.tree.map(on, in_specs))
    specs: dict[str, Any] = {"in_specs": (in_specs,), "out_specs": out_specs}
    out = jax.shard_map(on_each_device, mesh=sharding.mesh, **specs)(inputs)
    row = on(PartitionSpec(*sharding.spec[:-1]))
    return jax.tree.map(lambda x: jax.sharding.reshard(x, row) if x.ndim else x, out)


def _in_automatic_mode(inputs: Inputs) -> Callable[..., Any]:
    """`loss_of`, with the shardings inside left to the compiler. It is for meshes with both explicit and
    other axes, where JAX would require `out_sharding` for every gather and product."""
    like = jax.typeof(inputs.hidden).sharding
    of_examples = NamedSharding(like.mesh, PartitionSpec(*like.spec[:-1]))
    whole = NamedSharding(like.mesh, PartitionSpec())
    shardings: Any = of_examples if inputs.options.reduction == "none" else whole
    if inputs.options.return_aux:
        shardings = (shardings, _head.values_like(inputs, of_examples, of_examples).aux)
    return jax.sharding.auto_axes(loss_of, out_sharding=shardings)


def _varied(inputs: Inputs) -> Inputs:
    """Inside `jax.shard_map`, make all arrays vary over the mesh axes that any of them varies over. If a
    kernel is replicated, the rules then return a gradient for each device, and JAX sums these once,
    outside the rules. Over the axes that split the classes, only the arrays that are combined with the
    kernel are made to vary. The losses do not vary over them."""
    (inputs,) = _axis.vary_alike(inputs, but=inputs.options.axis_name)
    arrays = inputs.arrays()
    names = (
        "hidden", "label_smoothing", "softcap", "temperature",
        "labels.hidden", "labels.softcap", "labels.temperature",
    )  # fmt: skip
    _, met = _axis.vary_alike(inputs.kernel, {k: x for k, x in arrays.items() if k in names})
    return inputs.having(arrays | met)


# -- the rule -----------------------------------------------------------------------------------------


class _Residuals(NamedTuple):
    """The forward rule sees while tracing which arguments are differentiated, and the backward rule must
    know it, too. But the residuals must always have the same tree structure, because JAX may reuse that
    of another trace (if a jitted function is differentiated with respect to one argument, then to two).
    So `wanted` has an array for every argument: an empty one if the argument is not differentiated."""

    inputs: Inputs
    wanted: dict[str, Array]  # with "sum" and "mean" the gradients, with "none" placeholders


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(sums: bool, inputs: Inputs) -> Values:
    """If `sums`, the sum of the losses: the forward rule computes the gradients, too. If not, the loss
    of each example: the backward rule computes the logits again."""
    return _summed(sums, _partition.values(inputs))


def _summed(sums: bool, values: Values) -> Values:
    return Values(jnp.sum(values.loss), values.aux) if sums else values


def _fwd(sums, inputs):
    wrapped: dict[str, Any] = inputs.arrays()
    inputs = inputs.having({k: x.value for k, x in wrapped.items()})
    # Under `jax_custom_vjp3`, `jax.checkpoint` marks integers as differentiated, too.
    floats = {k for k, x in inputs.arrays().items() if jnp.issubdtype(x.dtype, jnp.floating)}
    wanted = frozenset(k for k in floats if wrapped[k].perturbed)
    if sums:
        zeros = _head.nothing(inputs, inputs.batch).loss
        g = Cotangents(jnp.ones_like(zeros), zeros)
        values, gradients = _partition.gradients(wanted, inputs, g)
    else:
        inputs = dataclasses.replace(inputs, kernel=_partition.kernel(inputs))
        values = _partition.values(inputs)
        gradients = dict.fromkeys(wanted, jnp.zeros(1))
    padded = {k: gradients.get(k, jnp.zeros(0)) for k in wrapped}
    return _summed(sums, values), _Residuals(inputs, padded)


def _bwd(sums, residuals, cotangents):
    inputs, arrays = residuals.inputs, residuals.inputs.arrays()
    gradients = {k: x for k, x in residuals.wanted.items() if x.shape != (0,)}
    aux = cotangents.aux
    is_used = {k: not _is_zero(x) for k, x in aux._asdict().items()}
    is_scaled = sums and not (is_used["log_normalizer"] or is_used["entropy"])
    zeros = _head.nothing(inputs, () if is_scaled else inputs.batch).loss
    g = Cotangents(*(zeros if _is_zero(x) else zeros + x for x in (cotangents.loss, aux[0])))
    if is_used["entropy"]:
        g = g._replace(entropy=zeros + aux.entropy)
    g = _axis.total_cotangent(inputs.options.axis_name, g)
    if is_scaled:
        gradients = {k: g.loss * x.astype(g.loss.dtype) for k, x in gradients.items()}
    else:  # if the forward rule computed gradients, they do not include the cotangents of the aux
        _, gradients = _partition.gradients(frozenset(gradients), inputs, g)
    return (inputs.having({k: x.astype(arrays[k].dtype) for k, x in gradients.items()}),)


def _is_zero(cotangent: Any) -> bool:
    return cotangent is None or isinstance(cotangent, SymbolicZero)


_rule.defvjp(_fwd, _bwd, symbolic_zeros=True)
