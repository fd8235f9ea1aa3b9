"""Classes split over a mesh axis, inside `jax.shard_map`: what crosses it, and what varies over it.

Each device holds as many classes as the others, in the order of the axis. Of a row only sums over its
classes and its largest logit cross. Where `axis_name` is None nothing is split and all here is identity.

JAX tracks which values vary over a mesh axis, and sums the cotangent of a value that does not where it
meets one that does. So a value that all devices share is made to vary before a rule, and its gradient
is summed once, outside. With `check_vma=False` JAX tracks nothing. Then a sum's result belongs to each
device by itself, and its cotangent is the sum of what the devices have (`total_cotangent`)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

AxisName = str | tuple[str, ...] | None


def size(axis_name: AxisName) -> int:
    """Over how many devices the classes are split."""
    return 1 if axis_name in (None, ()) else lax.axis_size(axis_name)


def offset(axis_name: AxisName, num_classes: int) -> Array | int:
    """The first class here, of `num_classes` on each device."""
    return 0 if axis_name in (None, ()) else lax.axis_index(axis_name) * num_classes


def total(axis_name: AxisName, x: Array) -> Array:
    """The sum over the devices."""
    return x if axis_name is None else lax.psum(x, axis_name)


def largest(axis_name: AxisName, x: Array) -> Array:
    """The maximum over the devices; a constant to JAX's differentiation."""
    x = lax.stop_gradient(x)  # `lax.pmax` has no derivative
    return x if axis_name is None else lax.pmax(x, axis_name)


def first_place(axis_name: AxisName, highest: Array, place: Array) -> Array:
    """Of the places of each device's largest logit, that of the largest of all, the first of several."""
    if axis_name is None:
        return place
    leads = highest == largest(axis_name, highest)
    return lax.pmin(jnp.where(leads, place, jnp.iinfo(place.dtype).max), axis_name)


def total_cotangent(axis_name: AxisName, cotangents: Any) -> Any:
    """The cotangents of a rule's results, summed over the devices if JAX does not do it."""
    return cotangents if _is_followed(axis_name) else lax.psum(cotangents, axis_name)


def divided_cotangent(axis_name: AxisName, cotangents: Any) -> Any:
    """Divide by the axis size, so that the rule's sum over the devices restores the cotangents."""
    if _is_followed(axis_name):
        return cotangents
    return jax.tree.map(lambda g: g / size(axis_name), cotangents)


def _is_followed(axis_name: AxisName) -> bool:
    return axis_name is None or bool(varying(lax.axis_index(axis_name)))


def whole_over(axis_name: AxisName, x: Array) -> tuple[str, ...]:
    """The axes over which JAX knows that all devices have the same `x`, though it should be split."""
    if axis_name is None or not _is_followed(axis_name):
        return ()
    return tuple(sorted(n for n in names(axis_name) - varying(x) if size(n) > 1))


def varying(x: Array) -> frozenset[str]:
    """The mesh axes over which JAX knows it to vary."""
    return jax.typeof(x).mat.varying


def vary(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(axes - varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_alike(*trees: Any, but: AxisName = None) -> Any:
    """Made to vary over all axes, `but` aside, that any of them varies over."""
    axes = frozenset[str]().union(*(varying(x) for x in jax.tree.leaves(trees))) - names(but)
    return jax.tree.map(functools.partial(vary, axes=axes), trees)


def names(axis_name: AxisName) -> frozenset[str]:
    return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name or ())
