"""Targets on K classes of each row: the loss and derivatives of `jax_sce.Sparse`.

The loss needs the same row statistics as class ids or smoothing, and the K logits, which are gathered.
For the cotangent, the row operation computes all elements as if none had a target. Then K of them are
overwritten. There is never an array of targets of the logits' size."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _axis, _backend, _layout, _rows
from ._elementary import below
from ._rows import Rows, Statistics, Targets
from ._rules import Factors, Forward, Kind, Residuals, costs, statistics, target_factors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseTargets:
    ids: Array  # int32, [N, K]: classes, with -1 for a bad id and V for padding
    values: Array  # [N, K], the targets of these classes
    uniform: Targets | None  # the targets that smoothing adds to every class


class _Numbers(NamedTuple):
    """Residuals besides the statistics."""

    target_sum: Array  # [N...], the sum of all targets of a row
    here: Array  # bool, [N, K]: is the class on this device, and not masked?
    mass: Array  # [N, K], the targets, 0 for classes that are not here
    distance: Array  # [N, K], `z - max`
    logits: Array  # [N, K], as they are stored


def _pick(rows: Rows, ids: Array) -> tuple[Array, Array]:
    return rows.pick(rows.logits, ids), rows.has(ids)


class _Sparse(Kind):
    def forward(self, rows, targets, counts):
        if targets.uniform is None:
            operation, labels = _backend.label_statistics, _no_labels(rows)
        else:
            operation, labels = _backend.target_statistics, targets.uniform
        counts, kept, (highest, tail, *sums) = statistics(operation, rows, labels, counts)
        stats, ids = Statistics(highest, tail), targets.ids
        logits, here = _backend.laid_out(rows, _pick, lambda _, of_row: (of_row,) * 2)(rows, ids)
        distance = below(rows.of_raw(rows.raw(logits)), rows.expand(highest))
        mass = jnp.where(here, targets.values, 0)
        dot = mass * jnp.where(mass == 0, 0, distance)
        is_bad = (ids == -1).astype(mass.dtype)
        own = [_rows.sum_classes(rows, x).squeeze(rows.axes) for x in (mass, dot, is_bad)]
        target_sum, target_dot, bad = _axis.total(rows.axis_name, jnp.stack(own))
        if targets.uniform is not None:
            target_sum, target_dot = target_sum + sums[0], target_dot + sums[1]
        target_sum = jnp.where(bad > 0, jnp.nan, target_sum)
        loss = stats.target_loss(target_sum, target_dot)
        numbers = _Numbers(target_sum, here, mass, distance, logits)
        return Forward(loss, stats, numbers, counts, kept)

    def vjp(self, residuals, factors):
        rows, targets, numbers = residuals.rows, residuals.targets, residuals.numbers
        of_row = _factors(residuals, factors)
        of_rows = _elsewhere(residuals, of_row, _backend.label_cotangent, _backend.target_cotangent)
        # Treat the K logits of a row as a row of their own.
        own = dataclasses.replace(rows, logits=numbers.logits, mask=None, first_class=None)
        once, of_values = _at(residuals, of_row)
        (of_logits, *_) = _rows.cotangent_of(own, of_values)
        put = _backend.laid_out(rows, Rows.put, lambda of_logits, _: of_logits)
        logits = put(rows, of_rows.logits, once, of_logits)
        # The row operation computed the cotangents of soft-cap and temperature as if no class had a
        # target. A target adds `-g_loss * mass` times the derivative of its logit.
        g_mass = jnp.where(of_row.g_loss == 0, 0, -of_row.g_loss * numbers.mass)
        (_, *taken) = _rows.cotangent_of(own, g_mass)
        softcap, temperature = _rows.of_row(own, taken)
        if softcap is not None:
            of_rows = dataclasses.replace(of_rows, softcap=of_rows.softcap + softcap)
        if temperature is not None:
            of_rows = dataclasses.replace(of_rows, temperature=of_rows.temperature + temperature)
        of_uniform = targets.uniform
        if of_uniform is not None:
            of_values = costs(residuals, of_uniform, factors.g_loss)
            of_uniform = _rows.targets_cotangent(rows, of_uniform, of_values)
        of_mass = _costs(residuals, factors.g_loss)
        of_targets = SparseTargets(None, of_mass, of_uniform)  # type: ignore[arg-type]
        return dataclasses.replace(of_rows, logits=logits), of_targets

    def vjp_of_values(self, residuals, factors):
        of_row = _factors(residuals, factors)
        of_values = _elsewhere(
            residuals, of_row, _rows.label_cotangent_of_values, _rows.target_cotangent_of_values,
            subtract=below)  # fmt: skip
        return residuals.rows.put(of_values, *_at(residuals, of_row))

    def targets_jvp(self, residuals, g_loss, moving):
        rows, uniform = residuals.rows, residuals.targets.uniform

        def sum_along(of_values: Array, values: Callable) -> Array:
            dot = _rows.tangent_of(values, (residuals.targets,), {0: moving[1]})
            return _rows.sum_classes(rows, of_values * dot)

        total = sum_along(_costs(residuals, g_loss), lambda targets: targets.values)
        if uniform is None:
            return total
        of_values = costs(residuals, uniform, g_loss)
        return total + sum_along(of_values, lambda targets: targets.uniform.values(rows))


def _no_labels(rows: Rows) -> Array:
    return jnp.full(rows.row_shape, -1, jnp.int32)


def _factors(residuals: Residuals, factors: Factors) -> Factors:
    """`target_factors` for these targets, [N, 1] each."""
    return target_factors(residuals, factors, residuals.stats.tail + residuals.numbers.target_sum)


def _elsewhere(
    residuals: Residuals, factors: Factors, label_cotangent: Callable, target_cotangent: Callable,
    **how: Callable,
) -> Any:  # fmt: skip
    """The cotangent of all classes as if none had a target of its own. With smoothing `target_cotangent`
    computes it, otherwise `label_cotangent`."""
    rows, uniform = residuals.rows, residuals.targets.uniform
    highest, tail, target_sum = map(rows.expand, (*residuals.stats, residuals.numbers.target_sum))
    if uniform is not None:
        return target_cotangent(rows, uniform, highest, tail, target_sum, *factors, **how)
    g_loss, constant, slope = factors

    def over_sum(x: Array) -> Array:
        """`x / (1 + tail)`, but 0 stays 0: a row that does not count is 0 even if its tail is NaN."""
        return jnp.where(x == 0, 0, x / (1 + tail))

    of_softmax = jnp.where(g_loss == 0, 0, g_loss * target_sum) + constant
    slope = None if slope is None else over_sum(slope)
    labels, nothing = _no_labels(rows), jnp.zeros_like(tail)
    return label_cotangent(rows, labels, highest, nothing, over_sum(of_softmax), slope, **how)


def _merged(ids: Array, mass: Array) -> tuple[Array, Array]:
    """For each id, [N..., K]: whether it is the first occurrence of its class, and the total mass of the
    class. At most 4096 pairs per example are compared at a time."""
    count = ids.shape[-1]
    width = min(max(4096 // count, 1), count)
    place = lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)

    def add(carry: tuple[Array, Array], part: Array) -> tuple[tuple[Array, Array], None]:
        (first, total), start = carry, jnp.minimum(part * width, count - width)
        others, its_mass, its_place = (
            lax.dynamic_slice_in_dim(x, start, width, axis=-1)[..., None, :]
            for x in (ids, mass, place)
        )
        same = (ids[..., None] == others) & (its_place >= part * width)  # the last part overlaps
        first = jnp.minimum(first, jnp.min(jnp.where(same, its_place, count), axis=-1))
        return (first, total + jnp.sum(jnp.where(same, its_mass, 0), axis=-1)), None

    none = _axis.vary_alike((jnp.full_like(place, count), jnp.zeros_like(mass)), ids, mass)[0]
    parts = jnp.arange(-(-count // width), dtype=jnp.int32)
    (first, total), _ = lax.scan(add, none, parts)
    return first == place, total


def _at(residuals: Residuals, factors: Factors) -> tuple[Array, Array]:
    """The classes, [N, K], each once, and the cotangents of their values, [N, K]. Repetitions, and
    classes that are masked or not on this device, get distinct ids after the last class."""
    rows, targets, _, stats, numbers, _ = residuals
    ids, here, mass = map(rows.squeeze_last, (targets.ids, numbers.here, numbers.mass))
    is_first, total = _merged(ids, mass)
    behind = rows.num_classes * _axis.size(rows.axis_name)
    nowhere = behind + lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)
    once, total = map(rows.expand_last, (jnp.where(here & is_first, ids, nowhere), total))
    if targets.uniform is not None:
        total += jnp.where(numbers.here, _uniform_at(rows, targets.ids, targets.uniform), 0)
    tail, target_sum = map(rows.expand, (stats.tail, numbers.target_sum))
    return once, _rows.target_cotangent_at(total, numbers.distance, tail, target_sum, *factors)


def _uniform_at(rows: Rows, ids: Array, uniform: Targets) -> Array:
    """The targets that smoothing adds to these classes, [N, K]."""
    share = uniform.label_smoothing * uniform.uniform  # type: ignore[operator]
    if uniform.class_weights is None:
        return share
    weights = _layout.classes_last(rows, uniform.class_weights).reshape(-1)
    return share * weights[jnp.clip(rows.places(ids), 0, rows.num_classes - 1)]


def _costs(residuals: Residuals, g_loss: Array) -> Array:
    """The cotangent of the K targets, [N, K]."""
    rows, numbers, counts = residuals.rows, residuals.numbers, residuals.counts
    of_each = _rows.costs_at(numbers.distance, *map(rows.expand, (residuals.stats.tail, g_loss)))
    counts = None if counts is None else rows.expand(counts)
    return jnp.where(numbers.here, _rows.counted(counts, of_each, of_each), 0)


SPARSE = _Sparse()
