"""From arrays as the caller laid them out to arrays as kernels want them, classes last, and back."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from ._rows import Rows, Targets


def is_16_or_32_bit(rows: Rows, targets: list[Targets]) -> bool:
    """Do logits and distributions, arrays or their shapes, have a dtype that kernels take?"""
    floats = [rows.logits, *(x.labels for x in targets if not x.has_ids(rows))]
    return all(x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) for x in floats)


def batch(rows: Rows, x: Any) -> tuple[int, ...]:
    """The sizes of the axes that are not of classes."""
    classes = {axis % rows.logits.ndim for axis in rows.axes}
    return tuple(size for axis, size in enumerate(x.shape) if axis not in classes)


def of_rows(rows: Rows, x: Array) -> Array:
    """[N, 1] or [1, 1] as [n]."""
    return jnp.broadcast_to(x, rows.row_shape).reshape(-1)


def flat(rows: Rows, x: Array) -> Array:
    """[N, V] as [n, V]."""
    x = classes_last(rows, x)
    return x.reshape(math.prod(x.shape[:-1]), rows.num_classes)


def shared_or_flat(rows: Rows, x: Array) -> Array:
    """A mask or weights as [1, V] if they are the same for all rows, and else as [n, V]."""
    if math.prod(batch(rows, x)) == 1:
        return classes_last(rows, x).reshape(1, -1)
    return flat(rows, jnp.broadcast_to(x, rows.logits.shape))


def classes_last(rows: Rows, x: Array) -> Array:
    """[N, V] as [N..., V]. The class axes of a mask or of weights may be of size 1 before."""
    order, count = _order(rows), len(rows.axes)
    sizes = [rows.logits.shape[a] if a in order[-count:] else n for a, n in enumerate(x.shape)]
    x = jnp.broadcast_to(x, sizes).transpose(order)
    return x.reshape(*x.shape[:-count], rows.num_classes)


def as_laid_out(rows: Rows, x: Array) -> Array:
    """[n, V] as [N, V]."""
    order = _order(rows)
    x = x.reshape([rows.logits.shape[axis] for axis in order])
    return x.transpose([order.index(axis) for axis in range(len(order))])


def _order(rows: Rows) -> list[int]:
    """The axes of the logits, those of classes last."""
    ndim = rows.logits.ndim
    classes = [axis % ndim for axis in rows.axes]
    return [axis for axis in range(ndim) if axis not in classes] + classes
