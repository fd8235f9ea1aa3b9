"""Communication over a mesh axis that splits the classes, inside `jax.shard_map`, and the tracking of
which values vary over it.

All devices hold equally many classes, in the order of the axis. For each row they exchange only its
largest logit and sums over its classes. If `axis_name` is None, nothing is split, and the functions here
communicate nothing.

JAX tracks which values vary over a mesh axis. If an operation combines a value that does not vary with
one that does, JAX sums the cotangent of the first over the axis. So we make values that all devices
share vary before a rule: their gradients are then summed once, outside the rule. With `check_vma=False`
JAX tracks nothing. Then every device has its own copy of a `psum`'s result, and the cotangent of the
result is the sum of the cotangents of the copies (`total_cotangent`)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

AxisName = str | tuple[str, ...] | None


def size(axis_name: AxisName) -> int:
    """The number of devices that the classes are split over."""
    return 1 if axis_name in (None, ()) else lax.axis_size(axis_name)


def offset(axis_name: AxisName, num_classes: int) -> Array | int:
    """The first class on this device, if each has `num_classes`."""
    return 0 if axis_name in (None, ()) else lax.axis_index(axis_name) * num_classes


def total(axis_name: AxisName, x: Array) -> Array:
    """The sum over the devices."""
    return x if axis_name is None else lax.psum(x, axis_name)


def largest(axis_name: AxisName, x: Array) -> Array:
    """The maximum over the devices. JAX differentiates it as a constant."""
    x = lax.stop_gradient(x)  # `lax.pmax` has no derivative
    return x if axis_name is None else lax.pmax(x, axis_name)


def first_place(axis_name: AxisName, highest: Array, place: Array) -> Array:
    """The class of the largest logit of all devices (the first of equal ones). `highest` and `place` are
    the largest logit of each device and its class."""
    if axis_name is None:
        return place
    leads = highest == largest(axis_name, highest)
    return lax.pmin(jnp.where(leads, place, jnp.iinfo(place.dtype).max), axis_name)


def total_cotangent(axis_name: AxisName, cotangents: Any) -> Any:
    """Sum the cotangents of a rule's results over the devices, unless JAX does it."""
    return cotangents if _is_followed(axis_name) else lax.psum(cotangents, axis_name)


def divided_cotangent(axis_name: AxisName, cotangents: Any) -> Any:
    """Divide by the axis size if JAX does not sum: `total_cotangent` in a rule restores the
    cotangents."""
    if _is_followed(axis_name):
        return cotangents
    return jax.tree.map(lambda g: g / size(axis_name), cotangents)


def _is_followed(axis_name: AxisName) -> bool:
    return axis_name is None or bool(varying(lax.axis_index(axis_name)))


def whole_over(axis_name: AxisName, x: Array) -> tuple[str, ...]:
    """The axes of `axis_name` over which JAX knows `x` to be the same on all devices."""
    if axis_name is None or not _is_followed(axis_name):
        return ()
    return tuple(sorted(n for n in names(axis_name) - varying(x) if size(n) > 1))


def varying(x: Array) -> frozenset[str]:
    """The mesh axes over which JAX knows `x` to vary."""
    return jax.typeof(x).mat.varying


def vary(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(axes - varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_alike(*trees: Any, but: AxisName = None) -> Any:
    """Make all arrays vary over the axes that any of them varies over, except `but`."""
    axes = frozenset[str]().union(*(varying(x) for x in jax.tree.leaves(trees))) - names(but)
    return jax.tree.map(functools.partial(vary, axes=axes), trees)


def names(axis_name: AxisName) -> frozenset[str]:
    return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name or ())
