"""The mathematics: what is known of a row of logits, and every derivative that follows from it.

A row is the logits of one example. All that a softmax cross-entropy needs to know of it is

    max  = max_j z_j
    tail = sum_j e^{z_j - max} - 1        summed without the one: see below

for then `S = 1 + tail` is the normalizer, `log S = log1p(tail)`, and

    loss            E = sum_j y_j (max - z_j) + sum(y) log1p(tail)
    log-normalizer  L = max + log1p(tail)
    softmax         o_j = e^{z_j - max} / S

Shapes: every array here has the rank of the logits and broadcasts to them. `[N, V]` is the logits'
shape with the classes on any axes, `[N, 1]` the same with 1 on the class axes. So nothing is
transposed, and an axis that `jax.vmap` adds is one more in front of everything.

One pass
--------
`(max, tail)` is a commutative monoid, and `merge` is a reduction operator: `lax.reduce` with it reads
the logits once. What it carries is `(max, others)`: `others` is the sum of `e^{z_j - R}` over all
classes but one at the maximum, relative to `R(max)`, the multiple of 4 below the maximum. Two
references are equal or differ by 4 and more, and their difference is exact. So a merge either rescales
nothing, or shrinks what it rescales by e^-4: the roundings of rescaling do not pile up, in whatever
order the classes come.

The same merge serves a row in one go, in chunks, and over many devices (`_split.py`).

Accuracy
--------
`L - z_y` and `o_y - 1` cancel when the label's logit is the largest, which is what training strives
for. Nothing here cancels:

* `tail` is a sum of positive terms. The one of the maximum is left out, not added and subtracted again,
  so a confident row, whose tail is 1e-20, keeps all digits of it.
* With an integer label at distance `d = z_y - max <= 0` the loss is `log1p(tail) - d`: two terms that
  are not negative.
* The label's gradient `o_y - 1 = -(S - e^d) / S` takes the sum over the other classes as `tail -
  expm1(d)`, which again adds two terms that are not negative.

Let u be the unit roundoff, 2^-24 in float32. The loss is within 16u, 1e-6 in float32, with sums that
are pairwise or in blocks; for a distribution that is not one-hot, relative to `sum_j |y_j| (max - z_j)
+ |sum(y)| log1p(tail)`. An element of the gradient carries the rounding of its own distance, `|z_j -
max| u` relatively, and some six roundings more: within `(6 + |z_j - max|) 2^-22` in float32 for one-hot
targets; for others relative to `o_j |sum(y)| + |y_j|`, for there the gradient has a zero in between.
Rounding a cotangent to 16 bits comes on top, once. `L` is within 2^-22 of `max(1, |L|)`. Terms below
the smallest normal number, 2^-126, may be lost, and with a soft-cap the bounds hold for the capped
logits as they are rounded.

Logits that the same program computes, `loss(x * t)`, may be fused into the loss: then XLA may leave out
the rounding of `x * t` where the maximum is subtracted. `distances` takes the smaller of logit and
maximum first, which keeps the label's distance exact; other classes are off by up to half a unit in the
last place of the largest logit.

References: the derivative is that of Bridle (1990), "Probabilistic interpretation of feedforward
classification network outputs"; `merge` is the online normalizer of Milakov and Gimelshein (2018),
arXiv:1805.02867, with the maximum's own term left out and references on a grid."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _axis
from ._axis import AxisName
from ._elementary import below, soft_cap, weigh


def compute_dtype(dtype: Any) -> jnp.dtype:
    """float32, or float64 for float64: 16-bit types are only for storage."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "mask", "softcap", "first_class"],
    meta_fields=["axes", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Logits as the caller holds them. Residuals keep this, and nothing of its size that was
    computed."""

    logits: Array  # [N, V], any floating dtype
    mask: Array | None  # bool, broadcasts to [N, V]: the classes to keep
    softcap: Array | None  # [1, 1]
    first_class: (
        Array | None
    )  # int32, [1, 1], of those on this device, if they are split over devices
    axes: tuple[int, ...]  # the class axes, counted from the last: -1, ...
    axis_name: AxisName = None  # the mesh axis over which the classes are split

    @property
    def num_classes(self) -> int:
        return math.prod(self.logits.shape[axis] for axis in self.axes)

    @property
    def dtype(self) -> jnp.dtype:
        return compute_dtype(self.logits.dtype)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """[N, 1]."""
        shape = list(self.logits.shape)
        for axis in self.axes:
            shape[axis] = 1
        return tuple(shape)

    def expand(self, x: Array) -> Array:
        """[N...] as [N, 1]."""
        return jnp.expand_dims(x, self.axes)

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
        """Class ids as places among the classes on this device."""
        return labels if self.first_class is None else labels - self.first_class

    def values(self) -> Array:
        """The logits that the loss is of, [N, V]: widened, capped, and -inf where masked."""
        return self.masked(self.capped(self.masked(self.logits.astype(self.dtype), 0)))

    def uncapped(self, x: Array) -> Array:
        """Widen logits; with a soft-cap, raise -inf to the lowest finite number: -inf marks masked
        ones."""
        x = x.astype(self.dtype)
        return x if self.softcap is None else jnp.maximum(x, jnp.finfo(x.dtype).min)

    def masked(self, x: Array, fill: float = -jnp.inf) -> Array:
        # A masked logit may be NaN, whose derivative must not be reached: it is 0 before the cap.
        return x if self.mask is None else jnp.where(self.mask, x, fill)

    def capped(self, x: Array) -> Array:
        return x if self.softcap is None else soft_cap(x, self.softcap.astype(x.dtype))

    def at(self, labels: Array) -> Array:
        """One logit of each row, [N, 1], not capped, and -inf where masked; anything if it is not
        here."""
        places = jnp.broadcast_to(self.places(labels), self.row_shape)
        places = jnp.clip(places, 0, self.num_classes - 1)
        picked = self.uncapped(self._pick(self.logits, places))
        if self.mask is None:
            return picked
        mask = jnp.broadcast_to(self.mask, self.logits.shape)
        return jnp.where(self._pick(mask, places), picked, -jnp.inf)

    def _pick(self, x: Array, places: Array) -> Array:
        if len(self.axes) == 1:
            return jnp.take_along_axis(x, places, self.axes[0], mode="promise_in_bounds")
        index: dict[int, Array] = {}
        for axis in reversed(self.axes):
            places, index[axis] = jnp.divmod(places, jnp.int32(x.shape[axis]))
        for axis in set(range(-x.ndim, 0)) - set(self.axes):
            index[axis] = lax.broadcasted_iota(jnp.int32, self.row_shape, axis % x.ndim)
        return x.at[tuple(index[a] for a in range(-x.ndim, 0))].get(mode="promise_in_bounds")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["labels", "label_smoothing", "uniform", "class_weights"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Targets:
    """Labels as distributions: `w_c ((1 - e) y_c + e / V)`."""

    labels: (
        Array  # [N, V], floats (or integers and bools of one-hot rows); or class ids, int32, [N, 1]
    )
    label_smoothing: Array | None  # e, [1, 1]
    uniform: Array  # [N, 1] or [1, 1], one over the number of classes in the row, on all devices
    class_weights: Array | None  # [1, V]

    def values(self, rows: Rows) -> Array:
        """[N, V]. Targets on masked classes are 0; a class id of -1 makes its row NaN."""
        if self.has_ids(rows):
            hot = rows.classes() == self.labels
            targets = jnp.where(self.labels < 0, jnp.nan, hot.astype(rows.dtype))
        else:
            targets = rows.masked(self.labels.astype(rows.dtype), 0)
        if self.label_smoothing is not None:
            uniform = rows.masked(self.uniform, 0)
            targets = (1 - self.label_smoothing) * targets + self.label_smoothing * uniform
        return targets if self.class_weights is None else weigh(targets, self.class_weights)

    def has_ids(self, rows: Rows) -> bool:
        return jnp.issubdtype(self.labels.dtype, jnp.integer) and all(
            self.labels.shape[axis] == 1 for axis in rows.axes
        )


class Statistics(NamedTuple):
    """The sum of the exponentials of each row is `(1 + tail) e^max`; both [N, 1]."""

    max: Array
    tail: Array


# -- the reduction ------------------------------------------------------------------------------------


def reference(x: Array) -> Array:
    """The multiple of 4 below `x`, at least the lowest finite number."""
    return 4 * jnp.floor(jnp.maximum(x, jnp.finfo(x.dtype).min) * 0.25)


def merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """`(max, others)` of the union of two sets of classes; `(-inf, 0)` is the empty set."""
    (max_a, others_a), (max_b, others_b) = a, b
    high, low = jnp.maximum(max_a, max_b), jnp.minimum(max_a, max_b)
    a_leads = max_a >= max_b
    of_high, of_low = (
        jnp.where(a_leads, others_a, others_b),
        jnp.where(a_leads, others_b, others_a),
    )
    of_low += jnp.exp(low - reference(low))  # the lower maximum joins the others
    return high, of_high + of_low * jnp.exp(reference(low) - reference(high))


def _merge_labels(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """`merge`, and the largest of further numbers."""
    return *merge(a[:2], b[:2]), *map(jnp.maximum, a[2:], b[2:])


def _merge_targets(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """`merge`; the sums of `y` and of `y (z - max)`, rebased when the maximum moves; and the largest of
    further numbers."""
    (max_a, _, sum_a, dot_a, *more_a), (max_b, _, sum_b, dot_b, *more_b) = a, b
    high, others = merge(a[:2], b[:2])
    low, sum_low = jnp.minimum(max_a, max_b), jnp.where(max_a < max_b, sum_a, sum_b)
    # An absent class (-inf) whose target is 0 adds nothing, and -inf is not below -inf.
    moved = jnp.where((sum_low == 0) | (low == high), 0, sum_low * (low - high))
    more = map(jnp.maximum, more_a, more_b)
    return high, others, sum_a + sum_b, dot_a + dot_b + moved, *more


def _reduce(rows: Rows, combiner: Callable, *further: tuple[Array, float]) -> list[Array]:
    """`(max, tail)`, what the combiner makes of `further`, and with a mask whether it keeps a class,
    [N, 1] each, in one pass. `further` are more operands, each with its neutral element."""
    z = rows.values()
    kept = (
        () if rows.mask is None else ((jnp.broadcast_to(rows.mask, z.shape).astype(z.dtype), 0.0),)
    )
    operands = ((z, -jnp.inf), (jnp.zeros_like(z), 0.0), *further, *kept)
    neutral = tuple(z.dtype.type(x) for _, x in operands)
    axes = sorted(axis % z.ndim for axis in rows.axes)
    out = lax.reduce(tuple(x for x, _ in operands), neutral, combiner, axes)
    highest, others, *rest = (jnp.expand_dims(x, axes) for x in out)
    tail = others * jnp.exp(reference(highest) - highest)
    return [highest, tail + (highest - highest), *rest]  # NaN if the maximum is infinite


def is_minor(rows: Rows) -> bool:
    """Do the classes lie on the last axes, in order?"""
    return rows.axes == tuple(range(-len(rows.axes), 0))


# -- the row operations: integer labels ---------------------------------------------------------------
# A backend may compute these instead. Labels are class ids, int32, [N, 1]. With a mask, the statistics
# end with one more number: 1.0 for rows that keep a class, 0.0 for the others.


def with_tangents(tangents: Callable) -> Callable[[Callable], Callable]:
    """Give a function that returns statistics its derivative, `tangents(out, primals, dots)`."""

    def decorate(function):
        @jax.custom_jvp
        def statistics(*args):
            return function(*args)

        @functools.partial(statistics.defjvp, symbolic_zeros=True)
        def jvp(primals, dots):
            out = statistics(*primals)
            return out, tangents(out, primals, dots)

        return functools.wraps(function)(statistics)

    return decorate


def label_tangents(out: tuple[Array, ...], primals: tuple, dots: tuple) -> tuple[Array, ...]:
    """The tangents of `label_statistics`."""
    (rows, labels), (_, moving) = primals, moving_arguments(("rows",), primals[:1], dots[:1])
    # All that is made of the statistics would be the same for any other constant in place of `max`, so
    # `max` is held constant, and the tail moves with every logit, the largest included.
    zero, tail, at_label = (jnp.zeros_like(x) for x in out[:3])
    if moving:
        z_dot, tail = _tail_tangent(rows, moving["rows"], out[0])
        at_label = sum_classes(rows, jnp.where(rows.classes() == labels, z_dot, 0))
    return zero, tail, at_label, *map(jnp.zeros_like, out[3:])


def _tail_tangent(rows: Rows, rows_dot: Rows, highest: Array) -> tuple[Array, Array]:
    """The tangents of the values, [N, V], and of the tail."""
    z_dot = tangent_of(Rows.values, rows, rows_dot)
    # Of a row split over devices, the classes here may all be absent.
    exponentials = jnp.where(jnp.isneginf(highest), 0, jnp.exp(distances(rows, highest)))
    return z_dot, sum_classes(rows, exponentials * z_dot)


@with_tangents(label_tangents)
def label_statistics(rows: Rows, labels: Array) -> tuple[Array, ...]:
    """The maximum, the tail, and the logit at the label, [N, 1] each. Where the label is none of the
    classes, the last is anything."""
    if not is_minor(rows):
        # XLA for GPU fuses at most two operands into a reduction over an axis that is not the last.
        highest, tail = _reduce(rows, _merge_labels)[:2]
        return highest, tail, capped_at(rows, rows.at(labels), highest, None), *keeps_class(rows)
    # Not capped, so that XLA need not compute the cap for two readers, or write it to memory.
    z = rows.masked(rows.uncapped(rows.logits))
    hot = (jnp.where(rows.classes() == labels, z, -jnp.inf), -jnp.inf)
    top = () if rows.softcap is None else ((z, -jnp.inf),)
    highest, tail, at_label, *more = _reduce(rows, _merge_labels, hot, *top)
    uncapped = more.pop(0) if top else None
    return highest, tail, capped_at(rows, at_label, highest, uncapped), *more


def capped_at(rows: Rows, at_label: Array, highest: Array, uncapped: Array | None) -> Array:
    """The label's logit, never above the maximum, and equal to it if it is so before the soft-cap:
    a compiler may round the cap one way here and another way there."""
    capped = at_label
    if rows.softcap is not None:
        capped = jnp.where(jnp.isneginf(at_label), -jnp.inf, rows.capped(at_label))
    capped = jnp.minimum(capped, highest)
    return capped if uncapped is None else jnp.where(at_label == uncapped, highest, capped)


def label_cotangent(
    rows: Rows, labels: Array, highest: Array, at_label: Array, elsewhere: Array
) -> "Cotangent":
    """`at_label` at the label and `elsewhere * e^{z - max}` elsewhere, as the cotangent of `rows`. Two
    zeros make the row 0, whatever its logits hold."""
    rows = read_again(rows)
    return cotangent_of(rows, label_cotangent_of_values(rows, labels, highest, at_label, elsewhere))


def label_cotangent_of_values(
    rows: Rows,
    labels: Array,
    highest: Array,
    at_label: Array,
    elsewhere: Array,
    *,
    subtract: Callable = jnp.subtract,
) -> Array:
    """The same of `rows.values()`, [N, V]. Where no barrier lies before it, subtract by `below`."""
    exponentials = jnp.exp(subtract(rows.values(), highest))
    is_lost = (elsewhere == 0) & ~jnp.isfinite(highest)  # then `at_label` is 0, too
    return jnp.where((rows.classes() == labels) | is_lost, at_label, elsewhere * exponentials)


# -- the row operations: distributions ----------------------------------------------------------------


def target_tangents(out: tuple[Array, ...], primals: tuple, dots: tuple) -> tuple[Array, ...]:
    """The tangents of `target_statistics`."""
    highest, names = out[0], ("rows", "targets")
    at, moving = moving_arguments(names, primals, dots)

    def sums(moved):
        rows, targets = (moved.get(name, x) for name, x in zip(names, primals, strict=True))
        return target_sums(rows, targets, highest)

    _, sums_dot = jax.jvp(sums, (at,), (moving,))
    zero = tail = jnp.zeros_like(highest)
    if "rows" in moving:
        _, tail = _tail_tangent(primals[0], moving["rows"], highest)
    return zero, tail, *sums_dot, *map(jnp.zeros_like, out[4:])


@with_tangents(target_tangents)
def target_statistics(rows: Rows, targets: Targets) -> tuple[Array, ...]:
    """The maximum, the tail, and the sums of `y` and of `y (z - max)`, [N, 1] each."""
    if not is_minor(rows):
        highest, tail = _reduce(rows, _merge_labels)[:2]
        return highest, tail, *target_sums(rows, targets, highest), *keeps_class(rows)
    y = jnp.broadcast_to(targets.values(rows), rows.logits.shape)
    return tuple(_reduce(rows, _merge_targets, (y, 0.0), (jnp.zeros_like(y), 0.0)))


def target_sums(rows: Rows, targets: Targets, highest: Array) -> tuple[Array, Array]:
    """The last two, given the maximum."""
    y, z = jnp.broadcast_to(targets.values(rows), rows.logits.shape), rows.values()
    # An absent class (-inf) whose target is 0 adds nothing, and -inf is not below -inf.
    is_nothing = jnp.isneginf(z) & ((y == 0) | jnp.isneginf(highest))
    distance = jnp.where(is_nothing, 0, below(z, highest))
    return sum_classes(rows, y), sum_classes(rows, y * distance)


def target_cotangent(
    rows: Rows,
    targets: Targets,
    highest: Array,
    tail: Array,
    target_sum: Array,
    g_loss: Array,
    g_log_normalizer: Array,
) -> "Cotangent":
    """`g_loss (o sum(y) - y) + g_log_normalizer o`, as the cotangent of `rows`. Where both factors are
    0 the row is 0, whatever its logits hold."""
    rows, targets = read_again(rows, targets)
    of_values = target_cotangent_of_values(
        rows, targets, highest, tail, target_sum, g_loss, g_log_normalizer
    )
    is_lost = (g_loss == 0) & (g_log_normalizer == 0) & ~jnp.isfinite(tail + target_sum)
    return cotangent_of(rows, jnp.where(is_lost, 0, of_values))


def target_cotangent_of_values(
    rows: Rows,
    targets: Targets,
    highest: Array,
    tail: Array,
    target_sum: Array,
    g_loss: Array,
    g_log_normalizer: Array,
    *,
    subtract: Callable = jnp.subtract,
) -> Array:
    """The same of `rows.values()`, [N, V]."""
    y, distance, normalizer = targets.values(rows), subtract(rows.values(), highest), 1 + tail
    exponentials = jnp.exp(distance)
    # o_j sum(y) - y_j = ((sum(y) - y_j) + sum(y) (e^d - 1) - y_j tail) / S does not cancel near the
    # maximum.
    near = ((target_sum - y) + target_sum * (exponentials - 1) - y * tail) / normalizer
    far = target_sum * exponentials / normalizer - y
    of_loss = g_loss * jnp.where(distance > -(2.0**-6), near, far)
    return of_loss + g_log_normalizer * exponentials / normalizer


def target_costs(rows: Rows, targets: Targets, highest: Array, tail: Array, g_loss: Array) -> Array:
    """`g_loss (-log o)`, the cotangent of `targets.values(rows)`, [N, V]."""
    cost = jnp.log1p(tail) - distances(rows, highest)
    # An absent class is infinitely dear, and 0 times that is NaN.
    unused = (g_loss == 0) & ~jnp.isfinite(cost)
    if rows.mask is not None:
        unused |= ~rows.mask
    return g_loss * jnp.where(unused, 0, cost)


# -- from the statistics to the loss ------------------------------------------------------------------
# All [N, 1].


def log_normalizer(stats: Statistics) -> Array:
    """`log sum_j e^{z_j}`."""
    return stats.max + jnp.log1p(stats.tail)


def label_loss(label_distance: Array, stats: Statistics) -> Array:
    """`-log o_y`, from the label's distance `z_y - max`."""
    return jnp.log1p(stats.tail) - label_distance


def label_factors(
    label_distance: Array, stats: Statistics, g_loss: Array, g_log_normalizer: Array
) -> tuple[Array, Array]:
    """The two numbers of `label_cotangent`: `g_loss (o - y) + g_log_normalizer o` for one-hot y."""
    others = stats.tail - jnp.expm1(label_distance)
    normalizer = others + jnp.exp(label_distance)  # NaN for all of the row if the label is bad
    at_label = (g_log_normalizer * jnp.exp(label_distance) - g_loss * others) / normalizer
    return at_label, (g_loss + g_log_normalizer) / normalizer


def target_loss(target_sum: Array, target_dot: Array, stats: Statistics) -> Array:
    """`-sum_j y_j log o_j`."""
    return target_sum * jnp.log1p(stats.tail) - target_dot


def only(counts: Array | None, x: Array, probe: Array) -> Array:
    """`x`, [N, 1 or V], and exactly 0 in rows that do not count. Finite rows are 0 already, through
    their weight of 0, whose derivative needs them; only rows where `probe` is not finite need
    masking."""
    return x if counts is None else jnp.where(counts | jnp.isfinite(probe), x, 0)


def without_empty_rows(
    counts: Array | None, statistics: list[Array], kept: list[Array]
) -> tuple[Array | None, list[Array]]:
    """Which rows count, and their statistics, where the mask keeps no class of some: those do not
    count, and their maximum, -inf, would be NaN in derivatives."""
    if not kept:
        return counts, statistics
    is_kept = kept[0] > 0
    counts = is_kept if counts is None else counts & is_kept
    return counts, [jnp.where(is_kept, x, 0) for x in statistics]


# -- pieces -------------------------------------------------------------------------------------------


def distances(rows: Rows, highest: Array) -> Array:
    """How far each logit lies below the maximum, `z - max`, [N, V]: never positive, 0 at the maximum."""
    return below(rows.values(), highest)


def keeps_class(rows: Rows) -> tuple[Array, ...]:
    """[N, 1]: 1.0 for rows that keep a class, 0.0 for the others; nothing without a mask."""
    if rows.mask is None:
        return ()
    mask = jnp.broadcast_to(rows.mask, rows.logits.shape)
    return (jnp.any(mask, rows.axes, keepdims=True).astype(rows.dtype),)


def sum_classes(rows: Rows, x: Array) -> Array:
    return jnp.sum(x, axis=rows.axes, keepdims=True)


class Cotangent(NamedTuple):
    """What a backend returns as the cotangent of `Rows`; a mask has none."""

    logits: Array  # [N, V], in the logits' dtype
    softcap: Array | None  # [N, 1], of each row

    def of(self, rows: Rows) -> Rows:
        softcap = self.softcap
        if softcap is not None:
            softcap = jnp.sum(softcap, keepdims=True)
        return dataclasses.replace(
            rows, logits=self.logits, mask=None, softcap=softcap, first_class=None
        )


def cotangent_of(rows: Rows, of_values: Array) -> Cotangent:
    """The cotangent of `rows` from that of `rows.values()`."""
    softcap = None if rows.softcap is None else jnp.broadcast_to(rows.softcap, rows.row_shape)

    def values(logits, softcap):
        return dataclasses.replace(rows, logits=logits, softcap=softcap).values()

    out, vjp = jax.vjp(values, rows.logits, softcap)
    # Of no rows, `jnp.where` forgets in JAX 0.10 over which mesh axes they vary.
    return Cotangent(*vjp(_axis.vary(of_values, _axis.varying(out))))


def targets_cotangent(rows: Rows, targets: Targets, of_values: Array) -> Targets:
    """The cotangent of `targets` from that of `targets.values(rows)`."""
    out, vjp = jax.vjp(lambda targets: targets.values(rows), targets)
    of_values = _axis.vary(of_values, _axis.varying(out))
    sharding = jax.typeof(out).sharding
    if sharding.mesh.explicit_axes:  # where targets may be laid out otherwise than the logits
        of_values = jax.sharding.reshard(of_values, sharding)
    return vjp(of_values)[0]


def tangent_of(values: Callable, view: Any, view_dot: Any) -> Array:
    """The tangent of `values(view)`, [N, V]."""
    return jax.jvp(values, (view,), (view_dot,))[1]


def read_again(*trees: Any) -> Any:
    """The same arrays, for the backward pass. Without the barrier the compiler would keep a widened or
    capped copy of the logits from the forward pass, to compute it once."""
    out = lax.optimization_barrier(trees)
    return out if len(out) > 1 else out[0]


def moving_arguments(
    names: tuple[str, ...], primals: tuple, dots: tuple
) -> tuple[dict[str, Any], dict[str, Any]]:
    """By name, those arguments of a JVP rule with `symbolic_zeros` that move at all, and their tangents.
    The others are left out: an infinity times a tangent of 0 would be NaN."""
    moving = {
        name: (primal, jax.tree.map(_instantiate, dot, primal, is_leaf=is_symbolic_zero))
        for name, primal, dot in zip(names, primals, dots, strict=True)
        if not all(map(is_symbolic_zero, jax.tree.leaves(dot, is_leaf=is_symbolic_zero)))
    }
    return {k: x for k, (x, _) in moving.items()}, {k: x for k, (_, x) in moving.items()}


def is_symbolic_zero(x: object) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _instantiate(tangent: Any, primal: Any) -> Any:
    if not is_symbolic_zero(tangent):
        return tangent
    return _axis.vary(jnp.zeros(tangent.shape, tangent.dtype), _axis.varying(primal))
