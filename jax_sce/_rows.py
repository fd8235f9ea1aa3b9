"""Storey 1: the statistics of a row of logits, and every derivative that follows from them.

A row is the set of logits of one example. All that a softmax cross-entropy needs to know of it is

    max  = max_j z_j
    tail = sum_j e^{z_j - max} - 1        summed without the one: see below

for then `S = 1 + tail` is the normalizer, `log S = log1p(tail)`, and

    loss            E = sum_j y_j (max - z_j) + sum(y) log1p(tail)
    log-normalizer  L = max + log1p(tail)
    softmax         o_j = e^{z_j - max} / S

`(max, tail)` is a commutative monoid (`merge`), so rows may be read whole, in chunks of their classes,
or on many devices, of which each holds some of the classes (`axis_name`; `whole` merges them).

Accuracy
--------
`L - z_y` and `o_y - 1` cancel when the label's logit is the largest, which is the state that training
strives for. Nothing here cancels:

* `tail` is a sum of positive terms. The one that belongs to the maximum is left out rather than added
  and subtracted again, so a confident row, whose tail is 1e-20, keeps all digits of it.
* With an integer label at distance `gap = z_y - max <= 0`, the loss is `log1p(tail) - gap`: two terms
  that are not negative.
* The label's gradient `o_y - 1 = -(S - e^gap) / S` takes the sum over the other classes as
  `tail - expm1(gap)`, which again adds two terms that are not negative.

Let u be the unit roundoff, 2^-24 in float32. Rounding a distance `z_j - max` moves its exponential by
up to `|z_j - max| u`, relatively, far more than the exponential's own error of about 2u when the
distance is long. In the tail that is avoided: the rounding error of the distance is computed and put
back (`_exp_difference`), or distances are taken from the largest of the other logits. So the loss is
within 16u, 1e-6 in float32, with sums that are pairwise or in blocks; of a distribution that is not
one-hot, relative to `sum_j |y_j| (max - z_j) + |sum(y)| log1p(tail)`. An element of the gradient
carries the rounding of its own distance and some six roundings more: within `(6 + |z_j - max|) 2^-22`
in float32 for one-hot targets, and for others relative to `o_j |sum(y)| + |y_j|`, for there the
gradient itself has a zero between. Rounding a cotangent to 16 bits comes on top, once. `L` is within
2^-22 of `max(1, |L|)`. Terms below the smallest normal number, 2^-126, may be lost altogether, and with
a soft-cap the bounds hold for the capped logits as they are rounded.

References: the derivative is that of Bridle (1990), "Probabilistic interpretation of feedforward
classification network outputs"; `merge` is the online normalizer of Milakov and Gimelshein (2018),
arXiv:1805.02867, with the maximum's own term left out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _axis, _kernels
from ._axis import AxisName
from ._kernels import Shared

# On CPU, long rows are read in blocks of classes (`_statistics_in_blocks`). Widths from 128 to 8000 ran
# equally fast, narrower ones a little slower; what is written is one number a block and then one block,
# so both are kept small. That one block is a row of its own: of 16 bits it is cut again and again until
# it is short, for the compiler would widen it; of others once, for every cut is compiled.
_BLOCK_WIDTHS = range(16, 513)
_LONG_ROW = 256
_SHORT_16_BIT_ROW = 40


class Statistics(NamedTuple):
    """The sum of exponentials of each row: `(1 + tail) * exp(max)`."""

    max: Array  # [N...], the largest logit
    tail: Array  # [N...], sum of exp(logit - max) over all classes, less one
    leads: Array | None = None  # bool, [N...], if the largest is on this device; None: it is


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "where", "some_kept", "softcap"],
    meta_fields=["axes", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Logits as the caller holds them, and how to read them: classes last, in float32 or wider.

    Residuals hold this, not what `read` returns, so nothing of that size outlives a pass. V is the
    number of classes on this device, of all if they are not split.
    """

    logits: Array  # any floating type, classes on `axes`
    where: Array | None  # bool, broadcasts to `logits` with the same rank
    some_kept: (
        Array | None
    )  # bool, [N... or 1...], the rows of which `where` keeps a class, anywhere
    softcap: Array | None  # scalar
    axes: tuple[int, ...]
    axis_name: AxisName = None  # over which the classes are split

    @property
    def num_classes(self) -> int:
        return math.prod(self.logits.shape[axis] for axis in self.axes)

    def read(self) -> Array:
        """The logits, [N..., V]; -inf where a class is masked, unless all of the row is."""
        where = self._where()
        if where is not None and self.some_kept is not None:
            where |= ~self.some_kept[..., None]
        return self.effective(_read_anew(classes_last(self.logits, self.axes)), where)

    def read_at(self, labels: Array) -> Array:
        """The logit of one class in each row, [N...]; NaN where the label is negative."""
        index = jnp.maximum(labels, 0)[..., None]
        where = self._where()
        if where is not None:
            where = jnp.take_along_axis(where, index, axis=-1)
        logits = jnp.take_along_axis(classes_last(self.logits, self.axes), index, axis=-1)
        return jnp.where(labels < 0, jnp.nan, self.effective(logits, where)[..., 0])

    def distances(self, stats: Statistics) -> Array:
        """How far each logit lies below the largest, `z - max`, [N..., V]; 0 at the largest itself."""
        leads = None if stats.leads is None else stats.leads[..., None]
        return self._distance(Rows.read, stats.max[..., None], leads)

    def distance_at(self, labels: Array, stats: Statistics) -> Array:
        """The same for one class in each row, [N...]; NaN where the label is negative, and 0 where the
        class is on another device."""
        index = self.place(labels)
        if self.axis_name is None:
            return self._distance(lambda rows: rows.read_at(index), stats.max, None)
        is_here = (index >= 0) & (index < self.num_classes)
        index = jnp.where(is_here, index, 0)
        distance = self._distance(lambda rows: rows.read_at(index), stats.max, stats.leads)
        return jnp.where(labels < 0, jnp.nan, jnp.where(is_here, distance, 0))

    def place(self, labels: Array) -> Array:
        """Class ids as places among the classes on this device, outside [0, V) for those on others."""
        return labels - _axis.offset(self.axis_name, self.num_classes)

    def _distance(
        self, read: Callable[["Rows"], Array], highest: Array, leads: Array | None
    ) -> Array:
        distance = read(self) - highest
        if self.softcap is None:
            return distance
        # A compiler may round a soft-capped logit one way here and another way where the largest was
        # found. The logits before the cap tell which one it was.
        uncapped = dataclasses.replace(self, softcap=None)
        top = jnp.max(uncapped.read(), axis=-1).reshape(highest.shape)
        is_top = read(uncapped) == top
        if leads is not None:
            is_top &= leads
        rounded = jnp.where(jnp.isneginf(distance), 0, distance)  # there is nothing to correct
        exact = jnp.where(is_top, 0, jnp.minimum(rounded, 0))
        return distance + lax.stop_gradient(exact - rounded)

    def _where(self) -> Array | None:
        if self.where is None:
            return None
        return classes_last(jnp.broadcast_to(self.where, self.logits.shape), self.axes)

    def effective(self, logits: Array, where: Array | None = None) -> Array:
        """Logits of some classes, classes last: widened, capped and masked."""
        logits = logits.astype(compute_dtype(logits.dtype))
        if where is not None:
            # What a masked class holds must not reach the derivative of what follows.
            logits = jnp.where(where, logits, 0)
        if self.softcap is not None:
            logits = _soft_cap(logits, self.softcap.astype(logits.dtype))
        if where is not None:
            logits = jnp.where(where, logits, -jnp.inf)
        return logits


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["labels", "where", "share", "smoothing", "class_weights"],
    meta_fields=["axes", "num_classes", "dtype", "axis_name"],
)
@dataclasses.dataclass(frozen=True)
class Targets:
    """Labels as the caller holds them, and how to read them as distributions, with classes last.

    The labels have the shape of the logits, with the classes on `axes`; or they are integers, [N...],
    with -1 for a bad one, and `axes` is None.
    """

    labels: Array
    where: Array | None  # bool, [N... or 1..., V]
    share: (
        Array | None
    )  # [N... or 1...], one over the number of classes in the row, on all devices;
    # None: the same in all rows
    smoothing: Array | None  # scalar
    class_weights: Array | None  # [V]
    axes: tuple[int, ...] | None
    num_classes: int
    dtype: jnp.dtype
    axis_name: AxisName = None  # over which the classes are split

    def read(self) -> Array:
        """`w_c ((1 - e) y_c + e / V)`, [N..., V]. A distribution has no mass on a masked class."""
        if self.axes is None:
            place = self.labels - _axis.offset(self.axis_name, self.num_classes)
            targets = one_hot(place, self.num_classes).astype(self.dtype)
            targets = jnp.where(self.labels[..., None] < 0, jnp.nan, targets)
        else:
            targets = _read_anew(classes_last(self.labels, self.axes)).astype(self.dtype)
            if self.where is not None:
                targets = jnp.where(self.where, targets, 0)
        if self.smoothing is not None:
            targets = (1 - self.smoothing) * targets + self.smoothing * self._uniform(targets.ndim)
        if self.class_weights is not None:
            targets = _weigh(targets, along_classes(self.class_weights, targets.ndim))
        return targets

    def _uniform(self, ndim: int) -> Array:
        uniform = self.uniform_share.reshape(*self.uniform_share.shape or (1,) * (ndim - 1), 1)
        return uniform if self.where is None else jnp.where(self.where, uniform, 0)

    @property
    def uniform_share(self) -> Array:
        """One over the number of classes, [N... or 1...], or a scalar."""
        if self.share is not None:
            return self.share
        return jnp.asarray(1 / (self.num_classes * _axis.size(self.axis_name)), self.dtype)


def classes_last(x: Array, axes: tuple[int, ...]) -> Array:
    """Move the class axes to the end and make them one."""
    if axes == (x.ndim - 1,):
        return x
    batch = tuple(axis for axis in range(x.ndim) if axis not in axes)
    num_classes = math.prod(x.shape[axis] for axis in axes)
    return x.transpose(batch + axes).reshape(*(x.shape[axis] for axis in batch), num_classes)


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 for float64: 16-bit types are only for storage."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def along_classes(x: Array, ndim: int) -> Array:
    """A vector [V] as an array of rank `ndim`, with the classes last."""
    return x.reshape((1,) * (ndim - 1) + (-1,))


def one_hot(labels: Array, num_classes: int) -> Array:
    """Bools, [N..., V]."""
    classes = jnp.arange(num_classes, dtype=labels.dtype)
    return labels[..., None] == along_classes(classes, labels.ndim + 1)


# -- statistics ---------------------------------------------------------------------------------------


@jax.custom_jvp
def statistics(rows: Rows) -> Statistics:
    """The largest logit and the tail of every row, [N...] each, of the classes on this device."""
    if _kernels.serve(rows.logits, rows.softcap):
        on_cpu = _statistics_by_kernel
        return lax.platform_dependent(rows, cpu=on_cpu, default=_statistics_at_once)
    return _statistics_in_plain_jax(rows)


def _statistics_in_plain_jax(rows: Rows) -> Statistics:
    if rows.num_classes < _LONG_ROW or rows.where is not None:
        return _statistics_at_once(rows)
    return lax.platform_dependent(rows, cpu=_statistics_in_blocks, default=_statistics_at_once)


@statistics.defjvp
def _statistics_jvp(primals, tangents):
    # All that is made of the statistics would be the same for any other constant in place of `max`, so
    # `max` is held constant, and the tail moves with every logit, the largest included.
    (rows,), (rows_dot,) = primals, tangents
    stats = statistics(rows)
    _, z_dot = jax.jvp(Rows.read, (rows,), (rows_dot,))
    exponentials = jnp.exp(rows.distances(stats))
    if rows.axis_name is not None:  # classes that are all absent are not all of the row
        exponentials = jnp.where(jnp.isneginf(stats.max)[..., None], 0, exponentials)
    tail_dot = jnp.sum(exponentials * z_dot, axis=-1)
    return stats, Statistics(jnp.zeros_like(stats.max), tail_dot)


def _statistics_at_once(rows: Rows) -> Statistics:
    z = rows.read()
    highest = jnp.max(z, axis=-1)
    # One entry at the maximum is left out by its place: ties count, and nothing hangs on an equality.
    is_first = one_hot(jnp.argmax(z, axis=-1), z.shape[-1])
    others = jnp.where(is_first, 0, _exp_difference(z, highest[..., None]))
    return Statistics(highest, jnp.sum(others, axis=-1) + (highest - highest))  # NaN if infinite


def _exp_difference(a: Array, b: Array) -> Array:
    """`exp(a - b)`, without the error of rounding `a - b`, which grows with the difference."""
    difference = a - b
    finite = jnp.isfinite(difference)
    a, b, rounded = (jnp.where(finite, x, 0) for x in (a, b, difference))
    shift = rounded - a
    error = (a - (rounded - shift)) - (b + shift)  # exact: Knuth's two-sum
    return jnp.exp(difference) * (1 + error)


def _statistics_in_blocks(rows: Rows) -> Statistics:
    """The same for long rows on CPU. XLA's compiler for it fuses a sum of exponentials with its reading
    only if nothing but arithmetic lies between (with a `select` or a comparison it writes an N x V
    array), and runs it at full rate only if the summed axis is short. So the row is cut into blocks that
    are summed whole, all but the one that holds the maximum, which is taken as a row of its own. The
    sums are relative to the maximum of the other blocks: short distances round little."""

    def part(logits: Array) -> Statistics:
        return _statistics_in_blocks(Rows(logits, None, None, rows.softcap, (logits.ndim - 1,)))

    num_classes = rows.num_classes
    is_16_bit = rows.logits.dtype.itemsize == 2
    if num_classes <= (_SHORT_16_BIT_ROW if is_16_bit else _LONG_ROW):
        return _statistics_at_once(rows)
    best = min(max(num_classes // 160, 50), 240)
    divisors = [w for w in _BLOCK_WIDTHS if num_classes % w == 0 and w < num_classes]
    width = min(divisors, key=lambda w: abs(w - best), default=min(best, num_classes // 2))
    logits = classes_last(rows.logits, rows.axes)
    whole = num_classes - num_classes % width
    if whole < num_classes:
        stats = merge(*(_or_empty(part(x)) for x in (logits[..., :whole], logits[..., whole:])))
        return stats._replace(tail=stats.tail + (stats.max - stats.max))  # NaN if infinite

    blocks = logits.reshape(*logits.shape[:-1], num_classes // width, width)
    # Of the logits as they are stored, for to widen them here would be a second reader; a soft-cap keeps
    # their order. The barrier keeps XLA from taking the maximum of maxima by reading all the row again.
    maxima = lax.optimization_barrier(jnp.max(blocks, axis=-1))
    home = jnp.argmax(maxima, axis=-1)
    elsewhere = ~one_hot(home, maxima.shape[-1])
    highest = rows.effective(jnp.max(maxima, axis=-1))
    second = rows.effective(jnp.max(jnp.where(elsewhere, maxima, -jnp.inf), axis=-1))
    second = jnp.where(jnp.isneginf(second), highest, second)
    # Each step bound to the last: the memory of one is free in the next, and the blocks are read anew.
    blocks, home, highest, second = lax.optimization_barrier((blocks, home, highest, second))
    tail = part(lax.optimization_barrier(_take_block(blocks, home))).tail
    blocks, home, second, tail = lax.optimization_barrier((blocks, home, second, tail))
    sums = jnp.sum(jnp.exp(rows.effective(blocks) - second[..., None, None]), axis=-1)
    others = jnp.sum(jnp.where(one_hot(home, sums.shape[-1]), 0, sums), axis=-1)
    return Statistics(highest, tail + others * _exp_difference(second, highest))


def _take_block(blocks: Array, index: Array) -> Array:
    """One block of each row, [N..., width]."""
    bits, index = to_bits(blocks), index[..., None, None]
    block = jnp.take_along_axis(bits, index, -2, mode="promise_in_bounds")[..., 0, :]
    return from_bits(block, blocks.dtype)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of the union of two sets of classes. `(-inf, -1)` is the empty set."""
    highest = jnp.maximum(a.max, b.max)
    lower = jnp.minimum(a.max, b.max)
    a_leads = a.max >= b.max
    leader, follower = jnp.where(a_leads, a.tail, b.tail), jnp.where(a_leads, b.tail, a.tail)
    # Two empty sets: -inf less -inf would be NaN.
    scale = jnp.where(jnp.isneginf(lower), 0, _exp_difference(lower, highest))
    return Statistics(highest, leader + (1 + follower) * scale)


def _or_empty(stats: Statistics) -> Statistics:
    """As a part of a row, classes that are all absent (-inf) are none."""
    return Statistics(stats.max, jnp.where(jnp.isneginf(stats.max), -1, stats.tail))


Sums = tuple[Array, ...]


def whole(
    rows: Rows,
    sums: Callable[[Statistics], Sums],
    statistics: Callable[[Rows], Statistics] = statistics,
) -> tuple[Statistics, Sums]:
    """The statistics of whole rows, wherever their classes are, and the sums over the classes, [N...]
    each, of which `sums` gives those of this device: it is told the largest logit.

    All of it crosses the devices in a maximum and a sum.
    """
    stats = statistics(rows)
    if rows.axis_name is None:
        return stats, sums(stats)
    part = _or_empty(stats)
    highest = _axis.largest(rows.axis_name, part.max)
    leads = part.max == highest
    scale = _exp_difference(part.max, highest)
    tail = jnp.where(leads, part.tail, (1 + part.tail) * scale)
    here = sums(Statistics(highest, part.tail, leads))
    tail, leaders, *totals = _axis.total(
        rows.axis_name, jnp.stack([tail, leads.astype(tail.dtype), *here])
    )
    # The one is left out of the first leader alone. NaN if the maximum is infinite.
    return Statistics(highest, tail + (leaders - 1) + (highest - highest), leads), tuple(totals)


def log_normalizer(stats: Statistics) -> Array:
    """`log sum_j e^{z_j}`, [N...]."""
    return stats.max + jnp.log1p(stats.tail)


# -- integer labels -----------------------------------------------------------------------------------


@_kernels.or_by_kernel(
    lambda: _label_statistics_by_kernel,
    when=lambda rows, labels: rows.axis_name is None and _kernels.serve(rows.logits, rows.softcap),
)
def label_statistics(rows: Rows, labels: Array) -> tuple[Statistics, Array]:
    """The statistics of whole rows, and how far the label's logit lies below the largest,
    `gap = z_y - max`, [N...]."""
    stats, (gap,) = whole(rows, lambda stats: (rows.distance_at(labels, stats),))
    return stats, gap


def label_loss(gap: Array, stats: Statistics) -> Array:
    """`-log o_y` from the label's distance to the largest logit. All [N...]."""
    return jnp.log1p(stats.tail) - gap


def label_cotangent(
    rows: Rows, labels: Array, gap: Array, stats: Statistics, g_loss: Array, g_log_normalizer: Array
) -> Array:
    """`g_loss (o - y) + g_log_normalizer o` for one-hot y, [N..., V]."""
    at_label, elsewhere = _label_factors(gap, stats, g_loss, g_log_normalizer)
    exponentials = jnp.exp(rows.distances(stats))
    hot = one_hot(rows.place(labels), rows.num_classes)
    return jnp.where(hot, at_label[..., None], elsewhere[..., None] * exponentials)


def _label_factors(
    gap: Array, stats: Statistics, g_loss: Array, g_log_normalizer: Array
) -> tuple[Array, Array]:
    """The cotangent at the label, and that elsewhere over e^{z - max}. All [N...]."""
    others = stats.tail - jnp.expm1(gap)
    normalizer = others + jnp.exp(gap)  # and NaN for all of the row if the label is bad
    at_label = (g_log_normalizer * jnp.exp(gap) - g_loss * others) / normalizer
    return at_label, (g_loss + g_log_normalizer) / normalizer


@_kernels.or_by_kernel(
    lambda: _pull_label_by_kernel,
    when=lambda rows, *_: _kernels.serve(rows.logits, rows.softcap),
)
def pull_label(
    rows: Rows,
    labels: Array,
    counts: Array | None,
    gap: Array,
    stats: Statistics,
    g_loss: Array,
    g_log_normalizer: Array,
) -> tuple[Array, Array | None]:
    """`label_cotangent` carried to the logits, as they are laid out, and to the soft-cap; nothing of the
    rows outside `counts`."""
    cotangent = label_cotangent(rows, labels, gap, stats, g_loss, g_log_normalizer)
    return _pull_rows(rows, only(counts, cotangent, stats.tail[..., None]))


# -- distributions as labels --------------------------------------------------------------------------


@_kernels.or_by_kernel(
    lambda: _target_statistics_by_kernel,
    when=lambda rows, targets: rows.axis_name is None and _serve_targets(rows, targets),
)
def target_statistics(rows: Rows, targets: Targets) -> tuple[Statistics, Array, Array]:
    """The statistics of whole rows, and the sums over the classes of the targets and of the targets
    times the distances, [N...] each."""
    stats, (mass, moment) = whole(rows, functools.partial(_target_sums, rows, targets))
    return stats, mass, moment


def _target_sums(rows: Rows, targets: Targets, stats: Statistics) -> Sums:
    y = targets.read()
    distance = rows.distances(stats)
    # A class that is absent (-inf) and has no mass adds nothing.
    distance = jnp.where((y == 0) & jnp.isneginf(distance), 0, distance)
    return jnp.sum(y, axis=-1), jnp.sum(y * distance, axis=-1)


def target_loss(mass: Array, moment: Array, stats: Statistics) -> Array:
    """`-sum_j y_j log o_j` from those sums, [N...]."""
    return mass * jnp.log1p(stats.tail) - moment


def target_cotangent(
    rows: Rows,
    targets: Targets,
    mass: Array,
    stats: Statistics,
    g_loss: Array,
    g_log_normalizer: Array,
) -> Array:
    """`g_loss (o sum(y) - y) + g_log_normalizer o`, [N..., V]."""
    y = targets.read()
    mass, normalizer, tail, g_loss, g_log_normalizer = (
        x[..., None] for x in (mass, 1 + stats.tail, stats.tail, g_loss, g_log_normalizer)
    )
    distance = rows.distances(stats)
    exponentials = jnp.exp(distance)
    # At the maximum o_j sum(y) - y_j = ((sum(y) - y_j) - y_j tail) / S. The expm1 is 0 there and makes
    # the expression right in a neighbourhood too, for second derivatives.
    at_max = ((mass - y) + mass * jnp.expm1(distance) - y * tail) / normalizer
    below = mass * exponentials / normalizer - y
    return (
        g_loss * jnp.where(distance == 0, at_max, below)
        + g_log_normalizer * exponentials / normalizer
    )


def cost_cotangent(rows: Rows, targets: Targets, stats: Statistics, g_loss: Array) -> Array:
    """`g_loss (-log o)`, of the targets, [N..., V]."""
    distance, g_loss = rows.distances(stats), g_loss[..., None]
    # An absent class is infinitely dear, and 0 times that is NaN.
    cost = jnp.log1p(stats.tail[..., None]) - distance
    unused = (g_loss == 0) & ~jnp.isfinite(cost)
    if targets.where is not None:
        unused |= ~targets.where
    return g_loss * jnp.where(unused, 0, cost)


@_kernels.or_by_kernel(
    lambda: _pull_target_by_kernel, when=lambda rows, targets, *_: _serve_targets(rows, targets)
)
def pull_target(
    rows: Rows,
    targets: Targets,
    counts: Array | None,
    mass: Array,
    stats: Statistics,
    g_loss: Array,
    g_log_normalizer: Array,
) -> tuple[Array, Array | None]:
    """`target_cotangent` carried to the logits and the soft-cap, as `pull_label` does."""
    cotangent = target_cotangent(rows, targets, mass, stats, g_loss, g_log_normalizer)
    return _pull_rows(rows, only(counts, cotangent, (stats.tail + mass)[..., None]))


# -- from what is read to what is held ----------------------------------------------------------------


def only(counts: Array | None, cotangent: Array, tell: Array) -> Array:
    """Exactly 0 in the rows outside `counts`. What is finite there is 0 by its factor, and keeps its own
    derivative by that factor, a weight of 0; what is not would give NaN, and `tell`, [N..., 1 or V], is
    not finite there."""
    if counts is None:
        return cotangent
    return jnp.where(counts[..., None] | jnp.isfinite(tell), cotangent, 0)


def pull(view: Any, cotangent: Array) -> Any:
    """The cotangent of what `view.read()` reads, in that view's own types and layout."""
    out, pull = jax.vjp(type(view).read, view)
    # Of no rows, `jnp.where` forgets in JAX 0.10 over which mesh axes they vary.
    return pull(_axis.vary(cotangent, _axis.varying(out)))[0]


def push(view: Any, view_dot: Any) -> Array:
    """The tangent of what `view.read()` reads."""
    return jax.jvp(type(view).read, (view,), (view_dot,))[1]


def _pull_rows(rows: Rows, cotangent: Array) -> tuple[Array, Array | None]:
    """Of the logits and of the soft-cap. XLA on CPU would fuse the cotangent with each of its readers,
    the two matrix products of a head, and to compute its exponentials but once write them to an array
    of their own."""
    pulled = pull(rows, cotangent)
    return barrier_on_cpu(pulled.logits), pulled.softcap


# -- by the native kernels ----------------------------------------------------------------------------
# The same, computed by `_native/rows.cc`. What a kernel does with the arrays that it is given is written
# down once more in plain JAX, `_on_arrays`, for where it cannot be called.


def _serve_targets(rows: Rows, targets: Targets) -> bool:
    has_ids = targets.axes is None
    labels = () if has_ids else (targets.labels,)
    is_here = (
        not has_ids or rows.axis_name is None
    )  # to a kernel, an id of another device is a bad one
    return is_here and _kernels.serve(rows.logits, rows.softcap, *labels)


def _statistics_by_kernel(rows: Rows) -> Statistics:
    z, where = _arrays(rows)
    nowhere = jnp.full(z.shape[:-1], -1, jnp.int32)
    return Statistics(*_run_label_statistics(z, where, nowhere)[:2])


def _label_statistics_by_kernel(rows: Rows, labels: Array) -> tuple[Statistics, Array]:
    largest, tail, at_label = _run_label_statistics(*_arrays(rows), labels)
    return Statistics(largest, tail), jnp.where(labels < 0, jnp.nan, at_label - largest)


def _run_label_statistics(z: Array, where: Array | Shared, labels: Array) -> tuple[Array, ...]:
    return _kernels.run("label_statistics", _label_statistics_on_arrays, z, where, labels)


def _label_statistics_on_arrays(
    z: Array, where: Array, labels: Array, *, axis_name: AxisName = None
) -> tuple[Array, ...]:
    rows = _rows_of(z, where, axis_name)
    place = rows.place(labels)
    is_here = (place >= 0) & (place < rows.num_classes)

    def at_label(stats):
        return (jnp.where(is_here, rows.read_at(jnp.where(is_here, place, 0)), 0),)

    stats, sums = whole(rows, at_label, _statistics_in_plain_jax)
    return *stats[:2], *sums


def _pull_label_by_kernel(
    rows: Rows,
    labels: Array,
    counts: Array | None,
    gap: Array,
    stats: Statistics,
    g_loss: Array,
    g_log_normalizer: Array,
) -> tuple[Array, None]:
    factors = _label_factors(gap, stats, g_loss, g_log_normalizer)
    (cotangent,) = _kernels.run(
        "label_cotangent",
        _label_cotangent_on_arrays,
        *_arrays(rows),
        rows.place(labels),
        stats.max,
        *_only_rows(counts, stats.tail, *factors),
    )
    return _as_laid_out(rows, cotangent), None


def _label_cotangent_on_arrays(
    z: Array,
    where: Array,
    labels: Array,
    largest: Array,
    at_label: Array,
    elsewhere: Array,
    *,
    axis_name: AxisName = None,
) -> tuple[Array]:
    rows = _rows_of(z, where, axis_name)
    exponentials = jnp.exp(rows.distances(Statistics(largest, largest)))
    hot = one_hot(rows.place(labels), rows.num_classes)
    cotangent = jnp.where(hot, at_label[..., None], elsewhere[..., None] * exponentials)
    is_nothing = (at_label == 0) & (elsewhere == 0)
    return (pull(rows, jnp.where(is_nothing[..., None], 0, cotangent)).logits,)


def _target_statistics_by_kernel(rows: Rows, targets: Targets) -> tuple[Statistics, Array, Array]:
    largest, tail, mass, moment = _kernels.run(
        "target_statistics",
        _target_statistics_on_arrays,
        *_arrays(rows),
        *_target_arrays(targets),
    )
    return Statistics(largest, tail), mass, moment


def _target_statistics_on_arrays(
    z: Array, where: Array, *targets: Array, axis_name: AxisName = None
) -> tuple[Array, ...]:
    rows = _rows_of(z, where, axis_name)
    sums = functools.partial(_target_sums, rows, _targets_of(rows, *targets))
    stats, (mass, moment) = whole(rows, sums, _statistics_in_plain_jax)
    return *stats[:2], mass, moment


def _pull_target_by_kernel(
    rows: Rows,
    targets: Targets,
    counts: Array | None,
    mass: Array,
    stats: Statistics,
    g_loss: Array,
    g_log_normalizer: Array,
) -> tuple[Array, None]:
    tell = stats.tail + mass
    # What is not finite times 0 is NaN; but a kernel makes a row of 0 of two cotangents of 0.
    g_loss = jnp.where((g_loss == 0) & ~jnp.isfinite(tell), jnp.nan, g_loss)
    (cotangent,) = _kernels.run(
        "target_cotangent",
        _target_cotangent_on_arrays,
        *_arrays(rows),
        *_target_arrays(targets),
        stats.max,
        stats.tail,
        mass,
        *_only_rows(counts, tell, g_loss, g_log_normalizer),
    )
    return _as_laid_out(rows, cotangent), None


def _target_cotangent_on_arrays(
    z: Array,
    where: Array,
    labels: Array,
    smoothing: Array,
    share: Array,
    class_weights: Array,
    largest: Array,
    tail: Array,
    mass: Array,
    *g: Array,
    axis_name: AxisName = None,
) -> tuple[Array]:
    rows = _rows_of(z, where, axis_name)
    targets = _targets_of(rows, labels, smoothing, share, class_weights)
    cotangent = target_cotangent(rows, targets, mass, Statistics(largest, tail), *g)
    is_nothing = (g[0] == 0) & (g[1] == 0)
    return (pull(rows, jnp.where(is_nothing[..., None], 0, cotangent)).logits,)


def _arrays(rows: Rows) -> tuple[Array, Array | Shared]:
    """The logits, [N..., V], and which classes there are, [N..., V] or [V], or [0] for all."""
    z = classes_last(rows.logits, rows.axes)
    if rows.where is None:
        return z, Shared(jnp.zeros(0, bool))
    sizes = [
        rows.logits.shape[axis] if axis in rows.axes else size
        for axis, size in enumerate(rows.where.shape)
    ]
    where = classes_last(jnp.broadcast_to(rows.where, sizes), rows.axes)
    if rows.some_kept is not None:
        where |= ~rows.some_kept[..., None]
    if math.prod(where.shape[:-1]) == 1:
        return z, Shared(where.reshape(-1))
    return z, jnp.broadcast_to(where, z.shape)


def _rows_of(z: Array, where: Array, axis_name: AxisName) -> Rows:
    mask = where.reshape((1,) * (z.ndim - where.ndim) + where.shape) if where.size else None
    return Rows(z, mask, None, None, (z.ndim - 1,), axis_name)


def _target_arrays(targets: Targets) -> tuple[Array, Shared, Array | Shared, Shared]:
    """The labels, [N..., V] or ids [N...]; the smoothing, [1]; the share of a class, [N...] or [1]; the
    class weights, [V], or [0] for none."""
    labels, share = targets.labels, targets.uniform_share
    if targets.axes is not None:
        labels = classes_last(labels, targets.axes)
    rows_shape = labels.shape if targets.axes is None else labels.shape[:-1]
    smoothing, class_weights = targets.smoothing, targets.class_weights
    return (
        labels,
        Shared(jnp.zeros(1, targets.dtype) if smoothing is None else smoothing.reshape(1)),
        Shared(share.reshape(1)) if share.size == 1 else jnp.broadcast_to(share, rows_shape),
        Shared(jnp.zeros(0, targets.dtype) if class_weights is None else class_weights),
    )


def _targets_of(
    rows: Rows, labels: Array, smoothing: Array, share: Array, class_weights: Array
) -> Targets:
    return Targets(
        labels,
        rows.where,
        share.reshape(()) if share.size == 1 else share,
        smoothing.reshape(()),
        class_weights if class_weights.size else None,
        (labels.ndim - 1,) if labels.ndim == rows.logits.ndim else None,
        rows.num_classes,
        compute_dtype(rows.logits.dtype),
        rows.axis_name,
    )


def _only_rows(counts: Array | None, tell: Array, *factors: Array) -> list[Array]:
    """As `only`, of what multiplies all of a row, [N...]: a kernel makes a row of 0 of 0."""
    return [only(counts, x[..., None], tell[..., None])[..., 0] for x in factors]


def _as_laid_out(rows: Rows, x: Array) -> Array:
    """From classes last to the layout of the logits."""
    (out,) = jax.linear_transpose(lambda z: classes_last(z, rows.axes), rows.logits)(x)
    return out


# -- helpers ------------------------------------------------------------------------------------------


def to_bits(x: Array) -> Array:
    """Of a 16-bit type the bits, for a gather or scatter: XLA's CPU compiler would first widen all of
    the operand. Not to be differentiated."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Array, dtype: jnp.dtype) -> Array:
    return lax.bitcast_convert_type(x, dtype) if dtype.itemsize == 2 else x


def _read_anew(x: Array) -> Array:
    """`x`, hidden from XLA's common-subexpression elimination on CPU: of a 16-bit array that is widened
    for two readers it would write the float32 copy, at twice the size of the logits and more time than
    the loss takes."""
    return barrier_on_cpu(x)


@jax.custom_jvp
def barrier_on_cpu(x: Array) -> Array:
    """`x`; on CPU, XLA's compiler moves nothing past it."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


@barrier_on_cpu.defjvp
def _barrier_on_cpu_jvp(primals, tangents):
    return barrier_on_cpu(*primals), tangents[0]


@jax.custom_jvp
def _soft_cap(x: Array, cap: Array) -> Array:
    """`cap * tanh(x / cap)`, with a derivative that does not cancel (`1 - tanh^2` does)."""
    return cap * jnp.tanh(x / cap)


@_soft_cap.defjvp
def _soft_cap_jvp(primals, tangents):
    (x, cap), (x_dot, cap_dot) = primals, tangents
    ratio = x / cap
    decay = jnp.exp(-2 * jnp.abs(ratio))
    slope = 4 * decay / (1 + decay) ** 2  # sech^2
    # A logit of NaN makes its row's cotangent NaN already; a row that does not count must stay at 0.
    known = ~jnp.isnan(ratio)
    by_x = jnp.where(known, slope, 0)
    by_cap = jnp.where(known, jnp.tanh(ratio) - jnp.where(slope == 0, 0, ratio * slope), 0)
    return _soft_cap(x, cap), x_dot * by_x + cap_dot * by_cap


@jax.custom_jvp
def _weigh(targets: Array, class_weights: Array) -> Array:
    """The product, with a derivative in which a factor of 0 leaves out even an infinite cost."""
    return targets * class_weights


@_weigh.defjvp
def _weigh_jvp(primals, tangents):
    (y, w), (y_dot, w_dot) = primals, tangents
    return _weigh(y, w), jnp.where(w == 0, 0, y_dot * w) + jnp.where(y == 0, 0, y * w_dot)
