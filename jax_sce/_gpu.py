"""The GPU backend: one kernel in Pallas (Triton) for the statistics of long rows.

The reduction in plain JAX is also one pass over memory, but in 16 bits its arithmetic takes longer than
the memory traffic: XLA gives each thread 8 to 16 logits and merges the threads by shuffles, with about
45 instructions per logit. Here each lane loops over its share of the row, with a dozen instructions per
logit, and the lanes are merged once.

Measured on an H100 (JAX 0.11.2), for 8192 x 32000 and 8192 x 128256: the time, without the time of the
call, divided by the time of reading the logits (half of a copy). The floor is 1, or 3 with the gradient:

| | bfloat16 | float32 | with the gradient | |
|---|---|---|---|---|
| optax | 2.2, 2.0 | 2.0, 2.0 | 4.4, 4.0 | 4.0, 4.0 |
| the plain reduction | 3.4, 3.4 | 1.7, 1.7 | 5.6, 5.5 | 3.7, 3.7 |
| this kernel | 1.4, 1.3 | 1.1, 1.1 | 3.6, 3.5 | 3.1, 3.1 |

The kernel uses 4 warps that read 1024 logits at a time; 8 warps with 2048 and with 4096 took 1.07 and
1.22 times as long. Minimum and maximum instead of the two selects took 0.93 of the time, but in Triton
they ignore NaN. With the classes on another axis, [8, 150, 256, 256], the forward pass takes 2.1 reads
in bfloat16 and 1.3 in float32; optax takes 2.6 and 2.3, the plain reduction 4.4 and 2.4.

A lane carries the largest logit so far, and the sum of the exponentials of all others, relative to a
reference. The reference is one of those others, and changes only when another of them exceeds it by more
than 4. So distances are short where the sum is large, and rescaling shrinks the sum by e^-4 or more:
rounding errors are small and rare."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _rows
from ._elementary import exp_difference
from ._layout import flat, is_16_or_32_bit, of_rows, shared_or_flat
from ._rows import Rows, Targets

_LANES, _WARPS = 1024, 4
_COLUMN_LANES, _COLUMN_WARPS = 256, 2
_LONG_ROW = 512  # the kernel does not support shorter rows: XLA computes them
_MARGIN = 4.0


def supports(operation: str, rows: Rows, *args: Any) -> bool:
    """Is there a kernel for these arrays (or their shapes)?"""
    targets = [x for x in args if isinstance(x, Targets)]
    if any(x.ids is None and x.dense is None for x in targets):
        return False
    if _rows.is_minor(rows):
        fits = rows.num_classes >= _LONG_ROW
    else:
        is_plain = not targets and rows.mask is None and len(rows.axes) == 1
        fits = is_plain and _inner(rows) >= _COLUMN_LANES
    return fits and is_16_or_32_bit(rows, targets) and rows.first_class is None and _has_device()


def _inner(rows: Rows) -> int:
    """The distance in memory between two classes of an example, in logits."""
    return math.prod(rows.logits.shape[rows.axes[-1] :][1:])


@functools.cache
def _has_device() -> bool:
    """Is there a GPU that Triton compiles for? Without one, no program uses the kernel, even if it is
    compiled for a GPU, because only the device tells its compute capability."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return False
    return float(getattr(device, "compute_capability", 0)) >= 8.0


def label_statistics(rows: Rows, labels: Array, *, interpret: bool = False) -> tuple[Array, ...]:
    if not _rows.is_minor(rows):
        return _column_statistics(rows, labels, interpret)
    return _statistics(rows, 3, interpret, label=labels)


def target_statistics(
    rows: Rows, targets: Targets, *, interpret: bool = False
) -> tuple[Array, ...]:
    highest, tail, *sums = _statistics(
        rows, 4, interpret, label=targets.ids, target=targets.dense, uniform=targets.uniform,
        smoothing=targets.label_smoothing, weight=targets.class_weights)  # fmt: skip
    if targets.ids is not None:  # a bad label
        sums[:2] = (jnp.where(targets.ids < 0, jnp.nan, x) for x in sums[:2])
    return highest, tail, *sums


KERNELS: dict[str, Callable] = {f.__name__: f for f in (label_statistics, target_statistics)}


def _call(
    kernel: Callable, operands: Iterable[Array], shape: tuple[int, ...], num_results: int,
    *, grid: tuple[int, ...], spec: Callable, warps: int, interpret: bool,
) -> list[Array]:  # fmt: skip
    """The results of the kernel, each float32 of shape `shape`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    operands, results = [*operands], [jax.ShapeDtypeStruct(shape, jnp.float32)] * num_results
    call = pl.pallas_call(
        kernel, results, grid=grid, in_specs=[*map(spec, operands)], out_specs=[*map(spec, results)],
        compiler_params=triton.CompilerParams(num_warps=warps), interpret=interpret)  # fmt: skip
    return call(*operands)


_AS_OPERAND = {"logit": flat, "target": flat, "mask": shared_or_flat, "weight": shared_or_flat}


def _statistics(
    rows: Rows, num_statistics: int, interpret: bool, **arrays: Array | None
) -> tuple[Array, ...]:
    from jax.experimental import pallas as pl

    arrays |= {"logit": rows.logits, "mask": rows.mask}
    arrays |= {"softcap": rows.softcap, "temperature": rows.temperature}
    operands = {
        name: _AS_OPERAND.get(name, of_rows)(rows, x) for name, x in arrays.items() if x is not None
    }

    def spec(x: Any) -> Any:
        if len(x.shape) == 1:
            return pl.BlockSpec((1,), lambda i: (i,))
        return pl.BlockSpec((None, x.shape[1]), lambda i, row=int(x.shape[0] > 1): (i * row, 0))

    kernel, shape = functools.partial(_kernel, tuple(operands)), operands["logit"].shape[:1]
    out = _call(kernel, operands.values(), shape, num_statistics + 1,
                grid=shape, spec=spec, warps=_WARPS, interpret=interpret)  # fmt: skip
    highest, reference, others, *sums = (x.reshape(rows.row_shape) for x in out)
    return *_finish(highest, reference, others), *sums, *_rows.keeps_class(rows)


def _add(x: Array, highest: Array, reference: Array, others: Array) -> tuple[Array, Array, Array]:
    """Add one logit to each lane."""
    # Triton's minimum and maximum ignore NaN. With these selects a NaN reaches `others`.
    is_lower = highest >= x
    low, high = jnp.where(is_lower, x, highest), jnp.where(is_lower, highest, x)
    distance = low - reference
    moves = distance > _MARGIN
    scale = jnp.exp(jnp.where(moves, -distance, distance))
    others = jnp.where(moves, others * scale + 1, others + scale)
    return high, jnp.where(moves, low, reference), others


def _finish(highest: Array, reference: Array, others: Array) -> tuple[Array, Array]:
    """The maximum and the tail. The tail is NaN if the maximum is infinite."""
    highest = jnp.where(jnp.isnan(others), jnp.nan, highest)
    return highest, others * exp_difference(reference, highest) + (highest - highest)


def _column_statistics(rows: Rows, labels: Array, interpret: bool) -> tuple[Array, ...]:
    """For classes that are not on the last axis: each lane has its own row."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    num_classes, inner = rows.num_classes, _inner(rows)
    of_row = (math.prod(rows.row_shape) // inner, inner)
    operands = [rows.logits.reshape(of_row[0], num_classes, inner)]
    given = {"softcap": rows.softcap, "temperature": rows.temperature}
    names = [name for name, x in given.items() if x is not None]
    operands += [
        of_rows(rows, x).reshape(of_row) for x in (labels, *given.values()) if x is not None
    ]

    def kernel(logits, labels, *refs):
        lanes = pl.program_id(1) * _COLUMN_LANES + jnp.arange(_COLUMN_LANES, dtype=jnp.int32)
        place, exists = pl.ds(pl.program_id(1) * _COLUMN_LANES, _COLUMN_LANES), lanes < inner
        label = triton.load(labels.at[place], mask=exists, other=0)
        results = refs[-4:]
        options = {
            name: triton.load(ref.at[place], mask=exists, other=1.0)
            for name, ref in zip(names, refs, strict=False)
        }

        def step(i, carry):
            highest, reference, others, at_label = carry
            x = triton.load(logits.at[i, place], mask=exists, other=0.0).astype(jnp.float32)
            if "softcap" in options:
                x = options["softcap"] * jnp.tanh(x / options["softcap"])
            if "temperature" in options:
                x = x / options["temperature"]
            return *_add(x, highest, reference, others), jnp.where(i == label, x, at_label)

        init = (-jnp.inf, float(jnp.finfo(jnp.float32).min), 0.0, -jnp.inf)
        carry = tuple(jnp.full((_COLUMN_LANES,), x, jnp.float32) for x in init)
        for ref, x in zip(results, lax.fori_loop(0, num_classes, step, carry), strict=True):
            triton.store(ref.at[place], x, mask=exists)

    def spec(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, j: (i, *[0] * (len(x.shape) - 1)))

    grid = of_row[0], pl.cdiv(inner, _COLUMN_LANES)
    *sums, at_label = _call(kernel, operands, of_row, 4,
                            grid=grid, spec=spec, warps=_COLUMN_WARPS, interpret=interpret)  # fmt: skip
    return tuple(x.reshape(rows.row_shape) for x in (*_finish(*sums), at_label))


def _kernel(names: tuple[str, ...], *refs: Any) -> None:
    """The statistics of one row. `refs` are the operands, which have these names, then the results: the
    maximum, the reference, the sum relative to it, and the logit at the label or the two sums of
    targets."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    inputs, results = dict(zip(names, refs, strict=False)), refs[len(names) :]
    num_classes = inputs["logit"].shape[0]
    lanes = jnp.arange(_LANES, dtype=jnp.int32)
    has_targets = "uniform" in inputs
    # If the values are the stored logits, the one at the label is read at the end. Otherwise the loop
    # picks it.
    is_computed = not inputs.keys().isdisjoint(("softcap", "temperature", "mask"))
    picks_label = not has_targets and is_computed

    def load(name: str, start: Array, other: Any) -> Array:
        is_class = start + lanes < num_classes
        return triton.load(inputs[name].at[pl.ds(start, _LANES)], mask=is_class, other=other)

    def logit(start: Array) -> Array:
        """The logits, -inf past the last class. This is set after the soft-cap, which makes -inf
        finite."""
        x = load("logit", start, -jnp.inf).astype(jnp.float32)
        if "softcap" in inputs:
            cap = inputs["softcap"][0]
            x = jnp.where(start + lanes < num_classes, cap * jnp.tanh(x / cap), -jnp.inf)
        if "temperature" in inputs:
            x = x / inputs["temperature"][0]
        return jnp.where(load("mask", start, False), x, -jnp.inf) if "mask" in inputs else x

    def target(start: Array) -> Array:
        if "target" in inputs:
            y = load("target", start, 0.0).astype(jnp.float32)
        else:
            y = jnp.where(start + lanes == inputs["label"][0], 1.0, 0.0)
        kept = load("mask", start, False) if "mask" in inputs else start + lanes < num_classes
        y = jnp.where(kept, y, 0.0) if "target" in inputs else y
        if "smoothing" in inputs:
            smoothing = inputs["smoothing"][0]
            y = (1 - smoothing) * y + smoothing * jnp.where(kept, inputs["uniform"][0], 0.0)
        return y * load("weight", start, 0.0) if "weight" in inputs else y

    def moved(y: Array, x: Array, highest: Array) -> Array:
        """The term that a target `y` at the logit `x` adds to the sum of `y (z - max)`."""
        return jnp.where((y == 0) | (x == highest), 0.0, y * (x - highest))

    def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        highest, reference, others, *sums = carry
        start = i * _LANES
        x = logit(start)
        high, reference, others = _add(x, highest, reference, others)
        if has_targets:
            y, (target_sum, target_dot) = target(start), sums
            target_dot += moved(target_sum, highest, high) + moved(y, x, high)
            sums = [target_sum + y, target_dot]
        elif picks_label:
            sums = [jnp.where(start + lanes == inputs["label"][0], x, sums[0])]
        return high, reference, others, *sums

    def full(value: float) -> Array:
        return jnp.full((_LANES,), value, jnp.float32)

    none = (full(0.0), full(0.0)) if has_targets else (full(-jnp.inf),) if picks_label else ()
    lowest = float(jnp.finfo(jnp.float32).min)
    init = (full(-jnp.inf), full(lowest), full(0.0), *none)
    highest, reference, others, *sums = lax.fori_loop(0, pl.cdiv(num_classes, _LANES), step, init)

    # Add the maxima of the lanes to the sum of the others, except one of the largest.
    top = jnp.max(highest)
    leads = highest == top
    lower = jnp.where(leads, -jnp.inf, highest)
    ties = jnp.sum(jnp.where(leads, 1.0, 0.0)) - 1
    common = jnp.maximum(jnp.max(jnp.maximum(reference, lower)), jnp.where(ties > 0, top, lowest))
    total = jnp.sum(others * jnp.exp(reference - common) + jnp.exp(lower - common))
    results[0][0] = top
    results[1][0] = common
    results[2][0] = total + jnp.where(ties > 0, ties * jnp.exp(top - common), 0.0)
    if has_targets:
        target_sum, target_dot = sums
        results[3][0] = jnp.sum(target_sum)
        results[4][0] = jnp.sum(target_dot + moved(target_sum, highest, top))
    elif picks_label:
        results[3][0] = jnp.max(sums[0])
    else:
        label = jnp.clip(inputs["label"][0], 0, num_classes - 1)
        results[3][0] = triton.load(inputs["logit"].at[label]).astype(jnp.float32)
