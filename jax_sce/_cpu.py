"""The CPU backend: the native kernels (`_native/`), and forms of the statistics in plain JAX that XLA
compiles to fast code, for arrays that the kernels do not support.

XLA for CPU compiles a reduction with several operands to scalar code: it takes 5 to 8 times as long for
ten classes, and longer for more. So these forms first read the rows for the maximum, then for the
sum."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _chunks, _divergence, _layout, _rows, native
from ._chunks import Loop, Size
from ._elementary import exp_difference, from_bits, to_bits
from ._rows import Rows, Statistics, Targets

_LONG_ROW = 256  # rows with at least this many classes are read in blocks
# Widths of 128 to 8000 ran equally fast, narrower ones a little slower. XLA writes one number per block
# and one whole block per row, so both should be small. That block is then treated as a row of its own.
# In 16 bits it is cut into blocks again until it is short, because XLA would widen it. Otherwise it is
# cut once, because every cut adds to the compile time.
_BLOCK_WIDTHS = range(16, 513)
_SHORT_16_BIT_ROW = 40


# -- the native kernels -------------------------------------------------------------------------------


def supports(operation: str, rows: Rows, *args: Any) -> bool:
    """Is there a kernel for these arrays (or their shapes)?"""
    targets = [x for x in args if isinstance(x, Targets)]
    # A kernel would treat a class id of another device as a bad label.
    ids_are_here = rows.first_class is None or all(x.ids is None for x in targets)
    shared = [y for x in targets for y in (x.label_smoothing, x.class_weights) if y is not None]
    has_slope = operation.endswith("cotangent") and args[-1] is not None
    if has_slope and operation != "label_cotangent":
        return False
    if operation.startswith("divergence"):
        both = (rows, args[0])
        is_plain = all(x.is_raw and x.mask is None and x.logits.dtype == jnp.float32 for x in both)
        return is_plain and native.status().available
    return (
        _layout.is_16_or_32_bit(rows, targets)
        and rows.is_raw
        and all(x.ids is not None or x.dense is not None for x in targets)
        and ids_are_here
        and all(math.prod(_layout.batch(rows, x)) == 1 for x in shared)
        and native.status().available
    )


def _statistics(kernel: str, count: int, rows: Rows, labels: Array | Targets) -> tuple[Array, ...]:
    logits, operands = (
        _layout.flat(rows, rows.logits),
        (_mask_operand(rows), *_operands(rows, labels)),
    )
    results = [jax.ShapeDtypeStruct(logits.shape[:1], jnp.float32)] * count
    out = jax.ffi.ffi_call(f"jax_sce.{kernel}", results)(logits, *operands)
    return *(x.reshape(rows.row_shape) for x in out), *_rows.keeps_class(rows)


def _cotangent(kernel: str, rows: Rows, labels: Array | Targets, *args: Any) -> list[Array]:
    """The kernel writes its result over the logits. If these are only reshaped, XLA's layout assignment
    would copy them first. The barrier prevents the copy."""
    logits = lax.optimization_barrier(_layout.flat(rows, rows.logits))
    *of_row, slope = args
    operands = *_operands(rows, labels), *(_layout.of_rows(rows, x) for x in of_row)
    if not isinstance(labels, Targets):
        none = jnp.zeros(0, jnp.float32)
        operands += (none if slope is None else _layout.of_rows(rows, slope),)
    result = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    call = jax.ffi.ffi_call(f"jax_sce.{kernel}", result, input_output_aliases={0: 0})
    return [_layout.as_laid_out(rows, call(logits, _mask_operand(rows), *operands))]


def _spread(rows: Rows, highest: Array) -> tuple[Array]:
    logits = _layout.flat(rows, rows.logits)
    result = jax.ShapeDtypeStruct(logits.shape[:1], jnp.float32)
    call = jax.ffi.ffi_call("jax_sce.spread", result)
    return (
        call(logits, _mask_operand(rows), _layout.of_rows(rows, highest)).reshape(rows.row_shape),
    )


def _both(rows: Rows, teacher: Rows, args: Any) -> list[Array]:
    """The operands of a divergence kernel: both logits, [n, V], and the numbers of each row, [n]."""
    logits = (_layout.flat(rows, x.logits) for x in (rows, teacher))
    return [*logits, *(_layout.of_rows(rows, x) for x in args)]


def _divergence_sums(rows: Rows, teacher: Rows, *args: Array) -> tuple[Array, ...]:
    operands = _both(rows, teacher, args)
    results = [jax.ShapeDtypeStruct(operands[0].shape[:1], jnp.float32)] * 2
    out = jax.ffi.ffi_call("jax_sce.divergence_sums", results)(*operands)
    return tuple(x.reshape(rows.row_shape) for x in out)


def _divergence_cotangent(rows: Rows, teacher: Rows, *args: Any) -> list[Array]:
    """The barrier is there for the same reason as in `_cotangent`."""
    logits, *operands = _both(rows, teacher, args[:-1])
    result = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    call = jax.ffi.ffi_call("jax_sce.divergence_cotangent", result, input_output_aliases={0: 0})
    return [_layout.as_laid_out(rows, call(lax.optimization_barrier(logits), *operands))]


KERNELS: dict[str, Callable] = {
    "spread": _spread,
    "divergence_sums": _divergence_sums,
    "divergence_cotangent": _divergence_cotangent,
    "label_statistics": partial(_statistics, "label_statistics", 3),
    "label_cotangent": partial(_cotangent, "label_cotangent"),
    "target_statistics": partial(_statistics, "target_statistics", 4),
    "target_cotangent": partial(_cotangent, "target_cotangent"),
}


def _operands(rows: Rows, labels: Array | Targets) -> tuple[Array, ...]:
    """For class ids: the ids, [n]. For `Targets`: ids, [n], or distributions, [n, V]; the smoothing,
    [1]; 1 / V, [n] or [1]; and the class weights, [V], or [0] for none."""
    if not isinstance(labels, Targets):
        return (_layout.of_rows(rows, rows.places(labels)),)
    dense, uniform = labels.dense, labels.uniform
    smoothing, weights = labels.label_smoothing, labels.class_weights
    return (
        _layout.of_rows(rows, labels.ids) if dense is None else _layout.flat(rows, dense),  # type: ignore[arg-type]
        jnp.zeros(1, jnp.float32) if smoothing is None else smoothing.reshape(1),
        uniform.reshape(1) if uniform.size == 1 else _layout.of_rows(rows, uniform),
        jnp.zeros(0, jnp.float32)
        if weights is None
        else _layout.classes_last(rows, weights).reshape(-1),
    )


def _mask_operand(rows: Rows) -> Array:
    """The mask, [n, V]; [V] if all rows share it; [0] for none."""
    if rows.mask is None:
        return jnp.zeros(0, bool)
    mask = _layout.shared_or_flat(rows, rows.mask)
    return mask[0] if len(mask) == 1 else mask


# -- forms in plain JAX --------------------------------------------------------------------------------


def _label_statistics_form(rows: Rows, labels: Array) -> tuple[Array, ...]:
    stats, largest = _max_and_tail(rows)
    at_label = _rows.value_at(rows, rows.at(labels), stats.max, largest)
    return *stats, at_label, *_rows.keeps_class(rows)


def _target_statistics_form(rows: Rows, targets: Targets) -> tuple[Array, ...]:
    stats, _ = _max_and_tail(rows)
    again = dataclasses.replace(rows, logits=lax.optimization_barrier(rows.logits))
    return *stats, *_rows.target_sums(again, targets, stats.max)[1:], *_rows.keeps_class(rows)


def _on_its_own(cotangent: Callable) -> Callable:
    """Keep XLA for CPU from fusing the cotangent into the two matrix products of a head that read it. To
    compute the exponentials only once, XLA would write them to an array."""

    def form(*args):
        of_logits, *of_row = cotangent(*args)
        return [lax.optimization_barrier(of_logits), *of_row]

    return form


FORMS: dict[str, Callable] = {
    "label_statistics": _label_statistics_form,
    "label_cotangent": _on_its_own(_rows.label_cotangent),
    "target_statistics": _target_statistics_form,
    "target_cotangent": _on_its_own(_rows.target_cotangent),
    "divergence_cotangent": _on_its_own(_divergence.divergence_cotangent),
}


def _max_and_tail(rows: Rows) -> tuple[Statistics, Array | None]:
    """The statistics, [N, 1], and the largest raw logit, [N, 1] (None if the values are the raw logits).

    The barriers here and in `_target_statistics_form` keep XLA from seeing that the logits are read
    twice: if two readers widen 16-bit logits, XLA for CPU writes them to memory as float32."""

    def of_row(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(*_layout.batch(rows, x), 1)

    last = Rows(
        _layout.classes_last(rows, lax.optimization_barrier(rows.logits)),
        (-1,),
        None if rows.mask is None else _layout.classes_last(rows, rows.mask),
        of_row(rows.softcap),
        of_row(rows.temperature),
    )
    is_long = rows.mask is None and rows.num_classes >= _LONG_ROW
    (highest, tail), largest = (_in_blocks if is_long else _at_once)(last)
    highest, tail, largest = (x.reshape(rows.row_shape) for x in (highest, tail, largest))
    return Statistics(highest, tail), None if rows.is_raw else largest


def _at_once(rows: Rows) -> tuple[Statistics, Array]:
    """The statistics of rows with the classes last, and the largest raw logit, [N...] each (XLA for CPU
    is slow on [N, 1])."""
    largest = jnp.max(rows.masked(rows.raw(rows.logits)), axis=-1)
    z = rows.values()
    highest = jnp.max(z, axis=-1)
    # Leave out one entry at the maximum, found by its position: then the others of a tie count.
    is_first = _is_place(z, jnp.argmax(z, axis=-1))
    # NaN if the maximum is infinite, or if an entry is NaN, which XLA's maximum on CPU may pass over.
    others = jnp.where(is_first, z - z, exp_difference(z, highest[..., None]))
    return Statistics(highest, jnp.sum(others, axis=-1)), largest


def _is_place(x: Array, place: Array) -> Array:
    """bool, in the shape of `x`: which entries are at `place`, [N...], on the last axis?"""
    places = lax.broadcasted_iota(jnp.int32, (1,) * (x.ndim - 1) + x.shape[-1:], x.ndim - 1)
    return places == place[..., None].astype(jnp.int32)


def _of_raw(rows: Rows, x: Array) -> Array:
    """The values of some raw logits of each row. `x` is [N..., ...] with any further axes."""

    def like(y: Array | None) -> Array | None:
        return None if y is None else y.reshape(*y.shape[:-1], *(1,) * (x.ndim - y.ndim + 1))

    softcap, temperature = like(rows.softcap), like(rows.temperature)
    return dataclasses.replace(rows, softcap=softcap, temperature=temperature).of_raw(x)


def _in_blocks(rows: Rows) -> tuple[Statistics, Array]:
    """`_at_once` for long rows without a mask.

    XLA for CPU fuses reading with a sum of exponentials only if there is nothing but arithmetic in
    between: with a `select` or a comparison it writes an N x V array. And it sums at full rate only over
    a short axis. So the row is cut into blocks, and each block is summed as a whole. The block that
    holds the maximum is treated as a row of its own. The sums of the others are relative to the maximum
    of the others, because short distances have small rounding errors."""
    num_classes = rows.num_classes
    is_16_bit = rows.logits.dtype.itemsize == 2

    def part(logits: Array) -> tuple[Statistics, Array]:
        return _in_blocks(dataclasses.replace(rows, logits=logits))

    if num_classes <= (_SHORT_16_BIT_ROW if is_16_bit else _LONG_ROW):
        return _at_once(rows)
    best = min(max(num_classes // 160, 50), 240)
    divisors = [w for w in _BLOCK_WIDTHS if num_classes % w == 0 and w < num_classes]
    width = min(divisors, key=lambda w: abs(w - best), default=min(best, num_classes // 2))
    whole = num_classes - num_classes % width
    if whole < num_classes:
        (a, top_a), (b, top_b) = part(rows.logits[..., :whole]), part(rows.logits[..., whole:])
        return _union(a, b), jnp.maximum(top_a, top_b)

    blocks = rows.logits.reshape(*rows.logits.shape[:-1], num_classes // width, width)
    # Take the maxima of the logits as they are stored: a second reader must not widen them. The barrier
    # keeps XLA from reading the whole row again for the maximum of the maxima.
    maxima = lax.optimization_barrier(jnp.max(blocks, axis=-1))
    home = jnp.argmax(maxima, axis=-1)
    is_home = _is_place(maxima, home)
    largest = rows.raw(jnp.max(maxima, axis=-1))
    second = jnp.max(jnp.where(is_home, -jnp.inf, maxima), axis=-1).astype(rows.dtype)
    highest, second = _of_raw(rows, largest), _of_raw(rows, second)
    second = jnp.where(jnp.isneginf(second), highest, second)
    # The barriers order the steps. Each step reads the blocks again and can reuse the memory of the
    # last.
    blocks, home, highest, second = lax.optimization_barrier((blocks, home, highest, second))
    tail = part(lax.optimization_barrier(_take_block(blocks, home)))[0].tail
    blocks, second, tail = lax.optimization_barrier((blocks, second, tail))
    wide = _of_raw(rows, blocks.astype(rows.dtype))
    sums = jnp.sum(jnp.exp(wide - second[..., None, None]), axis=-1)
    others = jnp.sum(jnp.where(is_home, 0, sums), axis=-1)
    return Statistics(highest, tail + others * exp_difference(second, highest)), largest


def _take_block(blocks: Array, index: Array) -> Array:
    """One block of each row, [N..., width]."""
    bits, index = to_bits(blocks), index[..., None, None]
    block = jnp.take_along_axis(bits, index, -2, mode="promise_in_bounds")[..., 0, :]
    return from_bits(block, blocks.dtype)


def _union(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of the union of two sets of classes. A set of only absent classes adds nothing."""
    highest, lower = jnp.maximum(a.max, b.max), jnp.minimum(a.max, b.max)
    a_leads = a.max >= b.max
    leader, follower = (jnp.where(a_leads, *x) for x in ((a.tail, b.tail), (b.tail, a.tail)))
    others = jnp.where(jnp.isneginf(lower), 0, (1 + follower) * exp_difference(lower, highest))
    return Statistics(highest, leader + others + (highest - highest))


# -- the head -----------------------------------------------------------------------------------------

# With at least `_TILED` classes, the backward products are computed in `_TILES` tiles of classes.
_TILES = 8
_TILED = 2048


def _products(
    hidden: Array, kernel: Array, g: Array, of_kernel: Array | None, wants_hidden: bool,
    precision: Any,
) -> tuple[Array | None, Array | None]:  # fmt: skip
    """The backward products of a chunk, in tiles of classes. Without tiles XLA would add two [D, V]
    arrays in memory, and widen a whole 16-bit kernel to multiply by its transpose. Tiles make the
    kernel's gradient nearly twice as fast."""
    num_classes = kernel.shape[1]
    if num_classes < _TILED:
        return _chunks.products(hidden, kernel, g, of_kernel, wants_hidden, precision)
    dot = partial(jnp.matmul, precision=precision)
    width = math.ceil(num_classes / _TILES)
    is_narrow = kernel.dtype.itemsize == 2
    bits, wide = to_bits(kernel), hidden.astype(g.dtype)

    def step(i, carry):
        of_hidden, of_kernel = carry
        start = jnp.minimum(i * width, num_classes - width)

        def tile(x):
            return lax.dynamic_slice_in_dim(x, start, width, axis=1)

        is_new = start + jnp.arange(width) >= i * width  # the last tile overlaps the one before
        part = jnp.where(is_new, tile(g), 0)
        if of_hidden is not None:
            of_hidden += dot(part, from_bits(tile(bits), kernel.dtype).astype(g.dtype).T)
        if of_kernel is not None:
            sums = tile(of_kernel) + dot(wide.T, part)
            of_kernel = lax.dynamic_update_slice_in_dim(of_kernel, sums, start, axis=1)
        return of_hidden, of_kernel

    of_hidden = jnp.zeros_like(wide) if wants_hidden and is_narrow else None
    of_hidden, of_kernel = lax.fori_loop(0, _TILES, step, (of_hidden, of_kernel))
    if wants_hidden and not is_narrow:
        of_hidden = _chunks.dot(g, kernel.T, precision)
    return None if of_hidden is None else of_hidden.astype(hidden.dtype), of_kernel


@jax.custom_jvp
def _take(x: Array, ids: Array) -> Array:
    return from_bits(_chunks.take(to_bits(x), ids), x.dtype)


@_take.defjvp
def _take_jvp(primals, tangents):
    return _take(*primals), _chunks.take(tangents[0], primals[1])


# On two cores (AVX2), chunks of 64 examples took 1.4 times as long as chunks of 256, chunks of 128 1.15
# times, and chunks of 512 were no faster. So take 256, and more for a small vocabulary. Values without
# gradients run at full rate from 64 examples on. 2**25 logits are 128 MiB.
LOOP = Loop(
    gradients=Size(logits=2**22, least=256, most=512, budget=2**25),
    values=Size(logits=2**22, least=64, most=256, budget=2**25),
    products=_products,
    take=_take,
)
