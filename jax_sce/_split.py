"""The statistics of rows whose classes are split over the devices of a mesh axis. All that crosses is
one maximum and one sum, in the forward pass."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from . import _axis
from ._axis import AxisName
from ._elementary import exp_difference
from ._rows import Rows, Targets


def whole_label_statistics(
    rows: Rows, labels: Array, axis_name: AxisName, local: Callable[..., tuple[Array, ...]]
) -> tuple[Array, ...]:
    """`label_statistics` of whole rows, given the function `local` for the classes on this device."""
    highest, tail, at_label, *kept = local(rows, labels)
    if axis_name is None:
        return highest, tail, at_label, *kept
    places = rows.places(labels)
    is_here = (places >= 0) & (places < rows.num_classes)
    whole = _axis.largest(axis_name, highest)
    return _total(axis_name, highest, tail, whole, jnp.where(is_here, at_label, 0), *kept)


def whole_target_statistics(
    rows: Rows, targets: Targets, axis_name: AxisName, local: Callable[..., tuple[Array, ...]]
) -> tuple[Array, ...]:
    """`target_statistics` of whole rows, likewise."""
    highest, tail, target_sum, target_dot, *kept = local(rows, targets)
    if axis_name is None:
        return highest, tail, target_sum, target_dot, *kept
    whole = _axis.largest(axis_name, highest)
    is_absent = (target_sum == 0) & jnp.isneginf(highest)
    distance = jnp.where(is_absent | (highest == whole), 0, highest - whole)
    target_dot += target_sum * distance
    return _total(axis_name, highest, tail, whole, target_sum, target_dot, *kept)


def _total(
    axis_name: AxisName, highest: Array, tail: Array, whole: Array, *sums: Array
) -> tuple[Array, ...]:
    """The maximum and the tail of whole rows, and the sums over the devices; `whole` is the maximum of
    all."""
    # Classes that are all absent here are none, not a row of its own.
    tail = jnp.where(jnp.isneginf(highest), -1, tail)
    leads = highest == whole
    tail = jnp.where(leads, tail, (1 + tail) * exp_difference(highest, whole))
    crossing = jnp.stack([tail, leads.astype(tail.dtype), *sums])
    tail, leaders, *totals = _axis.total(axis_name, crossing)
    # The one is left out of the first leader alone. NaN if the maximum is infinite.
    return whole, tail + (leaders - 1) + (whole - whole), *totals
