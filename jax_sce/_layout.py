"""Convert arrays from the caller's layout to the kernels' (classes last), and back."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from ._rows import Rows, Targets


def is_16_or_32_bit(rows: Rows, targets: list[Targets]) -> bool:
    """Do logits and distributions (or their shapes) have a dtype that the kernels support?"""
    floats = [rows.logits, *(x.dense for x in targets if x.dense is not None)]
    return all(x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) for x in floats)


def batch(rows: Rows, x: Any) -> tuple[int, ...]:
    """The sizes of the example axes."""
    return tuple(n for axis, n in enumerate(x.shape) if axis - len(x.shape) not in rows.axes)


def of_rows(rows: Rows, x: Array) -> Array:
    """[N, 1] or [1, 1] as [n], where n is the number of rows."""
    return jnp.broadcast_to(x, rows.row_shape).reshape(-1)


def flat(rows: Rows, x: Array) -> Array:
    """[N, V], or an array that broadcasts to it, as [n, V]."""
    x = classes_last(rows, jnp.broadcast_to(x, rows.logits.shape))
    return x.reshape(math.prod(x.shape[:-1]), rows.num_classes)


def shared_or_flat(rows: Rows, x: Array) -> Array:
    """A mask or weights as [1, V] if all rows share them, else as [n, V]."""
    return classes_last(rows, x).reshape(1, -1) if math.prod(batch(rows, x)) == 1 else flat(rows, x)


def classes_last(rows: Rows, x: Array) -> Array:
    """[N, V] as [N..., V]."""
    x = jnp.moveaxis(rows.expand_classes(x), rows.axes, range(-len(rows.axes), 0))
    return x.reshape(*x.shape[: -len(rows.axes)], rows.num_classes)


def as_laid_out(rows: Rows, x: Array) -> Array:
    """[n, V] as [N, V], with the classes on their own axes again."""
    sizes = [rows.logits.shape[axis] for axis in rows.axes]
    x = x.reshape(*batch(rows, rows.logits), *sizes)
    return jnp.moveaxis(x, range(-len(sizes), 0), rows.axes)
