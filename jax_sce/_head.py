"""The values and gradients of a linear head, one chunk of examples at a time: the loop in plain JAX.

For each chunk: compute its logits, call the loss on logits for the losses and the logits' cotangent, and
multiply the cotangent by kernel and hidden states for their gradients. The next chunk reuses the memory.
This file only orders the work; the formulas of the loss are elsewhere. `_partition.py` runs these
functions with the platform's loop, on one device or on many."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _axis, _chunks, _cross_entropy
from ._arguments import Options
from ._aux import NO_RANK, CrossEntropyAux, aux_of
from ._chunks import Loop, Plan, Size
from ._elementary import from_bits, to_bits
from ._rows import Rows, compute_dtype
from ._targets import Sparse, Teacher
from ._teacher import TeacherRows
from ._weighting import Losses, only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The checked arguments. Arrays with an entry per example are `[N..., ...]`. A loop reshapes them to
    `[L, n, ...]`, its shards, and takes chunks from these, `[C, ...]`."""

    hidden: Array  # [N..., D]
    kernel: Array  # [D, V], in the dtype of the matrix products, `hidden.dtype`, or a wider one
    # Class ids, [N...], with -1 for a bad one; distributions, [N..., V]; a `Sparse`; or a `Teacher`.
    labels: Array | Sparse | Teacher
    bias: Array | None  # [V]
    options: Options
    exists: Array | None = None  # bool, [1, V]: False for classes that are padding of this device

    @property
    def has_ids(self) -> bool:
        labels = self.labels  # an array, or only its shape and dtype
        return not isinstance(labels, Sparse | Teacher) and labels.ndim < self.hidden.ndim

    @property
    def batch(self) -> tuple[int, ...]:
        """N..."""
        return self.hidden.shape[:-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of losses and sums."""
        return compute_dtype(self.hidden.dtype)

    def narrowed(self) -> "Inputs":
        """The same inputs with the kernel cast to the dtype of the matrix products."""
        return dataclasses.replace(self, kernel=self.kernel.astype(self.hidden.dtype))

    def arrays(self) -> dict[str, Array]:
        """The arguments that are not None, by name."""
        own = {name: getattr(self, name) for name in _OWN}
        if parts := self._parts_of_labels():
            del own["labels"]
            own |= {f"labels.{name}": getattr(self.labels, name) for name in parts}
        return {name: x for name, x in own.items() if x is not None} | self.options.arrays()

    def having(self, arrays: dict[str, Any]) -> "Inputs":
        """The same inputs with these arrays, by name, and None for all others."""
        own: dict[str, Any] = {name: arrays.get(name) for name in _OWN}
        parts = {name: arrays.get(f"labels.{name}") for name in self._parts_of_labels()}
        if parts:
            own["labels"] = dataclasses.replace(self.labels, **parts)  # type: ignore[type-var]
        of_options = {name: arrays.get(name) for name in self.options.arrays()}
        options = dataclasses.replace(self.options, **of_options)  # type: ignore[arg-type]
        return Inputs(**own, options=options, exists=self.exists)

    def _parts_of_labels(self) -> tuple[str, ...]:
        if not isinstance(self.labels, Sparse | Teacher):
            return ()
        fields = dataclasses.fields(self.labels)
        return tuple(x.name for x in fields if not x.metadata.get("static"))

    def map_examples(self, function) -> "Inputs":
        """Apply `function` to the arrays with an entry per example."""
        arrays = self.arrays()
        return self.having({k: function(x) if k in OF_EXAMPLES else x for k, x in arrays.items()})


_OWN = ("hidden", "kernel", "labels", "bias")
OF_EXAMPLES = (
    "hidden", "labels", "valid", "weights", "temperature",
    "labels.ids", "labels.values", "labels.hidden", "labels.temperature",
)  # fmt: skip


class Values(NamedTuple):
    """The results for each example: [N...], [L, n], or [C]."""

    loss: Array
    aux: CrossEntropyAux


class Cotangents(NamedTuple):
    """Cotangents of `Values`, in the same shapes."""

    loss: Array
    log_normalizer: Array
    entropy: Array | None = None  # None if it is not used


def values_like(inputs: Inputs, number: Any, place: Any) -> Values:
    """A `Values` with `number` in place of each float array and `place` in place of each integer
    array."""
    asked = inputs.options.return_aux
    has_teacher = isinstance(inputs.labels, Teacher)
    return Values(
        number,
        CrossEntropyAux(
            log_normalizer=number,
            prediction=place,
            entropy=number if asked else None,  # type: ignore[arg-type]
            rank=place if asked and inputs.has_ids else None,
            teacher_entropy=number if asked and has_teacher else None,
        ),
    )


def nothing(inputs: Inputs, shape: tuple[int, ...]) -> Values:
    """The `Values` of examples that do not count, each of this shape."""
    axes = _axis.varying(inputs.kernel) - _axis.names(inputs.options.axis_name)

    def full(x, dtype):
        return _axis.vary(jnp.full(shape, x, dtype), axes)

    values = values_like(inputs, full(0, inputs.dtype), full(-1, jnp.int32))
    if values.aux.rank is None:
        return values
    return values._replace(aux=values.aux._replace(rank=full(NO_RANK, jnp.int32)))


def _plan(loop: Loop, size: Size, inputs: Inputs) -> tuple[Plan, Inputs]:
    """The plan, and the inputs reshaped to its shards."""
    num_examples, num_classes = math.prod(inputs.batch), inputs.kernel.shape[1]
    plan = _chunks.plan(num_examples, num_classes, loop.devices, size, inputs.options.chunk_size)
    rank = len(inputs.batch)
    return plan, inputs.map_examples(lambda x: x.reshape(*plan.shape, *x.shape[rank:]))


def _chunk(loop: Loop, plan: Plan, inputs: Inputs, ids: Array) -> Inputs:
    """The inputs of these examples. The id n stands for no example; it is marked as not valid. Hidden
    states of examples that are not valid become 0, so that no infinity or NaN reaches the kernel's
    gradient."""
    chunk = inputs.map_examples(lambda x: loop.take(x, ids))
    if chunk.options.valid is None and plan.per_shard % plan.chunk == 0:
        return chunk
    options = chunk.options.where((ids < plan.per_shard).reshape(-1))
    hidden = jnp.where(options.valid[:, None], chunk.hidden, 0)  # type: ignore[index]
    return dataclasses.replace(chunk, hidden=hidden, options=options)


def _logits(head: Any, precision: Any) -> Array:
    """The logits, [C, V], of `head`: the student's `Inputs`, or a `Teacher`."""
    logits = _chunks.dot(head.hidden, head.kernel, precision)
    return logits if head.bias is None else logits + head.bias.astype(logits.dtype)[None]


def _rows(chunk: Inputs, logits: Array, head: Any) -> Rows:
    """The `Rows` of these logits. `head` has soft-cap and temperature: `Options` or a `Teacher`."""
    options = chunk.options
    rows = _cross_entropy.rows_of(logits, (-1,), options.axis_name, head.softcap, head.temperature)
    return rows if chunk.exists is None else dataclasses.replace(rows, mask=chunk.exists)


def _losses(chunk: Inputs, logits: Array) -> Losses:
    labels: Any = chunk.labels
    options = chunk.options
    if isinstance(labels, Teacher):
        of_teacher = _rows(chunk, _logits(labels, options.precision), labels)
        labels = TeacherRows(of_teacher, labels.divergence)
    return _cross_entropy.losses(_rows(chunk, logits, options), labels, options)


def _values(chunk: Inputs, logits: Array, losses: Losses) -> Values:
    if chunk.options.return_aux:
        rows = _rows(chunk, logits, chunk.options)
        ids: Any = chunk.labels if chunk.has_ids else None
        return Values(losses.loss, aux_of(rows, ids, losses, chunk.options.counts))
    values = nothing(chunk, losses.loss.shape)
    aux = values.aux._replace(log_normalizer=losses.log_normalizer)
    return Values(losses.loss, aux)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def values(loop: Loop, inputs: Inputs) -> Values:
    return _scan(loop, loop.values, inputs)


@values.defjvp
def _values_jvp(loop, primals, tangents):  # needed for forward over reverse mode with "none"
    return jax.jvp(functools.partial(values_forward, loop), primals, tangents)


def values_forward(loop: Loop, inputs: Inputs) -> Values:
    """The values, with a loop that JAX can differentiate in both modes. Its residuals are only its
    arguments. Arrays that all examples share are widened first, because reverse mode sums their
    gradients over the chunks in the dtype of the arrays."""
    options = dataclasses.replace(inputs.options, forward_mode=True)
    wide = _wide(inputs.arrays(), inputs.dtype)
    inputs = dataclasses.replace(inputs, options=options).having(wide)
    return _scan(loop, loop.gradients, inputs)


def _wide(arrays: dict[str, Array], dtype: jnp.dtype) -> dict[str, Array]:
    """Widen the arrays that all examples share to the dtype of sums."""
    of_labels = "labels."  # arrays of a teacher, which are not differentiated
    return {
        k: x if k in OF_EXAMPLES or k.startswith(of_labels) else x.astype(dtype)
        for k, x in arrays.items()
    }


def _scan(loop: Loop, size: Size, inputs: Inputs) -> Values:
    batch, (plan, inputs) = inputs.batch, _plan(loop, size, inputs)
    if plan.chunks == 0:
        return nothing(inputs, batch)
    # An example of weight 0 can be skipped unless its weight is differentiated. In forward mode we do
    # not know which arguments are differentiated.
    options = inputs.options
    worked_on = options.valid if options.forward_mode else options.counts
    order, most = _chunks.order(plan, worked_on)
    ids = order[:, : plan.chunks * plan.chunk]
    starts = jnp.arange(plan.chunks, dtype=jnp.int32) * plan.chunk

    @jax.checkpoint
    def of_chunk(inputs, ids):
        chunk = _chunk(loop, plan, inputs, ids).narrowed()
        logits = _logits(chunk, chunk.options.precision)
        return _values(chunk, logits, _losses(chunk, logits))

    def step(_, start):
        here = lax.dynamic_slice_in_dim(order, start, plan.chunk, axis=1)
        if worked_on is None:
            return None, of_chunk(inputs, here)
        none = nothing(inputs, (here.size,))
        return None, lax.cond(start < most, lambda: of_chunk(inputs, here), lambda: none)

    _, chunks = lax.scan(step, None, starts)

    # The position of each example in `order`, to undo it.
    places = ids[:, : plan.per_shard]
    if worked_on is not None:
        places = jnp.argsort(places, axis=1)

    def in_place(rows):
        rows = rows.reshape(plan.chunks, plan.shards, plan.chunk).swapaxes(0, 1)
        return _chunks.take(rows.reshape(ids.shape), places).reshape(batch)

    return jax.tree.map(in_place, chunks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def gradients(
    wanted: frozenset[str], loop: Loop, inputs: Inputs, g: Cotangents
) -> tuple[Values, dict[str, Array]]:
    """The values, and the cotangents of the arrays named in `wanted`, by name. `g` are the cotangents of
    the values, [N...]. The cotangent of an array with an entry per example has the dtype of the array.
    The cotangents of other arrays are sums over the examples, in the compute dtype."""
    given, (plan, inputs) = inputs, _plan(loop, loop.gradients, inputs)
    options, g = inputs.options, jax.tree.map(lambda x: x.reshape(plan.shape), g)
    worked_on = options.valid if "weights" in wanted else options.counts
    order, most = _chunks.order(plan, worked_on)
    arrays = {k: x for k, x in inputs.arrays().items() if k in wanted}
    shared = {k: _zeros(x, inputs.dtype) for k, x in arrays.items() if k not in OF_EXAMPLES}
    own = {k: to_bits(_zeros(x, x.dtype)) for k, x in arrays.items() if k in OF_EXAMPLES}

    def add(start, size, carry):
        values, shared, own = carry
        ids = lax.dynamic_slice_in_dim(order, start, size, axis=1)
        chunk = _chunk(loop, plan, inputs, ids)
        of_values = jax.tree.map(lambda x: loop.take(x, ids), g)
        new, shared, of_chunk = _add_chunk(loop, wanted, chunk, of_values, shared)
        return (
            jax.tree.map(lambda x, rows: _chunks.put(x, ids, rows), values, new),
            shared,
            {k: _chunks.put(x, ids, to_bits(of_chunk[k])) for k, x in own.items()},
        )

    def add_chunks(count, start, size, carry):
        return lax.fori_loop(0, count, lambda i, carry: add(start + i * size, size, carry), carry)

    carry = nothing(inputs, plan.shape), shared, own
    if plan.chunks != 0 and worked_on is None:
        carry = add_chunks(plan.chunks, 0, plan.chunk, carry)
    elif plan.chunks != 0:  # whole chunks, then quarter chunks for the rest
        whole, quarter = most // plan.chunk, _chunks.ceil_div(plan.chunk, 4)
        done = whole * plan.chunk
        carry = add_chunks(whole, 0, plan.chunk, carry)
        carry = add_chunks((most - done + quarter - 1) // quarter, done, quarter, carry)
    values, shared, own = carry
    values = jax.tree.map(lambda x: x.reshape(given.batch), values)
    like = given.arrays()
    own = {k: from_bits(x, like[k].dtype).reshape(like[k].shape) for k, x in own.items()}
    return values, shared | own


@gradients.defjvp
def _gradients_jvp(wanted, loop, primals, tangents):
    # JAX cannot differentiate the loop in `gradients` again in reverse mode: its length is known only at
    # run time. So differentiate `values_forward` twice.
    def by_values(inputs, g):
        arrays = inputs.arrays()

        def values(moving):
            values = values_forward(loop, inputs.having(arrays | moving))
            return _differentiated(g, values.loss, values.aux), values

        moving = {k: x for k, x in arrays.items() if k in wanted}
        _, vjp, out = jax.vjp(values, moving, has_aux=True)
        g = _axis.divided_cotangent(inputs.options.axis_name, g)
        return out, _wide(vjp(g)[0], inputs.dtype)

    return jax.jvp(by_values, primals, tangents)


def _zeros(x: Array, dtype: jnp.dtype) -> Array:
    """Zeros, the start of a sum of cotangents of `x`. They vary over the same mesh axes as `x`."""
    return _axis.vary(jnp.zeros(x.shape, dtype), _axis.varying(x))


def _add_chunk(
    loop: Loop, wanted: frozenset[str], chunk: Inputs, g: Cotangents,
    shared: dict[str, Array],
) -> tuple[Values, dict[str, Array], dict[str, Array]]:  # fmt: skip
    """The values of a chunk; `shared` plus the chunk's cotangents; and the cotangents of the arrays with
    an entry per example. The loss gives the cotangent of the logits, two matrix products the rest."""
    logits, arrays = _logits(chunk, chunk.options.precision), chunk.arrays()
    inner = {k: arrays[k] for k in wanted - {"hidden", "kernel", "bias"}}

    def of_logits(logits, inner):
        losses = _losses(chunk.having(arrays | inner), logits)
        return _differentiated(g, losses.loss, losses), losses

    _, vjp, losses = jax.vjp(of_logits, logits, inner, has_aux=True)
    g_logits, of_chunk = vjp(_axis.divided_cotangent(chunk.options.axis_name, g))
    if "bias" in wanted:
        of_chunk["bias"] = jnp.sum(g_logits, axis=0)
    of_hidden, of_kernel = loop.products(
        chunk.hidden, chunk.kernel, g_logits, shared.get("kernel"), "hidden" in wanted,
        chunk.options.precision)  # fmt: skip
    if of_hidden is not None:
        counts = chunk.options.counts
        of_chunk["hidden"] = only(None if counts is None else counts[:, None], of_hidden)
    added = {k: of_kernel if k == "kernel" else x + of_chunk[k] for k, x in shared.items()}
    return _values(chunk, logits, losses), added, of_chunk


def _differentiated(g: Cotangents, loss: Array, others: Any) -> Cotangents:
    """The outputs that the cotangents `g` belong to."""
    entropy = None if g.entropy is None else others.entropy
    return Cotangents(loss, others.log_normalizer, entropy)
