"""Arguments at the door: converted, checked, and refused in one wording each."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._axis import AxisName


def floating(name: str, x: ArrayLike) -> Array:
    """`x` as an array of floats, real and not complex."""
    array = _array(name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {array.dtype}")
    return array


def integers(name: str, x: ArrayLike) -> Array:
    """`x` as an array of integers; bool is not an integer here."""
    array = _array(name, x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {array.dtype}")
    return array


def real(name: str, x: ArrayLike) -> Array:
    """`x` as an array of floats, integers or bools."""
    array = _array(name, x)
    if not any(jnp.issubdtype(array.dtype, d) for d in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"{name} must be real, got dtype {array.dtype}")
    return array


def boolean_or_none(name: str, x: ArrayLike | None) -> Array | None:
    """`x` as an array of bools."""
    if x is None:
        return None
    array = _array(name, x)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{name} must have dtype bool, got {array.dtype}")
    return array


def scalar(name: str, x: ArrayLike) -> Array:
    """`x` as a real scalar array."""
    array = real(name, x)
    shape(name, array, ())
    return array


def shape(name: str, x: Array, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {x.shape}")


def number_in(name: str, x: ArrayLike, low: float, high: float, interval: str) -> None:
    """Refuse a scalar that lies outside an interval, if its value is known when tracing."""
    scalar(name, x)
    if isinstance(x, jax.core.Tracer):
        return
    value = float(np.asarray(x))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):
        raise ValueError(f"{name} must lie in {interval}, got {value}")


def class_axes(axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of distinct axes in [0, ndim); None means all of them."""
    if axis is None:
        return tuple(range(ndim))
    try:
        axes = tuple(operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,)))
    except TypeError:
        raise TypeError(f"axis must be an int, a tuple of ints or None, got {axis!r}") from None
    if not all(-ndim <= a < ndim for a in axes):
        raise ValueError(
            f"axis must lie in [{-ndim}, {ndim}) for logits of rank {ndim}, got {axis}"
        )
    axes = tuple(a % ndim for a in axes)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"axis must name each axis once, and at least one, got {axis}")
    return axes


def num_classes(logits: Array, axes: tuple[int, ...]) -> int:
    count = math.prod(logits.shape[a] for a in axes)
    if count == 0:
        raise ValueError(
            f"logits must have at least one class, got shape {logits.shape} with classes on {axes}"
        )
    return count


def head(hidden: Array, kernel: Array) -> tuple[int, ...]:
    """The shape of the examples, N..., of `hidden` [N..., D] and `kernel` [D, V]."""
    if hidden.ndim == 0:
        raise ValueError("hidden must have shape (..., features), got ()")
    if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"kernel must have shape ({hidden.shape[-1]}, classes) for hidden of shape {hidden.shape}, "
            f"got {kernel.shape}"
            + (": transpose it" if kernel.shape[1:] == hidden.shape[-1:] else "")
        )
    if kernel.shape[1] == 0:
        raise ValueError(f"kernel must have at least one class, got shape {kernel.shape}")
    return hidden.shape[:-1]


def one_of(name: str, x: Any, options: tuple[str, ...]) -> None:
    if not isinstance(x, str) or x not in options:
        raise ValueError(f"{name} must be one of {options}, got {x!r}")


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {x!r}")
    return bool(x)


def integer_or_none(name: str, x: Any) -> int | None:
    if x is None:
        return None
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{name} must be an integer or None, got {x!r}") from None


def positive_or_none(name: str, x: Any) -> int | None:
    value = integer_or_none(name, x)
    if value is not None and value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return value


def axis_name(x: Any) -> AxisName:
    """The name of a mesh axis, or several, that `jax.shard_map` splits its arguments over."""
    if x is None:
        return None
    names = (x,) if isinstance(x, str) else x
    if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
        raise TypeError(f"axis_name must be the name of a mesh axis, several or None, got {x!r}")
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"axis_name must name an axis of the mesh inside jax.shard_map, got {name!r}"
            ) from None
    return x


def _array(name: str, x: ArrayLike) -> Array:
    if x is None or isinstance(x, str):
        raise TypeError(f"{name} must be an array, got {x!r}")
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be an array, got {type(x).__name__}: {error}") from error
