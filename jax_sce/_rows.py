"""The mathematics: the statistics of a row of logits, and every derivative that follows from them.

A row is the logits of one example. A softmax cross-entropy needs only two numbers from it:

    max  = max_j z_j
    tail = sum_j e^{z_j - max} - 1        summed without the maximum's own 1: see below

With them `S = 1 + tail` is the normalizer, `log S = log1p(tail)`, and

    loss            E = sum_j y_j (max - z_j) + sum(y) log1p(tail)
    log-normalizer  L = max + log1p(tail)
    softmax         o_j = e^{z_j - max} / S

Shapes: every array here has the rank of the logits and broadcasts to them. `[N, V]` stands for the
logits' shape, with the classes on any axes; `[N, 1]` stands for the same with 1 on the class axes. So
nothing is transposed, and batching under `jax.vmap` only adds an axis in front of every array.

One pass: `(max, tail)` is a commutative monoid, and `merge` is its reduction operator: `lax.reduce` with
it reads the logits once. It carries `(max, others)`. `others` is the sum of `e^{z_j - R}` over all
classes but one at the maximum, where the reference `R(max)` is the multiple of 4 below the maximum. Two
references are equal or differ by at least 4, and their difference is exact. So a merge either rescales
nothing, or shrinks what it rescales by e^-4 or more: rounding errors of rescaling do not pile up,
whatever the order of the classes. `whole_statistics` merges the parts of rows that devices split.

Accuracy: `L - z_y` and `o_y - 1` cancel when the label's logit is the largest, which is the goal of
training. Nothing here cancels:

* `tail` is a sum of positive terms. The term of the maximum, which is 1, is left out. It is not added
  and then subtracted, so a confident row with a tail of 1e-20 keeps all its digits.
* With an integer label at distance `d = z_y - max <= 0` the loss is `log1p(tail) - d`, a sum of two
  terms that are not negative.
* The label's gradient is `o_y - 1 = -(S - e^d) / S`. The sum over the other classes, `S - e^d`, is
  computed as `tail - expm1(d)`: again two terms that are not negative.

Relative error bounds, with the unit roundoff u (2^-24 in float32), for sums in pairs or blocks:

* The loss is within 16u. For a distribution that is not one-hot, this is relative to
  `sum_j |y_j| (max - z_j) + |sum(y)| log1p(tail)`. `L` is within 2^-22 of `max(1, |L|)`.
* An element of the gradient has the rounding error of its own distance and about six more: it is
  within `(6 + |z_j - max|) 2^-22` in float32. If the targets are not one-hot, the element may cross
  zero, and the bound is relative to `o_j |sum(y)| + |y_j|`. Rounding to 16 bits adds one more error.
* Terms below the smallest normal number, 2^-126, may be lost. With a soft-cap, the bounds hold for the
  rounded capped logits.
* If the same program computes the logits, `loss(x * t)`, XLA may fuse the product and skip its rounding
  where the maximum is subtracted. `below` takes the minimum of logit and maximum first. So the label's
  distance is exact, and others are off by at most half a unit in the last place of the maximum.

References: the derivative is that of Bridle (1990), "Probabilistic interpretation of feedforward
classification network outputs"; `merge` is the online normalizer of Milakov and Gimelshein (2018),
arXiv:1805.02867, with the maximum's own term left out and references on a grid."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _axis
from ._axis import AxisName
from ._elementary import below, exp_below, exp_difference, soft_cap, temper, weigh

STATIC = {"static": True}  # metadata of a dataclass field that is part of the pytree's structure


def compute_dtype(dtype: Any) -> jnp.dtype:
    """float64 for float64, else float32: 16-bit types are only for storage."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The logits as the caller passed them. Residuals hold these, and no computed array of their
    size."""

    logits: Array  # [N, V]
    axes: tuple[int, ...] = dataclasses.field(metadata=STATIC)  # of the classes, negative
    mask: Array | None = None  # bool, broadcasts to [N, V]: the classes to keep
    softcap: Array | None = None  # [1, 1]
    temperature: Array | None = None  # [N, 1]
    first_class: Array | None = None  # int32, [1, 1]: the first class here, if devices split them
    axis_name: AxisName = dataclasses.field(default=None, metadata=STATIC)  # mesh axis of classes

    @property
    def num_classes(self) -> int:
        return math.prod(self.logits.shape[axis] for axis in self.axes)

    @property
    def dtype(self) -> jnp.dtype:
        return compute_dtype(self.logits.dtype)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """[N, 1]."""
        ndim = self.logits.ndim
        return tuple(1 if a - ndim in self.axes else n for a, n in enumerate(self.logits.shape))

    def expand(self, x: Array) -> Array:
        """[N...] as [N, 1]."""
        return jnp.expand_dims(x, self.axes)

    def expand_last(self, x: Array) -> Array:
        """[N..., K] as [N, K]: K on the last class axis."""
        shape = list(self.row_shape)
        shape[self.axes[-1]] = x.shape[-1]
        return jax.vmap(self.expand, -1, self.axes[-1])(x).reshape(shape)

    def squeeze_last(self, x: Array) -> Array:
        """[N, K] as [N..., K]."""
        x = jnp.moveaxis(x, self.axes, range(-len(self.axes), 0))
        return x.reshape(*x.shape[: -len(self.axes)], x.shape[-1])

    def expand_classes(self, x: Array) -> Array:
        """Broadcast only the class axes: an array that all rows share stays small."""
        shape, ndim = self.logits.shape, self.logits.ndim
        sizes = [shape[a] if a - ndim in self.axes else n for a, n in enumerate(x.shape)]
        return jnp.broadcast_to(x, sizes)

    def classes(self) -> Array:
        """The class ids, int32, [1, V]."""
        ids, stride = jnp.int32(0), 1
        for axis in reversed(self.axes):
            shape = [1] * self.logits.ndim
            shape[axis] = self.logits.shape[axis]
            ids += lax.broadcasted_iota(jnp.int32, shape, axis % self.logits.ndim) * stride
            stride *= shape[axis]
        return ids if self.first_class is None else ids + self.first_class

    def places(self, labels: Array) -> Array:
        """The class ids, minus the first class on this device."""
        return labels if self.first_class is None else labels - self.first_class

    def values(self) -> Array:
        """The logits that the loss sees, [N, V]: capped, tempered, and -inf where masked."""
        # A masked logit may be NaN. Make it 0 first, or the NaN would enter derivatives as 0 times NaN.
        return self.masked(self.of_raw(self.masked(self.logits.astype(self.dtype), 0)))

    def masked(self, x: Array, fill: float = -jnp.inf) -> Array:
        return x if self.mask is None else jnp.where(self.mask, x, fill)

    @property
    def is_raw(self) -> bool:
        """Are the values the stored logits, apart from the mask and the dtype?"""
        return self.softcap is None and self.temperature is None

    def raw(self, x: Array) -> Array:
        """Widen stored logits. With a soft-cap, raise -inf to the lowest finite number, because -inf
        marks masked logits."""
        x = x.astype(self.dtype)
        return x if self.softcap is None else jnp.maximum(x, jnp.finfo(x.dtype).min)

    def of_raw(self, x: Array) -> Array:
        """Apply the soft-cap, then the temperature."""
        if self.softcap is not None:
            x = soft_cap(x, self.softcap.astype(x.dtype))
        return x if self.temperature is None else temper(x, self.temperature.astype(x.dtype))

    def at(self, labels: Array) -> Array:
        """The raw logits at class ids [N, K]. With a mask, -inf if the class is masked or not on this
        device. Without one, arbitrary if it is not on this device."""
        picked = self.raw(self.pick(self.logits, labels))
        return picked if self.mask is None else jnp.where(self.has(labels), picked, -jnp.inf)

    def has(self, labels: Array) -> Array:
        """bool, [N, K]: is the class on this device, and not masked?"""
        places = self.places(labels)
        has = (places >= 0) & (places < self.num_classes)
        if self.mask is None:
            return has
        return has & self.pick(jnp.broadcast_to(self.mask, self.logits.shape), labels)

    def pick(self, x: Array, labels: Array) -> Array:
        """`x` [N, V] at class ids [N, K], with K on the last class axis. Arbitrary for classes that are
        not on this device."""
        places = self.places(labels)
        if len(self.axes) == 1:
            return jnp.take_along_axis(x, places, self.axes[0], mode="clip")
        return x.at[self._index(places)].get(mode="clip")

    def put(self, x: Array, labels: Array, new: Array) -> Array:
        """`x` [N, V] with `new` [N, K] at class ids [N, K], all different. Ids after the last class are
        dropped; the others must be on this device."""
        index = self._index(self.places(labels))
        return x.at[index].set(new, mode="drop", unique_indices=True)

    def _index(self, places: Array) -> tuple[Array, ...]:
        """The index on each axis, out of range for a place that is not a class."""
        shape = places.shape
        index = [lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(len(shape))]
        first, *others = self.axes
        for axis in reversed(others):
            places, index[axis] = jnp.divmod(places, jnp.int32(self.logits.shape[axis]))
        index[first] = places
        return tuple(index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """Labels as distributions, `w_c ((1 - e) y_c + e / V)`, where y is one-hot at `ids`, or `dense`, or
    0 if both are None."""

    ids: Array | None  # class ids, int32, [N, 1], with -1 for a bad one
    dense: Array | None  # [N, V], floats, or integers and bools of one-hot rows
    label_smoothing: Array | None  # e, [1, 1]
    uniform: Array  # [N, 1] or [1, 1]: 1 / V, where V counts the kept classes on all devices
    class_weights: Array | None  # [1, V]

    def values(self, rows: Rows) -> Array:
        """[N, V]. Targets on masked classes are 0; a class id of -1 makes its row NaN."""
        if self.ids is not None:
            hot = jnp.equal(rows.classes(), self.ids).astype(rows.dtype)
            targets = jnp.where(self.ids < 0, jnp.nan, hot)
        elif self.dense is not None:
            targets = rows.masked(self.dense.astype(rows.dtype), 0)
        else:
            targets = jnp.zeros((), rows.dtype)
        if self.label_smoothing is not None:
            uniform = rows.masked(self.uniform, 0)
            targets = (1 - self.label_smoothing) * targets + self.label_smoothing * uniform
        if self.class_weights is not None:
            targets = weigh(targets, self.class_weights)
        return jnp.broadcast_to(targets, rows.logits.shape)


class Statistics(NamedTuple):
    """The statistics of each row, both of the same shape. The sum of exponentials is
    `(1 + tail) e^max`."""

    max: Array
    tail: Array

    def log_normalizer(self) -> Array:
        return self.max + jnp.log1p(self.tail)

    def label_loss(self, label_distance: Array) -> Array:
        """`-log o_y`, given the label's distance `z_y - max`."""
        return jnp.log1p(self.tail) - label_distance

    def target_loss(self, target_sum: Array, target_dot: Array) -> Array:
        """`-sum_j y_j log o_j`, given the sums of `y` and of `y (z - max)`."""
        return target_sum * jnp.log1p(self.tail) - target_dot

    def entropy(self, spread: Array) -> Array:
        """`-sum_j o_j log o_j`, given the sum of `e^{z - max} (z - max)`."""
        return jnp.log1p(self.tail) - spread / (1 + self.tail)

    def label_factors(
        self, label_distance: Array, g_loss: Array, constant: Array, slope: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """The factors that make `label_cotangent` compute
        `g_loss (o - y) + (constant + slope (z - max)) o` for one-hot y."""
        others = self.tail - jnp.expm1(label_distance)
        normalizer = others + jnp.exp(label_distance)  # NaN, for the whole row, if the label is bad
        of_softmax = affine(constant, slope, label_distance)
        at_label = (of_softmax * jnp.exp(label_distance) - g_loss * others) / normalizer
        slope = None if slope is None else slope / normalizer
        return at_label, (g_loss + constant) / normalizer, slope


# -- the reduction ------------------------------------------------------------------------------------


def reference(x: Array) -> Array:
    """The multiple of 4 below `x`, at least the lowest finite number."""
    return 4 * jnp.floor(jnp.maximum(x, jnp.finfo(x.dtype).min) * 0.25)


def merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """`(max, others)` of the union of two sets of classes; `(-inf, 0)` is the empty set."""
    (max_a, others_a), (max_b, others_b) = a, b
    high, low = jnp.maximum(max_a, max_b), jnp.minimum(max_a, max_b)
    a_leads = max_a >= max_b
    of_high = jnp.where(a_leads, others_a, others_b)
    of_low = jnp.where(a_leads, others_b, others_a)
    of_low += jnp.exp(low - reference(low))  # the lower maximum joins the others
    return high, of_high + of_low * jnp.exp(reference(low) - reference(high))


def _merge_labels(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """`merge`, and the maximum of each further operand."""
    return *merge(a[:2], b[:2]), *map(jnp.maximum, a[2:], b[2:])


def _merge_targets(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """`_merge_labels`, and the sums of `y` and of `y (z - max)`, updated when the maximum moves."""
    (max_a, others_a, sum_a, dot_a, *more_a), (max_b, others_b, sum_b, dot_b, *more_b) = a, b
    high, *others = _merge_labels((max_a, others_a, *more_a), (max_b, others_b, *more_b))
    low, sum_low = jnp.minimum(max_a, max_b), jnp.where(max_a < max_b, sum_a, sum_b)
    # An absent class (-inf) whose target is 0 adds nothing, and -inf is not below -inf.
    moved = jnp.where((sum_low == 0) | (low == high), 0, sum_low * (low - high))
    return high, others[0], sum_a + sum_b, dot_a + dot_b + moved, *others[1:]


def _reduce(rows: Rows, combiner: Callable, *further: tuple[Array, float]) -> list[Array]:
    """`(max, tail)`, the reductions of `further`, and with a mask whether the row keeps a class, [N, 1]
    each, in one pass. `further` are more operands, each with its neutral element."""
    z = rows.values()
    operands = [(z, -jnp.inf), (jnp.zeros_like(z), 0.0), *further]
    if rows.mask is not None:
        operands.append((jnp.broadcast_to(rows.mask, z.shape).astype(z.dtype), 0.0))
    neutral = tuple(z.dtype.type(x) for _, x in operands)
    axes = sorted(axis % z.ndim for axis in rows.axes)
    out = lax.reduce(tuple(x for x, _ in operands), neutral, combiner, axes)
    highest, others, *rest = (jnp.expand_dims(x, axes) for x in out)
    tail = others * jnp.exp(reference(highest) - highest)
    return [highest, tail + (highest - highest), *rest]  # NaN if the maximum is infinite


def is_minor(rows: Rows) -> bool:
    """Do the classes lie on the last axes, in order?"""
    return rows.axes == tuple(range(-len(rows.axes), 0))


# -- the row operations -------------------------------------------------------------------------------
# A backend may replace these. Labels are class ids, int32, [N, 1]. With a mask, the statistics end with
# one more array: 1.0 for rows that keep a class, 0.0 for the others.


def label_statistics(rows: Rows, labels: Array) -> tuple[Array, ...]:
    """The maximum, the tail, and the logit at the label, [N, 1] each. The last is arbitrary if the label
    is not a class."""
    if not is_minor(rows):
        # XLA for GPU fuses at most two operands into a reduction over an axis that is not the last.
        highest, tail = _reduce(rows, _merge_labels)[:2]
        return highest, tail, value_at(rows, rows.at(labels), highest, None), *keeps_class(rows)
    # Use raw logits: if the values had two readers, XLA would compute them twice or write them.
    z = rows.masked(rows.raw(rows.logits))
    hot = (jnp.where(rows.classes() == labels, z, -jnp.inf), -jnp.inf)
    top = () if rows.is_raw else ((z, -jnp.inf),)
    highest, tail, at_label, *more = _reduce(rows, _merge_labels, hot, *top)
    largest = more.pop(0) if top else None
    return highest, tail, value_at(rows, at_label, highest, largest), *more


def value_at(rows: Rows, raw: Array, highest: Array, largest: Array | None) -> Array:
    """The value of a raw logit. A compiler may round the same soft-cap differently in two places. So cut
    the value off at the maximum, and set it to the maximum if the raw logit is the largest."""
    value = raw
    if not rows.is_raw:
        value = jnp.where(jnp.isneginf(raw), -jnp.inf, rows.of_raw(raw))
    value = jnp.minimum(value, highest)
    return value if largest is None else jnp.where(raw == largest, highest, value)


def label_sums(rows: Rows, labels: Array, highest: Array) -> tuple[Array, Array]:
    """The tail, up to an additive constant, and the logit at the label, given the maximum."""
    at_label = jnp.where(rows.classes() == labels, rows.values(), 0)
    return _sum_exponentials(rows, highest), sum_classes(rows, at_label)


def label_cotangent(rows: Rows, *args: Array) -> list[Array]:
    """The cotangent of `rows`: `at_label` at the label, `(elsewhere + slope (z - max)) e^{z - max}`
    elsewhere. The slope may be None. If the factors are 0 the row is 0, whatever its logits hold."""
    rows = lax.optimization_barrier(rows)
    return cotangent_of(rows, label_cotangent_of_values(rows, *args))


def label_cotangent_of_values(
    rows: Rows, labels: Array, highest: Array, at_label: Array, elsewhere: Array,
    slope: Array | None, *, subtract: Callable = jnp.subtract,
) -> Array:  # fmt: skip
    """The cotangent of `rows.values()`, [N, V]. If there is no barrier before it, `subtract` must be
    `below`."""
    distance = subtract(rows.values(), highest)
    is_lost = (elsewhere == 0) & ~jnp.isfinite(highest)  # then `at_label` is 0, too
    of_others = affine(elsewhere, slope, distance) * jnp.exp(distance)
    return jnp.where((rows.classes() == labels) | is_lost, at_label, of_others)


def affine(constant: Array, slope: Array | None, distance: Array) -> Array:
    """`constant + slope * distance`; only the constant if there is no slope or the class is absent."""
    if slope is None:
        return constant
    return constant + slope * jnp.where(jnp.isneginf(distance), 0, distance)


def target_statistics(rows: Rows, targets: Targets) -> tuple[Array, ...]:
    """The maximum, the tail, and the sums of `y` and of `y (z - max)`, [N, 1] each."""
    if not is_minor(rows):
        highest, tail = _reduce(rows, _merge_labels)[:2]
        return highest, tail, *target_sums(rows, targets, highest)[1:], *keeps_class(rows)
    y = targets.values(rows)
    return tuple(_reduce(rows, _merge_targets, (y, 0.0), (jnp.zeros_like(y), 0.0)))


def target_sums(rows: Rows, targets: Targets, highest: Array) -> tuple[Array, Array, Array]:
    """The tail, up to an additive constant, and the sums of `y` and `y (z - max)`, given the maximum."""
    y, z = targets.values(rows), rows.values()
    # An absent class (-inf) whose target is 0 adds nothing, and -inf is not below -inf.
    is_nothing = jnp.isneginf(z) & ((y == 0) | jnp.isneginf(highest))
    dot = y * jnp.where(is_nothing, 0, below(z, highest))
    return _sum_exponentials(rows, highest), sum_classes(rows, y), sum_classes(rows, dot)


def target_cotangent(rows: Rows, targets: Targets, *args: Array) -> list[Array]:
    """The cotangent of `rows`, `g_loss (o sum(y) - y) + (constant + slope (z - max)) o`. The slope may
    be None. If all factors are 0 the row is 0, whatever its logits hold."""
    rows, targets = lax.optimization_barrier((rows, targets))
    return cotangent_of(rows, target_cotangent_of_values(rows, targets, *args))


def target_cotangent_of_values(
    rows: Rows, targets: Targets, highest: Array, *args: Array, subtract: Callable = jnp.subtract
) -> Array:
    """The cotangent of `rows.values()`, [N, V]."""
    return target_cotangent_at(targets.values(rows), subtract(rows.values(), highest), *args)


def target_cotangent_at(
    y: Array, distance: Array, tail: Array, target_sum: Array, g_loss: Array, constant: Array,
    slope: Array | None,
) -> Array:  # fmt: skip
    """`target_cotangent_of_values`, given the targets `y` and the distances `z - max`."""
    exponentials, normalizer = jnp.exp(distance), 1 + tail
    # Near the maximum this form does not cancel:
    # o_j sum(y) - y_j = ((sum(y) - y_j) + sum(y) (e^d - 1) - y_j tail) / S
    near = ((target_sum - y) + target_sum * (exponentials - 1) - y * tail) / normalizer
    far = target_sum * exponentials / normalizer - y
    of_loss = g_loss * jnp.where(distance > -(2.0**-6), near, far)
    is_lost = (g_loss == 0) & (constant == 0) & ~jnp.isfinite(tail + target_sum)
    of_softmax = affine(constant, slope, distance) * exponentials / normalizer
    return jnp.where(is_lost, 0, of_loss + of_softmax)


def spread(rows: Rows, highest: Array) -> tuple[Array]:
    """The sum of `e^{z - max} (z - max)`, [N, 1], for the entropy."""
    exponential, distance = exp_below(rows.values(), highest)
    return (sum_classes(rows, exponential * distance),)


def target_costs(rows: Rows, targets: Targets, highest: Array, tail: Array, g_loss: Array) -> Array:
    """`g_loss (-log o)`, the cotangent of `targets.values(rows)`, [N, V]."""
    distance = rows.masked(below(rows.values(), highest), 0)
    return rows.masked(costs_at(distance, tail, g_loss), 0)


def costs_at(distance: Array, tail: Array, g_loss: Array) -> Array:
    """`target_costs`, given the distances `z - max`."""
    cost = jnp.log1p(tail) - distance
    # The cost of an absent class is infinite, and 0 times that is NaN.
    unused = (g_loss == 0) & ~jnp.isfinite(cost)
    return g_loss * jnp.where(unused, 0, cost)


def whole_statistics(
    rows: Rows, labels: Array | Targets, axis_name: AxisName, local: Callable
) -> tuple[Array, ...]:
    """The statistics over the classes of all devices. `local` computes those of the classes on this
    device. The devices exchange one maximum and one sum. Labels are class ids, [N, 1], or `Targets`."""
    highest, tail, *sums = local(rows, labels)
    if axis_name is None:
        return highest, tail, *sums
    whole = _axis.largest(axis_name, highest)
    if isinstance(labels, Targets):  # the sums of y and y (z - max)
        is_absent = (sums[0] == 0) & jnp.isneginf(highest)
        sums[1] += sums[0] * jnp.where(is_absent | (highest == whole), 0, highest - whole)
    else:  # the logit at the label
        places = rows.places(labels)
        sums[0] = jnp.where((places >= 0) & (places < rows.num_classes), sums[0], 0)
    # If all classes on this device are absent, it contributes nothing: 1 + tail must be 0.
    tail = jnp.where(jnp.isneginf(highest), -1, tail)
    leads = highest == whole
    tail = jnp.where(leads, tail, (1 + tail) * exp_difference(highest, whole))
    crossing = jnp.stack([tail, leads.astype(tail.dtype), *sums])
    tail, leaders, *sums = _axis.total(axis_name, crossing)
    # Each device that holds the maximum left out a term of 1. Add these terms, except one of them. The
    # result is NaN if the maximum is infinite.
    return whole, tail + (leaders - 1) + (whole - whole), *sums


# -- pieces -------------------------------------------------------------------------------------------


def counted(counts: Array | None, x: Array, probe: Array) -> Array:
    """`x`, but exactly 0 in rows that do not count. Where `probe` is finite, `x` is kept: a weight of 0
    removes it already, and the derivative with respect to that weight needs it."""
    return x if counts is None else jnp.where(counts | jnp.isfinite(probe), x, 0)


def keeps_class(rows: Rows) -> tuple[Array, ...]:
    """With a mask, one array, [N, 1]: 1.0 for rows that keep a class, else 0.0. Without, none."""
    if rows.mask is None:
        return ()
    mask = jnp.broadcast_to(rows.mask, rows.logits.shape)
    return (jnp.any(mask, rows.axes, keepdims=True).astype(rows.dtype),)


def sum_classes(rows: Rows, x: Array) -> Array:
    return jnp.sum(x, axis=rows.axes, keepdims=True)


def _sum_exponentials(rows: Rows, highest: Array) -> Array:
    # All classes of a row on this device may be absent.
    is_empty = jnp.isneginf(highest)
    return sum_classes(rows, jnp.where(is_empty, 0, jnp.exp(below(rows.values(), highest))))


def cotangent_of(rows: Rows, of_values: Array) -> list[Array]:
    """Given the cotangent of `rows.values()`: the cotangent of the logits, [N, V] in their dtype, and of
    the soft-cap and the temperature, if any, [N, 1]."""
    of_row = {"softcap": rows.softcap, "temperature": rows.temperature}
    of_row = {k: jnp.broadcast_to(x, rows.row_shape) for k, x in of_row.items() if x is not None}

    def values(logits, of_row):
        return dataclasses.replace(rows, logits=logits, **of_row).values()

    out, vjp = jax.vjp(values, rows.logits, of_row)
    # If there are no rows, `jnp.where` of JAX 0.10 loses the mesh axes that they vary over.
    return jax.tree.leaves(vjp(_axis.vary(of_values, _axis.varying(out))))


def of_row(rows: Rows, cotangents: Sequence[Array]) -> list[Array | None]:
    """The cotangents of the soft-cap, [1, 1], and the temperature, [N, 1], from
    `cotangent_of(...)[1:]`."""
    rest = list(cotangents)
    softcap = None if rows.softcap is None else jnp.sum(rest.pop(0), keepdims=True)
    return [softcap, None if rows.temperature is None else rest.pop(0)]


def targets_cotangent(rows: Rows, targets: Targets, of_values: Array) -> Targets:
    """The cotangent of `targets`, given the cotangent of `targets.values(rows)`."""
    out, vjp = jax.vjp(lambda targets: targets.values(rows), targets)
    of_values = _axis.vary(of_values, _axis.varying(out))
    sharding = jax.typeof(out).sharding
    if sharding.mesh.explicit_axes:  # targets may have another sharding than the logits
        of_values = jax.sharding.reshard(of_values, sharding)
    return vjp(of_values)[0]


def moving(primals: tuple, dots: tuple) -> dict[int, Any]:
    """For a JVP rule with `symbolic_zeros`: the tangents of the arguments that are differentiated, by
    position. The others are left out, because infinity times a tangent of 0 is NaN."""
    zero = jax.custom_derivatives.SymbolicZero

    def dense(dot, primal):
        if not isinstance(dot, zero):
            return dot
        return _axis.vary(jnp.zeros(dot.shape, dot.dtype), _axis.varying(primal))

    return {
        i: jax.tree.map(dense, dot, primal)
        for i, (primal, dot) in enumerate(zip(primals, dots, strict=True))
        if not all(isinstance(x, zero) for x in jax.tree.leaves(dot))
    }


def jvp_of(function: Callable, primals: tuple, moving: dict[int, Any]) -> tuple[Any, Any]:
    """`function(*primals)` and its tangent, given the tangents of some arguments, by position."""

    def of_moving(moved):
        return function(*(moved.get(i, x) for i, x in enumerate(primals)))

    return jax.jvp(of_moving, ({i: primals[i] for i in moving},), (moving,))


def tangent_of(function: Callable, primals: tuple, moving: dict[int, Any]) -> Any:
    return jvp_of(function, primals, moving)[1]


def statistics_tangents(
    sums: Callable, statistics: list[Array], primals: tuple, dots: tuple
) -> list[Array]:
    """The tangents of statistics. The results would be the same if another constant were subtracted in
    place of the maximum. So the maximum is treated as a constant, and the tail changes with every
    logit."""
    of_sums = tangent_of(lambda *args: sums(*args, statistics[0]), primals, moving(primals, dots))
    zeros = [jnp.zeros_like(x) for x in statistics]
    return [zeros[0], *of_sums, *zeros[1 + len(of_sums) :]]
