"""The loss of a linear head, from hidden states and kernel. The N x V logits never exist.

"mean" and "sum" know the cotangent of every example up to one common factor. When they are
differentiated, the forward rule computes the gradients along with the value (6NDV operations, as with
stored logits) and the backward rule scales them. "none" must wait for its cotangents, so its backward
rule computes the logits again.

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
    logits are accumulated in float32, one chunk of examples at a time.

    With "mean" and "sum" the forward pass also computes the gradients, and the
    two passes take as long as with stored logits. With "none" the backward pass
    computes the logits again. Examples that do not count, by `ignore_index` or
    weight 0, cost next to nothing; but weight 0 saves nothing if the weights
    are differentiated, or in forward mode.

    In a program that `jax.jit` splits over devices, each device computes its
    own examples and classes, as `hidden` and `kernel` are laid out.

    Pass all examples in one call, [N..., D]. `jax.vmap` over examples would
    make a gradient of the kernel, [D, V], for each of them.

    Args:
      hidden: [N..., D], in float16, bfloat16, float32 or float64, like all
        float arguments.
      kernel: [D, V]. For a tied embedding [V, D] pass `embedding.T` (XLA on CPU
        copies it once). If `hidden` and `kernel` differ in dtype, the products
        are computed in the wider one; under
        `jax.numpy_dtype_promotion("strict")` you must choose by `dtype`.
      labels: [N...], integers in [0, V); [N..., V], distributions; a `Sparse`,
        with a few classes of each example; or a `Teacher`, the softmax of
        another head. (Without x64, `jax.jit` truncates NumPy's 64-bit integers
        that are passed to your own jitted function, before this function sees
        them.)
      bias: [V].
      ignore_index: Examples with this label do not count: loss 0, gradient 0.
        Only for class ids.
      label_smoothing: e, a number in [0, 1].
      class_weights: [V], the weight of each class.
      weights: [N...], the weight of each example; one of weight 0 does not
        count. It may be a number, or have axes of size 1.
      z_loss: A number; adds `z_loss * L**2` to each example, where L is its
        log-normalizer. Class weights do not apply to it.
      softcap: A positive number c; the logits become `c * tanh(logits / c)`.
      temperature: A positive number, or one for each example, [N...] (or axes
        of size 1). The logits are divided by it, after the soft-cap. It gets a
        gradient.
      reduction: "none" returns [N...]. "sum" adds the losses up. "mean" divides
        that by the sum of `weights * class_weights[label]` (of `weights`, if
        labels are not class ids) over the examples that count, and is 0 if
        there are none.
      axis_name: Inside `jax.shard_map`, the mesh axis over which the classes
        are split, or a tuple of axes. V is then the number of classes on this
        device. Labels stay global. The loss is that of the whole rows, equal on
        all devices of the axis. "mean" and "sum" reduce over the examples of
        this device. With `check_vma=False`, differentiate outside of
        `shard_map`: inside, JAX multiplies gradients by the axis size.
      chunk_size: How many examples a chunk has; its float32 logits are held in
        memory. None chooses from shapes and platform: on CPU up to 128 MiB of
        logits, elsewhere 2048 examples or more in at most 2 GiB. On CPU, chunks
        of 128 took as long as the 256 that None chose, with 0.6 to 0.8 of the
        temporary memory; chunks of 64 took up to 1.3 times as long, 32 1.7
        times and 16 2.5 times, with 0.2 to 0.6 of it. The gradient of a 16-bit
        kernel is summed in a float32 array of its size, whatever the chunk.
      dtype: The dtype of the matrix products, as in Flax's layers; None means
        the wider of `hidden` and `kernel`. bfloat16 with a float32 kernel is
        mixed precision: `hidden` and `kernel` are rounded once for the
        products, and the kernel's gradient is summed and returned in float32.
      precision: The precision of the matrix products, as in `jax.numpy.dot`:
        None, "highest" and so on.
      return_aux: Also return a `CrossEntropyAux`: log-normalizer, prediction,
        entropy and, for class ids, the label's rank, of each example.
        Log-normalizer and entropy are differentiated exactly; with "mean" and
        "sum" their derivative computes the logits once more, if it is used.
      forward_mode: Differentiate with JAX's own rules for the loop over the
        chunks, for `jax.jvp`, `jax.jacfwd`, `jax.linearize` and reverse over
        forward mode.

    Returns:
      The loss, [N...] or a scalar, in float32 (float64 for float64 inputs).
      With `return_aux`, the pair of loss and aux. Bad labels and logits give
      NaN as in the losses on logits, and `checkify` reports bad labels as
      there. Gradients have the dtypes of their arguments, and are accumulated
      in float32. (In float16, "mean" and "sum" also compute the logits once
      more: gradients whose scale is not known yet would leave its range.)

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
    if len(mesh.explicit_axes) < len(mesh.axis_names) or checked.hidden.size == 0:
        return _rules.call(_in_automatic_mode(checked), checked)
    return _rules.call(_on_explicit_axes, checked)
# fmt: on


# -- from the arguments to the loss -------------------------------------------------------------------


def inputs(
    hidden: ArrayLike, kernel: ArrayLike, labels: Any, *, bias: ArrayLike | None,
    ignore_index: int | None, axis_name: AxisName, dtype: Any, **options: Any,
) -> Inputs:  # fmt: skip
    """Check the arguments of `linear_softmax_cross_entropy`, given by their public names."""
    hidden = _arguments.array("hidden", hidden, "floating")
    kernel = _arguments.array("kernel", kernel, "floating")
    batch, num_classes = _arguments.head(hidden, kernel)
    dtype = _arguments.product_dtype(dtype, hidden, kernel)
    if bias is not None:
        bias = _arguments.array("bias", bias, "floating", (num_classes,))
    labels, ignore_index, has_ids = _labels(labels, batch, num_classes, ignore_index)
    if ignore_index is not None and not has_ids:
        raise ValueError("ignore_index must be None for labels that are not class ids: use weights")
    checked = _arguments.options(
        dtype, batch, num_classes, ignore_index=ignore_index, axis_name=axis_name, **options
    )
    _arguments.split_over("kernel", kernel, checked.axis_name)
    if has_ids:
        checked = checked.where(_arguments.not_ignored(labels, checked.ignore_index))
    if isinstance(labels, Teacher):
        for name in ("label_smoothing", "class_weights"):
            if getattr(checked, name) is not None:
                raise ValueError(f"{name} must be left out if labels are a Teacher")
    count = num_classes * _axis.size(checked.axis_name)
    labels = _cross_entropy.checked(labels, count, checked.counts, has_ids)
    # The rule narrows a wider kernel, so that its gradient stays wide.
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
    labels, ignore_index = _arguments.labels(labels, has_ids, ignore_index)
    if labels.shape != (batch if has_ids else (*batch, num_classes)):
        raise ValueError(
            f"labels must have shape {batch}, class ids, or {(*batch, num_classes)}, distributions, "
            f"got {labels.shape}"
        )
    return labels, ignore_index, has_ids


@jax.jit
def loss_of(inputs: Inputs) -> Any:
    """The loss, and the aux if it is asked for."""
    options = inputs.options
    # An example of weight 0 is invalid if its hidden state is not finite.
    if options.weights is not None:
        harmless = (options.weights != 0) | jnp.all(jnp.isfinite(inputs.hidden), axis=-1)
        inputs = dataclasses.replace(inputs, options=options.where(harmless))
    inputs = _varied(inputs)
    if options.forward_mode:
        loss, aux = _partition.by_loop(_head.values_forward, inputs)
    else:
        # float16 gradients stay in range only if their scale is known: leave them to the backward rule.
        sums = options.reduction != "none" and inputs.hidden.dtype != jnp.float16
        # JAX's error about forward mode shows this line, comment included.
        loss, aux = _rule(sums, inputs)  # jvp: forward_mode=True
    if options.reduction != "none":
        like = _head.nothing(inputs, inputs.batch).loss
        ids: Any = inputs.labels if inputs.has_ids else None
        weights = mean_weights(inputs.options, ids, like)
        loss = reduce_losses(loss, weights, options.reduction, options.batch_axis)
    return (loss, aux) if options.return_aux else loss


def _on_explicit_axes(inputs: Inputs) -> Any:
    """On a mesh with explicit axes JAX knows the layout: each device computes its own part."""
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
    """`loss_of`, with the shardings inside left to the compiler. This is for meshes where only some axes
    are explicit, and for empty `hidden`: JAX would ask for the sharding of every gather and product."""
    like = jax.typeof(inputs.hidden).sharding
    of_examples = NamedSharding(like.mesh, PartitionSpec(*like.spec[:-1]))
    whole = NamedSharding(like.mesh, PartitionSpec())
    shardings: Any = of_examples if inputs.options.reduction == "none" else whole
    if inputs.options.return_aux:
        shardings = (shardings, _head.values_like(inputs, of_examples, of_examples).aux)
    return jax.sharding.auto_axes(loss_of, out_sharding=shardings)


def _varied(inputs: Inputs) -> Inputs:
    """Inside `jax.shard_map`, make all arrays vary over the mesh axes that any of them varies over. A
    kernel that is whole on every device then gets a gradient on each, and JAX sums these once, outside
    the rules. Over the axes that split the classes, only arrays that meet the classes vary; the losses
    do not."""
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
    """The backward rule must know which arguments are differentiated, which the forward rule sees while
    tracing. But the residuals must always be the same tree: JAX may reuse the tree of another trace (of
    a jitted function that is differentiated by one argument, then by two). So every argument has an
    array here, empty if it is not differentiated."""

    inputs: Inputs
    wanted: dict[str, Array]  # the gradients of the sum; any other numbers if "none" is asked for


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(sums: bool, inputs: Inputs) -> Values:
    """The losses one by one, whose backward rule computes the logits again; or, if `sums`, their sum,
    whose forward rule computes the gradients."""
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
    else:  # gradients that the forward rule may have computed lack the cotangents of the aux
        _, gradients = _partition.gradients(frozenset(gradients), inputs, g)
    return (inputs.having({k: x.astype(arrays[k].dtype) for k, x in gradients.items()}),)


def _is_zero(cotangent: Any) -> bool:
    return cotangent is None or isinstance(cotangent, SymbolicZero)


_rule.defvjp(_fwd, _bwd, symbolic_zeros=True)
