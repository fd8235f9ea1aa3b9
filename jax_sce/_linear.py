"""Storey 3: the loss of a linear head, chunk by chunk of the examples. The N x V logits never exist.

A chunk's logits are made, storey 2 takes their losses and their cotangent, two matrix products carry
that to the hidden states and the kernel, and the next chunk overwrites it. Nothing of the loss is
written here, only the order of the work.

"mean" and "sum" know the cotangent of every loss but for one factor, so when they are differentiated
the forward rule computes the gradients along with the value (6NDV operations, as with whole logits) and
the backward rule scales them. "none" has to wait for its cotangents, and computes the logits again.

References: taking gradients in the forward pass is Liger-Kernel's idea (Hsu et al., 2024,
arXiv:2410.10989); Wijmans et al. (2024), arXiv:2411.09009, recompute, as "none" does here.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from . import _axis, _checks, _chunks, _cross_entropy, _rows
from ._axis import AxisName
from ._chunks import Plan, Plans
from ._cross_entropy import Losses, Options
from ._reduction import REDUCTIONS, both, reduce_losses

# On CPU, the kernel's gradient is made in so many tiles of classes, if there are as many classes.
_TILES = 8
_TILED = 2048


class CrossEntropyAux(NamedTuple):
    """What else the head knows of each example; 0 and -1 for those that do not count."""

    log_normalizer: Array  # [N...], float32 (float64 for float64 inputs)
    prediction: (
        Array  # [N...], int32, of the largest logit before a soft-cap, the lowest of several
    )


@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    reduction: str = "none",
    axis_name: AxisName = None,
    chunk_size: int | None = None,
    return_aux: Literal[False] = False,
    forward_mode: bool = False,
) -> Array: ...


@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    reduction: str = "none",
    axis_name: AxisName = None,
    chunk_size: int | None = None,
    return_aux: Literal[True],
    forward_mode: bool = False,
) -> tuple[Array, CrossEntropyAux]: ...


def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    reduction: str = "none",
    axis_name: AxisName = None,
    chunk_size: int | None = None,
    return_aux: bool = False,
    forward_mode: bool = False,
) -> Array | tuple[Array, CrossEntropyAux]:
    r"""Softmax cross-entropy of the logits `hidden @ kernel + bias`, which are never held.

    The same as `softmax_cross_entropy_with_integer_labels(hidden @ kernel + bias, labels)`, or
    `softmax_cross_entropy` for distributions, with the logits accumulated in float32, in the memory of
    one chunk of examples. With "mean" and "sum" the gradients are computed in the forward pass, as fast
    as with whole logits; with "none" the backward pass computes the logits once more. Examples that do
    not count, by `ignore_index` or a weight of 0, cost next to nothing; those of weight 0 only if the
    weights are not differentiated, and not in forward mode.

    Give it all examples at once, [N..., D]: under `jax.vmap` over examples it would make a gradient of
    the kernel, [D, V], for each.

    Args:
      hidden: [N..., D], any floating dtype.
      kernel: [D, V]. A tied embedding [V, D] is passed as `embedding.T` (XLA on CPU copies that once).
        Of two dtypes, the wider is that of the products: a kernel in float32 makes them float32.
      labels: [N...] integers in [0, V), or distributions [N..., V].
      bias: [V].
      ignore_index: Examples with this label count nowhere: loss 0, gradient 0. For integer labels only.
      label_smoothing: e, a scalar in [0, 1].
      class_weights: [V], the weight of each class.
      weights: [N...], the weight of each example; 0 leaves it out.
      z_loss: A scalar; adds `z_loss * L**2` to each example, L its log-normalizer, not class-weighted.
      softcap: A positive scalar c; the logits become `c * tanh(logits / c)` first.
      reduction: "none" for [N...], "sum", or "mean": the sum over the sum of
        `weights * class_weights[label]` of the examples that count (of `weights` for distributions),
        and 0 if there are none.
      axis_name: The mesh axis, or axes, over which the classes are split inside `jax.shard_map`: then V
        is the number of classes on this device, in the kernel and in all that has classes, and the loss
        is that of whole rows, the same on all devices of the axis. A "mean" or "sum" is over the
        examples of this device. Under `check_vma=False` differentiate outside the `jax.shard_map`:
        inside, JAX adds up the losses of these devices, and gradients are as many times too large.
      chunk_size: Examples in a chunk, whose float32 logits are held; None chooses from the shapes, so
        that those take 128 MiB at most on CPU and 1 GiB elsewhere.
      return_aux: Also return a `CrossEntropyAux`, [N...] each; of examples that do not count 0, and a
        prediction of -1. The log-normalizer is differentiated exactly; with "mean" and "sum" that takes
        a second pass, if it is used.
      forward_mode: Differentiate by JAX's own rules for the loop over the chunks, for `jax.jvp`,
        `jax.jacfwd`, `jax.linearize` and reverse over forward mode.

    Returns:
      The loss: [N...] or a scalar, float32 (float64 for float64 inputs), and with `return_aux` the pair
      of it and the aux. Bad labels and logits give NaN as in the losses on logits, and `checkify` names
      bad labels as there. The gradients come in the dtypes of their arguments, and are accumulated in
      float32. (float16 has too short a range for gradients whose scale is not known: there "mean" and
      "sum" compute the logits once more, too.)

    Raises:
      TypeError, ValueError: An argument has the wrong type, shape or range; the message names it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_sce import linear_softmax_cross_entropy
      >>> hidden = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
      >>> kernel = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, -1.0]])
      >>> labels = jnp.array([0, 1, -100])
      >>> with jnp.printoptions(precision=4):
      ...     print(linear_softmax_cross_entropy(hidden, kernel, labels, ignore_index=-100))
      [0.0949 0.1429 0.    ]
      >>> loss, gradient = jax.value_and_grad(linear_softmax_cross_entropy, argnums=1)(
      ...     hidden, kernel, labels, ignore_index=-100, reduction="mean")
      >>> print(f"{loss:.4f}", gradient.shape)
      0.1189 (2, 3)

    References:
      Hsu et al. (2024), "Liger Kernel", arXiv:2410.10989; Wijmans et al. (2024), "Cut your losses in
      large-vocabulary language models", arXiv:2411.09009; and those of
      `softmax_cross_entropy_with_integer_labels` for the loss and its options.

    See also:
      `softmax_cross_entropy_with_integer_labels` and `softmax_cross_entropy`, of logits that exist.
    """
    setting, arrays = read(
        hidden,
        kernel,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        reduction=reduction,
        axis_name=axis_name,
        chunk_size=chunk_size,
        return_aux=return_aux,
        forward_mode=forward_mode,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        weights=weights,
        z_loss=z_loss,
        softcap=softcap,
    )
    hidden = arrays[1].hidden
    if jax.typeof(hidden).sharding.mesh.explicit_axes:
        return _in_automatic_mode(setting, hidden)(arrays)
    return run(setting, arrays)


# -- from the arguments to the loss -------------------------------------------------------------------


class Setting(NamedTuple):
    """What is known when tracing."""

    chunk_size: int | None
    return_aux: bool
    reduction: str
    forward_mode: bool
    classes: AxisName  # the mesh axis over which the classes are split
    batch: AxisName = None  # that of the examples, if a reduction is over all of them


def read(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None,
    ignore_index: int | None,
    reduction: str,
    axis_name: AxisName,
    chunk_size: int | None,
    return_aux: bool,
    forward_mode: bool,
    **options: Any,
) -> tuple[Setting, tuple["Head", "Examples"]]:
    """The arguments of `linear_softmax_cross_entropy`, by those names, checked."""
    hidden, kernel = _checks.floating("hidden", hidden), _checks.floating("kernel", kernel)
    batch = _checks.head(hidden, kernel)
    num_classes = kernel.shape[1]
    dtype = jnp.promote_types(hidden.dtype, kernel.dtype)
    if bias is not None:
        bias = _checks.floating("bias", bias)
        _checks.shape("bias", bias, (num_classes,))
    labels = _checks.real("labels", labels)
    has_ids = labels.ndim == len(batch)
    if has_ids:
        labels = _checks.integers("labels", labels)
    if labels.shape not in (batch, (*batch, num_classes)):
        raise ValueError(
            f"labels must have shape {batch}, class ids, or {(*batch, num_classes)}, distributions, "
            f"got {labels.shape}"
        )
    ignored = _checks.integer_or_none("ignore_index", ignore_index)
    if ignored is not None and not has_ids:
        raise ValueError("ignore_index must be None for labels that are distributions")
    _checks.one_of("reduction", reduction, REDUCTIONS)
    setting = Setting(
        _checks.positive_or_none("chunk_size", chunk_size),
        _checks.flag("return_aux", return_aux),
        reduction,
        _checks.flag("forward_mode", forward_mode),
        _checks.axis_name(axis_name),
    )
    checked = _cross_entropy.check_options(dtype, batch, num_classes, **options)
    if has_ids:
        checked = checked.ignoring(labels, ignored)
        count = num_classes * _axis.size(setting.classes)
        labels = _cross_entropy.class_index(labels, count, checked)
    head = Head(
        kernel.astype(dtype),
        bias,
        checked.smoothing,
        checked.class_weights,
        checked.z_loss,
        checked.softcap,
    )
    examples = Examples(hidden.astype(dtype), labels, checked.weights, checked.kept)
    return setting, (head, examples)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def run(setting: Setting, arrays: tuple["Head", "Examples"]) -> Any:
    """The loss, and the aux if it is asked for, [N...]."""
    head, examples = arrays
    batch, reduction = examples.hidden.shape[:-1], setting.reduction
    plans = _chunks.plans(math.prod(batch), head.kernel.shape[1], setting.chunk_size,
                          setting.return_aux, setting.classes)  # fmt: skip
    lanes = plans.default.shape
    examples = jax.tree.map(lambda x: x.reshape(*lanes, *x.shape[len(batch) :]), examples)
    head, examples = _prepare(head, _leave_out_rubbish(examples), setting.classes)
    if setting.forward_mode:
        loss, aux = plans.run(_values_forward, head, examples)
    elif reduction == "none" or head.kernel.dtype == jnp.float16:
        # In float16 the gradients have to be computed when their scale is known: it keeps them in range.
        loss, aux = _each(plans, head, examples)
    else:
        loss, aux = _total(plans, head, examples)
    if reduction == "none":
        loss = loss.reshape(batch)
    else:
        weights = _mean_weights(head, examples, setting.classes)
        loss = reduce_losses(loss, weights, reduction, setting.batch)
    if not setting.return_aux:
        return loss
    return loss, CrossEntropyAux(*(x.reshape(batch) for x in aux))


# -- the data -----------------------------------------------------------------------------------------
# The examples are [L, n, ...], in lanes, and in a chunk [C, ...]: `_chunks.py` says why.


class Head(NamedTuple):
    """What all examples share; None where an option is not used."""

    kernel: Array  # [D, V]
    bias: Array | None  # [V]
    smoothing: Array | None  # scalar
    class_weights: Array | None  # [V]
    z_loss: Array | None  # scalar
    softcap: Array | None  # scalar


class Examples(NamedTuple):
    """What each example has of its own: [L, n, ...], and in a chunk [C, ...]."""

    hidden: Array  # [..., D]
    labels: Array  # integers [...], -1 for a bad one; or distributions [..., V]
    weights: Array | None  # [...]
    kept: Array | None  # bool, [...]

    @property
    def has_ids(self) -> bool:
        return self.labels.ndim < self.hidden.ndim


class _Values(NamedTuple):
    """What is computed of each example: [L, n], and in a chunk [C]."""

    loss: Array
    aux: CrossEntropyAux


def _in_automatic_mode(setting: Setting, hidden: Array) -> Callable[..., Any]:
    """On a mesh with explicit axes: `run`, with the shardings between its arguments and its results left
    to the compiler. JAX asks for those of each gather and product otherwise."""
    like = jax.typeof(hidden).sharding
    of_examples = NamedSharding(like.mesh, PartitionSpec(*like.spec[:-1]))
    whole = NamedSharding(like.mesh, PartitionSpec())
    shardings: Any = of_examples if setting.reduction == "none" else whole
    if setting.return_aux:
        shardings = (shardings, CrossEntropyAux(of_examples, of_examples))  # type: ignore[arg-type]
    return jax.sharding.auto_axes(functools.partial(run, setting), out_sharding=shardings)


def _leave_out_rubbish(examples: Examples) -> Examples:
    """Those of weight 0 whose hidden states are not finite are not kept."""
    if examples.weights is None:
        return examples
    harmless = (examples.weights != 0) | jnp.all(jnp.isfinite(examples.hidden), axis=-1)
    return examples._replace(kept=both(examples.kept, harmless))


def _prepare(head: Head, examples: Examples, axis_name: AxisName) -> tuple[Head, Examples]:
    """Inside `jax.shard_map`, what varies over a mesh axis makes all else vary: a kernel that each
    device holds whole gets a gradient on each, and JAX sums them once, outside the rules. Over the
    devices among which the classes are split, what meets the classes varies, and no loss does."""
    head, examples = _axis.vary_alike(head, examples, but=axis_name)
    names = ("hidden", "smoothing", "softcap")
    met = {k: x for k, x in _fields(head, examples).items() if k in names}
    _, met = _axis.vary_alike(head.kernel, met)
    return _replace(head, examples, met)


def _zeros(x: Array, dtype: jnp.dtype) -> Array:
    """For the cotangent of `x`, which varies over the same mesh axes."""
    return _axis.vary(jnp.zeros(x.shape, dtype), _axis.varying(x))


def _chunk(plan: Plan, examples: Examples, ids: Array) -> Examples:
    """Those examples; n, which is none, is not kept. What is not kept has a hidden state of 0, before an
    infinity or NaN in it reaches the kernel's gradient."""
    chunk = jax.tree.map(lambda x: _chunks.take(x, ids), examples)
    if chunk.kept is None and plan.per_lane % plan.chunk == 0:
        return chunk
    exists = (ids < plan.per_lane).reshape(-1)
    kept = exists if chunk.kept is None else chunk.kept & exists
    return chunk._replace(kept=kept, hidden=jnp.where(kept[:, None], chunk.hidden, 0))


# -- values -------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _values(plan: Plan, head: Head, examples: Examples) -> _Values:
    return _scan(plan._replace(chunk=plan.chunk_of_values), head, examples, forward_mode=False)


@_values.defjvp
def _values_jvp(plan, primals, tangents):  # forward over reverse mode of the rule for "none"
    return jax.jvp(functools.partial(_values_forward, plan), primals, tangents)


def _values_forward(plan: Plan, head: Head, examples: Examples) -> _Values:
    """By a loop that JAX can differentiate in both modes. What it keeps for that is its arguments. The
    head is made wide before it: in its dtype, reverse mode sums the head's gradient over the chunks."""
    dtype = _rows.compute_dtype(head.kernel.dtype)
    head = jax.tree.map(lambda x: x.astype(dtype), head)
    return _scan(plan, head, examples, forward_mode=True)


def _scan(plan: Plan, head: Head, examples: Examples, *, forward_mode: bool) -> _Values:
    if plan.chunks == 0:
        return _nothing(plan, head, plan.shape)
    # The work for a weight of 0 can be left out if nobody asks for the derivative by that weight. In
    # forward mode nobody tells what is differentiated.
    options = _options(head, examples)
    live = options.kept if forward_mode else options.counts
    order, most = _chunks.order(plan, live)
    ids = order[:, : plan.chunks * plan.chunk]
    starts = jnp.arange(plan.chunks, dtype=jnp.int32) * plan.chunk

    @jax.checkpoint
    def values(head, examples, ids):
        chunk = _chunk(plan, examples, ids)
        logits = _logits(head, chunk.hidden)
        losses = _losses(plan, head, chunk, logits, forward_mode)
        return _Values(losses.loss, _aux(plan, head, chunk, logits, losses.log_normalizer))

    def step(_, start):
        here = lax.dynamic_slice_in_dim(ids, start, plan.chunk, axis=1)
        if live is None:
            return None, values(head, examples, here)
        nothing = _nothing(plan, head, (here.size,))
        return None, lax.cond(start < most, lambda: values(head, examples, here), lambda: nothing)

    _, chunks = lax.scan(step, None, starts)

    def in_place(x, rows):
        rows = rows.reshape(plan.chunks, plan.lanes, plan.chunk).swapaxes(0, 1)
        return _chunks.put(x, ids, rows.reshape(ids.shape))

    return jax.tree.map(in_place, _nothing(plan, head, plan.shape), chunks)


def _nothing(plan: Plan, head: Head, shape: tuple[int, ...]) -> _Values:
    """The values of examples that do not count."""
    axes = _axis.varying(head.kernel) - _axis.names(plan.axis_name)
    zeros = _axis.vary(jnp.zeros(shape, _rows.compute_dtype(head.kernel.dtype)), axes)
    none = _axis.vary(jnp.full(shape, -1, jnp.int32), axes)
    return _Values(zeros, CrossEntropyAux(zeros, none))


def _logits(head: Head, hidden: Array) -> Array:
    logits = _dot(hidden, head.kernel.astype(hidden.dtype))
    return logits if head.bias is None else logits + head.bias.astype(logits.dtype)[None]


def _dot(a: Array, b: Array) -> Array:
    """The matrix product; of 16-bit operands in float32."""
    return jnp.matmul(a, b, preferred_element_type=_rows.compute_dtype(a.dtype))


def _options(head: Head, examples: Examples) -> Options:
    return Options(
        examples.kept,
        examples.weights,
        head.smoothing,
        head.class_weights,
        head.z_loss,
        head.softcap,
    )


def _losses(plan: Plan, head: Head, chunk: Examples, logits: Array, forward_mode: bool) -> Losses:
    options = _options(head, chunk)
    view = _cross_entropy.logits_view(logits, (1,), plan.axis_name, options)
    if chunk.has_ids:
        return _cross_entropy.label_losses(view, chunk.labels, options, forward_mode)
    return _cross_entropy.target_losses(view, chunk.labels, (1,), options, forward_mode)


def _mean_weights(head: Head, examples: Examples, axis_name: AxisName) -> Array:
    """What a mean divides by, of each example."""
    options, dtype = _options(head, examples), _rows.compute_dtype(head.kernel.dtype)
    if examples.has_ids:
        return _cross_entropy.label_weights(examples.labels, options, axis_name, dtype)
    return _cross_entropy.example_weights(options, examples.hidden.shape[:-1], dtype)


def _aux(
    plan: Plan, head: Head, chunk: Examples, logits: Array, log_normalizer: Array
) -> CrossEntropyAux:
    if not plan.with_prediction:
        nothing = _nothing(plan, head, log_normalizer.shape)
        return CrossEntropyAux(log_normalizer, nothing.aux.prediction)
    place = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    place += _axis.offset(plan.axis_name, logits.shape[-1])
    prediction = _axis.first_place(plan.axis_name, jnp.max(logits, axis=-1), place)
    counts = _options(head, chunk).counts
    prediction = prediction if counts is None else jnp.where(counts, prediction, -1)
    return CrossEntropyAux(log_normalizer, prediction)


# -- gradients ----------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradients(
    plan: Plan,
    wanted: frozenset[str],
    head: Head,
    examples: Examples,
    g_loss: Array,
    g_log_normalizer: Array,
) -> tuple[_Values, dict[str, Array]]:
    """The values, and the cotangents of those fields of `head` and `examples` that are wanted: in the
    compute dtype for the head, which sums them up, and in their own for the examples."""
    options = _options(head, examples)
    live = options.kept if "weights" in wanted else options.counts
    order, most = _chunks.order(plan, live)
    of_head = {
        k: _zeros(x, _rows.compute_dtype(head.kernel.dtype))
        for k, x in head._asdict().items()
        if k in wanted
    }
    of_examples = {
        k: _rows.to_bits(_zeros(x, x.dtype)) for k, x in examples._asdict().items() if k in wanted
    }

    def add(start, size, carry):
        values, of_head, of_examples = carry
        ids = lax.dynamic_slice_in_dim(order, start, size, axis=1)
        chunk = _chunk(plan, examples, ids)
        g = _chunks.take(g_loss, ids), _chunks.take(g_log_normalizer, ids)
        new, of_head, of_chunk = _add_chunk(plan, wanted, head, chunk, *g, of_head)
        return (
            jax.tree.map(lambda x, rows: _chunks.put(x, ids, rows), values, new),
            of_head,
            {k: _chunks.put(x, ids, _rows.to_bits(of_chunk[k])) for k, x in of_examples.items()},
        )

    def add_chunks(count, start, size, carry):
        return lax.fori_loop(0, count, lambda i, carry: add(start + i * size, size, carry), carry)

    carry = _nothing(plan, head, plan.shape), of_head, of_examples
    if plan.chunks == 0:
        pass
    elif live is None:
        carry = add_chunks(plan.chunks, 0, plan.chunk, carry)
    else:  # whole chunks, and the rest in quarters
        whole, quarter = most // plan.chunk, math.ceil(plan.chunk / 4)
        done = whole * plan.chunk
        carry = add_chunks(whole, 0, plan.chunk, carry)
        carry = add_chunks((most - done + quarter - 1) // quarter, done, quarter, carry)
    values, of_head, of_examples = carry
    of_examples = {
        k: _rows.from_bits(x, getattr(examples, k).dtype) for k, x in of_examples.items()
    }
    return values, of_head | of_examples


@_gradients.defjvp
def _gradients_jvp(plan, wanted, primals, tangents):
    # A loop whose length is known at run time only cannot be differentiated in reverse mode.
    def gradients(head, examples, g_loss, g_log_normalizer):
        def values(moving):
            values = _values_forward(plan, *_replace(head, examples, moving))
            return (values.loss, values.aux.log_normalizer), values

        moving = {k: x for k, x in _fields(head, examples).items() if k in wanted}
        _, pull, out = jax.vjp(values, moving, has_aux=True)
        gradients = pull(_axis.share_of_cotangent(plan.axis_name, (g_loss, g_log_normalizer)))[0]
        wide = _rows.compute_dtype(head.kernel.dtype)
        return out, {k: g.astype(wide) if k in head._fields else g for k, g in gradients.items()}

    return jax.jvp(gradients, primals, tangents)


def _fields(head: Head, examples: Examples) -> dict[str, Any]:
    """All that there are, by name."""
    fields = head._asdict() | examples._asdict()
    return {k: x for k, x in fields.items() if x is not None}


def _replace(head: Head, examples: Examples, fields: dict[str, Array]) -> tuple[Head, Examples]:
    return (
        head._replace(**{k: x for k, x in fields.items() if k in head._fields}),
        examples._replace(**{k: x for k, x in fields.items() if k in examples._fields}),
    )


def _add_chunk(
    plan: Plan,
    wanted: frozenset[str],
    head: Head,
    chunk: Examples,
    g_loss: Array,
    g_log_normalizer: Array,
    of_head: dict[str, Array],
) -> tuple[_Values, dict[str, Array], dict[str, Array]]:
    """The values of a chunk, `of_head` with its part added, and the cotangents of its examples. Storey 2
    gives that of the logits, and matrix products carry it on."""
    logits = _logits(head, chunk.hidden)
    inner_names = wanted - {"hidden", "kernel", "bias"}
    inner = {k: x for k, x in _fields(head, chunk).items() if k in inner_names}

    def losses(logits, inner):
        return _losses(plan, *_replace(head, chunk, inner), logits, False)

    out, pull = jax.vjp(losses, logits, inner)
    shares = _axis.share_of_cotangent(plan.axis_name, Losses(g_loss, g_log_normalizer))
    g, gradients = pull(shares)
    if "bias" in wanted:
        gradients["bias"] = jnp.sum(g, axis=0)
    of_hidden, of_kernel = _back(
        chunk.hidden, head.kernel, g, of_head.get("kernel"), "hidden" in wanted
    )
    if of_hidden is not None:
        counts = _options(head, chunk).counts
        gradients["hidden"] = (
            of_hidden if counts is None else jnp.where(counts[:, None], of_hidden, 0)
        )
    added = {k: x + gradients[k] for k, x in of_head.items() if k != "kernel"}
    if of_kernel is not None:
        added["kernel"] = of_kernel
    values = _Values(out.loss, _aux(plan, head, chunk, logits, out.log_normalizer))
    return values, added, gradients


def _back(
    hidden: Array, kernel: Array, g: Array, of_kernel: Array | None, of_hidden: bool
) -> tuple[Array | None, Array | None]:
    """`g kernel^T` in the dtype of `hidden` if it is wanted, and `of_kernel + hidden^T g` if that is."""

    def at_once(hidden, kernel, g, of_kernel):
        g = g.astype(kernel.dtype)  # to multiply 16-bit numbers by such
        return (
            _dot(g, kernel.T).astype(hidden.dtype) if of_hidden else None,
            None if of_kernel is None else of_kernel + _dot(hidden.T, g),
        )

    # On CPU the sum would be of two arrays [D, V], and a product with a 16-bit kernel transposed would
    # widen all of it. In tiles of classes both are small, and the first is nearly twice as fast.
    def in_tiles(hidden, kernel, g, of_kernel):
        num_classes = kernel.shape[1]
        width = math.ceil(num_classes / _TILES)
        narrow = kernel.dtype.itemsize == 2
        bits, wide = _rows.to_bits(kernel), hidden.astype(g.dtype)

        def step(i, carry):
            of_hidden, of_kernel = carry
            start = jnp.minimum(i * width, num_classes - width)
            tile = functools.partial(
                lax.dynamic_slice_in_dim, start_index=start, slice_size=width, axis=1
            )
            new = start + jnp.arange(width) >= i * width  # the last tile overlaps the one before
            part = jnp.where(new, tile(g), 0)
            if of_hidden is not None:
                columns = _rows.from_bits(tile(bits), kernel.dtype).astype(g.dtype)
                of_hidden += part @ columns.T
            if of_kernel is not None:
                of_kernel = lax.dynamic_update_slice_in_dim(
                    of_kernel, tile(of_kernel) + wide.T @ part, start, axis=1
                )
            return of_hidden, of_kernel

        by_tile = jnp.zeros_like(wide) if of_hidden and narrow else None
        by_tile, of_kernel = lax.fori_loop(0, _TILES, step, (by_tile, of_kernel))
        if of_hidden and not narrow:
            by_tile = _dot(g, kernel.T)
        return (by_tile.astype(hidden.dtype) if of_hidden else None), of_kernel

    if kernel.shape[1] < _TILED:
        return at_once(hidden, kernel, g, of_kernel)
    return lax.platform_dependent(hidden, kernel, g, of_kernel, cpu=in_tiles, default=at_once)


# -- rules --------------------------------------------------------------------------------------------


def _wanted(head: Head, examples: Examples) -> tuple[frozenset[str], Head, Examples]:
    """The fields that are differentiated, and what `symbolic_zeros` wraps."""
    wanted = frozenset(k for k, x in _fields(head, examples).items() if x.perturbed)
    return (wanted, *jax.tree.map(lambda x: x.value, (head, examples), is_leaf=_is_wrapped))


def _is_wrapped(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _cotangents(
    head: Head, examples: Examples, gradients: dict[str, Array]
) -> tuple[Head, Examples]:
    """As the arguments are laid out, in their dtypes; None for those that are not differentiated."""

    def of(fields):
        typed = {k: gradients[k].astype(x.dtype) for k, x in fields.items() if k in gradients}
        return dict.fromkeys(fields) | typed

    return Head(**of(head._asdict())), Examples(**of(examples._asdict()))


def _run_gradients(
    plans: Plans,
    wanted: frozenset[str],
    head: Head,
    examples: Examples,
    g_loss: Array,
    g_log_normalizer: Array,
) -> tuple[_Values, dict[str, Array]]:
    def gradients(plan, *args):
        return _gradients(plan, wanted, *args)

    return plans.run(gradients, head, examples, g_loss, g_log_normalizer)


def _dense(g: Array | SymbolicZero, zeros: Array) -> Array:
    return zeros if isinstance(g, SymbolicZero) else g


# What is differentiated is known when a rule is traced, and the backward rule needs to know it. But the
# residuals must be the same tree whatever that is, for JAX may take one trace's tree for another's (of a
# jitted function that is differentiated by one argument, and by two). So there is an array for every
# field, an empty one where nothing is wanted.


def _padded(head: Head, examples: Examples, of_wanted: dict[str, Array]) -> dict[str, Array]:
    return {k: of_wanted.get(k, jnp.zeros(0)) for k in _fields(head, examples)}


def _unpadded(padded: dict[str, Array]) -> dict[str, Array]:
    return {k: x for k, x in padded.items() if x.shape != (0,)}


class _TotalResiduals(NamedTuple):
    head: Head
    examples: Examples
    gradients: dict[str, Array]  # of the sum of the losses, padded


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(plans: Plans, head: Head, examples: Examples) -> tuple[Array, CrossEntropyAux]:
    """The sum of the losses. When it is differentiated, its gradients are computed with it."""
    values = plans.run(_values, head, examples)
    return jnp.sum(values.loss), values.aux


def _total_fwd(plans, head, examples):
    wanted, head, examples = _wanted(head, examples)
    zeros = _nothing(plans.default, head, plans.default.shape).loss
    values, gradients = _run_gradients(plans, wanted, head, examples, jnp.ones_like(zeros), zeros)
    gradients = _padded(head, examples, gradients)
    return (jnp.sum(values.loss), values.aux), _TotalResiduals(head, examples, gradients)


def _total_bwd(plans, residuals, cotangents):
    head, examples, gradients = residuals
    gradients = _unpadded(gradients)
    g, g_log_normalizer = cotangents[0], cotangents[1].log_normalizer
    zeros = _nothing(plans.default, head, plans.default.shape).loss
    g = _axis.total_cotangent(plans.default.axis_name, _dense(g, jnp.zeros((), zeros.dtype)))
    if isinstance(g_log_normalizer, SymbolicZero):
        gradients = {k: g * x.astype(g.dtype) for k, x in gradients.items()}
    else:  # it is not known to be 0: then the gradients that were computed are not the ones asked for
        g_log_normalizer = _axis.total_cotangent(plans.default.axis_name, g_log_normalizer)
        _, gradients = _run_gradients(
            plans, frozenset(gradients), head, examples, zeros + g, g_log_normalizer
        )
    return _cotangents(head, examples, gradients)


_total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


class _EachResiduals(NamedTuple):
    head: Head
    examples: Examples
    wanted: dict[str, Array]  # anything, padded


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(plans: Plans, head: Head, examples: Examples) -> _Values:
    """The losses one by one. Their gradients take the logits once more."""
    return plans.run(_values, head, examples)


def _each_fwd(plans, head, examples):
    wanted, head, examples = _wanted(head, examples)
    values = plans.run(_values, head, examples)
    padded = _padded(head, examples, dict.fromkeys(wanted, jnp.zeros(1)))
    return values, _EachResiduals(head, examples, padded)


def _each_bwd(plans, residuals, cotangents):
    head, examples, wanted = residuals
    zeros = _nothing(plans.default, head, plans.default.shape).loss
    g = _dense(cotangents.loss, zeros), _dense(cotangents.aux.log_normalizer, zeros)
    g = _axis.total_cotangent(plans.default.axis_name, g)
    _, gradients = _run_gradients(plans, frozenset(_unpadded(wanted)), head, examples, *g)
    return _cotangents(head, examples, gradients)


_each.defvjp(_each_fwd, _each_bwd, symbolic_zeros=True)
