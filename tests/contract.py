"""What the losses promise, once more and apart from them: row by row in NumPy's long double.

All is written from the tables of README.md, with the derivatives by hand. An answer of the contract is a
number and how far from it the library's may be; each bound is derived where it stands.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from support import TOLERANCE, wide

NAN, INF = math.nan, math.inf
DTYPES = ["float32", "bfloat16", "float16"]
if np.finfo(np.longdouble).eps < 1e-18:  # not so on every machine
    DTYPES.append("float64")
IGNORED = -7
OPTIONS = ("label_smoothing", "class_weights", "weights", "z_loss", "softcap", "temperature")


class Precision(NamedTuple):
    """Of the floats that are computed in."""

    dtype: type
    u: float  # the unit roundoff
    tiny: float  # the smallest normal number, below which all may be lost

    @property
    def lost(self):
        """What underflow may take from a sum or a product, in units of u."""
        return 8 * self.tiny / self.u


SINGLE = Precision(np.float32, 2.0**-24, 2.0**-126)
DOUBLE = Precision(np.float64, 2.0**-53, 2.0**-1022)


def precision_of(dtype):
    return DOUBLE if dtype == "float64" else SINGLE


@dataclasses.dataclass(frozen=True)
class Near:
    """Numbers, and how far from each an answer may be, in units of u."""

    value: np.ndarray
    error: np.ndarray

    def __getitem__(self, i):
        return Near(self.value[i], self.error[i])

    def __add__(self, other):
        return Near(self.value + other.value, self.error + other.error)

    def __mul__(self, other):
        """A factor that is not `Near` was rounded three times at most, and so is the product once."""
        factor, error = (other.value, other.error) if isinstance(other, Near) else (other, 0.0)
        value = self.value * factor
        return Near(
            value, self.error * np.abs(factor) + np.abs(self.value) * error + 4 * abs(value)
        )

    def __matmul__(self, matrix):
        """A sum of n products rounds each of them n times at most, in whatever order."""
        size, n = np.abs(matrix), len(matrix)
        return Near(self.value @ matrix, (self.error + n * np.abs(self.value)) @ size)

    def sum(self, axis=None):
        n = np.size(self.value) if axis is None else np.shape(self.value)[axis]
        return Near(self.value.sum(axis), (self.error + n * np.abs(self.value)).sum(axis))

    @property
    def T(self):
        return Near(self.value.T, self.error.T)

    def rounded(self, dtype, precision):
        """To 16 bits, or not; what underflows is lost."""
        narrow = jnp.dtype(dtype).itemsize == 2
        rounding, subnormal = TOLERANCE[jnp.dtype(dtype).name] if narrow else (0.0, 0.0)
        size = np.abs(self.value) + self.error * precision.u
        more = (rounding * size + subnormal) / precision.u + precision.lost
        return Near(self.value, self.error + np.where(size == 0, 0, more))


def stack(nears):
    return Near(np.stack([x.value for x in nears]), np.stack([x.error for x in nears]))


def exactly(value):
    value = np.asarray(value, np.longdouble)
    return Near(value, np.zeros_like(value))


# -- a row -------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """Those of a row; None where it is not used."""

    label_smoothing: float | None
    class_weights: np.ndarray | None
    z_loss: float | None
    softcap: float | None
    temperature: float | None


class Row(NamedTuple):
    """Of one example, before its weight: the loss and the log-normalizer, and their derivatives."""

    loss: Near
    normalizer: Near
    by: dict[str, Near]
    normalizer_by: dict[str, Near]
    has_absent: bool = False  # a class of infinite cost


def row_of(z, y, there, options, precision, blur, examples):
    """`y` is the number of a class, or a distribution; `there` tells the classes that exist. Each logit
    may be off by `blur` units of u. What examples share is summed over so many `examples`."""
    has_id = isinstance(y, int)
    v, u, lost = len(z), precision.u, precision.lost
    s, cap, sums = z, options.softcap, v * examples
    if cap is not None:
        # The quotient, the tanh and the product round a number of at most the cap eight times.
        ratio, s, blur_of_z, blur = z / cap, cap * np.tanh(z / cap), blur, blur + 8 * cap
    temperature = 1.0 if options.temperature is None else options.temperature
    if options.temperature is not None:
        s, blur = s / temperature, blur / temperature
        if math.frexp(temperature)[0] != 0.5:  # else nothing is rounded
            blur += 2 * np.abs(s[np.isfinite(s)]).max(initial=0)
    s = np.where(there, s, -INF)
    highest = s.max()
    if np.isnan(s).any() or np.isinf(highest):
        return row_of_nan(there, exactly(NAN))
    d = s - highest
    e = np.exp(d)
    tail = np.delete(e, s.argmax()).sum()
    total = 1 + tail
    o = e / total
    # S - e, summed without the e
    others = np.where(np.arange(v) == s.argmax(), tail, total - e)
    # A ratio of two exponentials is off by twice the blur, relatively.
    spread = np.minimum(np.expm1(2 * blur * u) / u, 1e30)  # so that 0 times it is 0
    # `_rows.py`: L is within 2^-22 of max(1, |L|).
    log_normalizer = highest + np.log1p(tail)
    normalizer = Near(log_normalizer, 4 * max(1, abs(log_normalizer)) + blur)
    if has_id and not 0 <= y < v:
        return row_of_nan(there, normalizer)

    y = (np.arange(v) == y).astype(float) if has_id else np.where(there, y, 0)
    uniform, smoothed, unsigned = there / there.sum(), y, np.abs(y)
    if options.label_smoothing is not None:
        smoothed = (1 - options.label_smoothing) * y + options.label_smoothing * uniform
        unsigned = (1 - options.label_smoothing) * np.abs(y) + options.label_smoothing * uniform
    class_weights = np.ones(v) if options.class_weights is None else options.class_weights
    q = smoothed * class_weights
    size_q = unsigned * class_weights
    mass = size_q.sum()

    # `_rows.py`: a cost is two terms that are not negative, within 16 u. It is log1p of a sum of ratios,
    # T, whose spread it takes on by at most T / (1 + T) = 1 - o. The targets and their sum are rounded,
    # too: so all is relative to what they add up, without its signs.
    costs = Near(np.log1p(tail) - d, 16 * (np.log1p(tail) - d) + spread * others / total + lost)
    far = np.where(np.isfinite(d), -d, 0)
    at = q != 0
    loss = (q[at] * costs.value[at]).sum()
    terms = (size_q * (far + np.log1p(tail))).sum()
    error = 16 * terms + spread * (size_q * others / total).sum() + lost * (1 + mass)

    # o sum(q) - q = (e (sum(q) - q) - q (S - e)) / S
    rest = np.where(at & (np.count_nonzero(q) == 1), 0.0, q.sum() - q)
    gradient = (e * rest - q * others) / total
    # `_rows.py`: each element within (6 + distance) 2^-22, of itself if one class is given all the mass.
    lone = options.label_smoothing is None and np.count_nonzero(q) <= 1 and (q >= 0).all()
    size = np.abs(gradient) if lone else o * mass + size_q
    relative = 4 * (6 + far) + spread
    by_s = Near(gradient, size * relative + lost * (1 + mass))
    softmax = Near(o, o * relative + lost)

    by = {}
    if options.z_loss is not None:
        # Both factors of L^2 are off by the error of L, and rounding it adds 4 L^2, less than |L| times
        # that error; of L o likewise.
        at_most = abs(log_normalizer) + normalizer.error * u
        square = Near(log_normalizer**2, 3 * at_most * normalizer.error)
        by["z_loss"] = square
        loss += options.z_loss * square.value
        error += options.z_loss * square.error
        by_s += Near(
            2 * options.z_loss * log_normalizer * o,
            2 * options.z_loss * (at_most * softmax.error + o * normalizer.error),
        )
    if not has_id:
        factor = class_weights * (1 - (options.label_smoothing or 0))
        by["labels"] = pick(there & (class_weights != 0), costs * factor)
    if options.class_weights is not None:
        each = Near(costs.value * smoothed, (costs.error + 4 * costs.value) * unsigned)
        by["class_weights"] = pick(smoothed != 0, each)
    if options.label_smoothing is not None:
        moved, size = class_weights * (uniform - y), class_weights * (uniform + np.abs(y))
        each = Near(costs.value * moved, (costs.error + (4 + sums) * costs.value) * size)
        each = pick(size != 0, each)
        by["label_smoothing"] = Near(each.value.sum(), each.error.sum())

    def through(by_s):
        """By the logits, the cap and the temperature."""
        each = pick(np.isfinite(s), by_s * np.where(np.isfinite(s), s, 0))
        terms = each.error + (sums + blur) * np.abs(each.value)
        by_temperature = Near(-each.value.sum(), terms.sum()) * (1 / temperature)
        by_s = by_s * (1 / temperature)
        return through_cap(by_s) | {"temperature": by_temperature}

    def through_cap(by_s):
        if cap is None:
            return {"logits": pick(there, by_s)}
        slope = 1 / np.cosh(ratio) ** 2
        # 4 e^-2|r| / (1 + e^-2|r|)^2 rounds r, and then some eight times. Moving r by b moves the slope
        # by a factor of e^2b at most.
        twice = 2 * blur_of_z * u / cap
        moved = twice * np.exp(twice) / u
        flat = slope == 0
        relative = np.where(flat, 0, 4 * (4 + np.abs(ratio)) + moved)
        by_z = Near(
            by_s.value * slope,
            by_s.error * slope + np.abs(by_s.value) * (slope * relative + lost),
        )
        # tanh r - r (1 - tanh^2 r): two terms that cancel where r is small.
        bend = np.where(flat, 0, ratio * slope)
        by_cap = Near(
            np.tanh(ratio) - bend,
            8 * np.abs(np.tanh(ratio)) + np.abs(bend) * relative + slope * moved + lost,
        )
        each = pick(there, by_s * by_cap)
        summed = Near(each.value.sum(), (each.error + sums * np.abs(each.value)).sum())
        return {"logits": pick(there, by_z), "softcap": summed}

    has_absent = np.isneginf(d[there]).any()
    by |= through(by_s)
    return Row(Near(loss, error), normalizer, by, through(softmax), has_absent)


def pick(mask, near, elsewhere=0.0):
    """Exactly that elsewhere."""
    return Near(np.where(mask, near.value, elsewhere), np.where(mask, near.error, 0))


def row_of_nan(there, normalizer):
    """All is NaN; by a logit that is masked the derivative is 0 still."""
    by = dict.fromkeys(("z_loss", "softcap", "temperature", "label_smoothing"), exactly(NAN))
    by |= dict.fromkeys(("labels", "class_weights"), exactly(np.full(len(there), NAN)))
    by["logits"] = exactly(np.where(there, NAN, 0))
    return Row(exactly(NAN), normalizer, by, by)


# -- a batch -----------------------------------------------------------------------------------------

EACH = ("logits", "labels", "weights", "temperature")  # what every example has of its own
OF_TARGETS = {"labels", "class_weights", "label_smoothing"}


class Batch:
    """The examples of some logits, [N, V], with their weights and their reduction."""

    def __init__(
        self, logits, arguments, ignore_index, reduction, precision, blur=None, left_out=False
    ):
        (n, v), labels = logits.shape, arguments["labels"]
        where = arguments.get("where", np.ones(n, bool))
        there = where if where.ndim == 2 else np.repeat(where[:, None], v, axis=1)
        options = {k: arguments.get(k) for k in Options._fields}
        options = Options(**{k: None if x is None else wide(x) for k, x in options.items()})
        temperatures = (
            itertools.repeat(None, n) if options.temperature is None else options.temperature
        )
        has_ids = labels.ndim == 1
        logits = logits.astype(np.longdouble)  # before anything is subtracted
        targets = labels.tolist() if has_ids else wide(labels).astype(np.longdouble)
        blur = np.zeros(n) if blur is None else blur
        self.reduction = reduction
        self.rows = [
            row_of(z, y, classes, options._replace(temperature=t), precision, moved, n)
            for z, y, classes, moved, t in zip(
                logits, targets, there, blur, temperatures, strict=True
            )
        ]
        ignored = has_ids and ignore_index is not None and labels == ignore_index
        self.kept = there.any(-1) & ~np.broadcast_to(ignored | left_out, n)
        self.weights = np.where(self.kept, wide(arguments.get("weights", np.ones(n))), 0)
        self.counts = self.weights != 0
        self.losses = pick(self.kept, stack([row.loss for row in self.rows]))
        # What a mean divides by. The loss of a bad label is NaN, and some class weight must be taken.
        of_class, of_classes = np.ones(n), np.zeros(v)
        if has_ids and options.class_weights is not None:
            hot = np.where((labels >= 0) & (labels < v), labels, 0)[:, None] == np.arange(v)
            of_class, of_classes = hot @ options.class_weights, self.weights @ hot
        divisor, self.divisor_by = 1.0, {}
        if reduction == "mean":
            divisor = self.weights @ of_class
            self.divisor_by = {"weights": self.kept * of_class, "class_weights": of_classes}
        self.scale = 1 / divisor if divisor else 0.0
        self.total = pick(divisor != 0, self._times(self.weights, self.losses).sum() * self.scale)

    def _times(self, factor, per_row):
        """Exactly 0 for what does not count."""
        shape = (-1,) + (1,) * (per_row.value.ndim - 1)
        return pick(self.counts.reshape(shape), per_row * factor.reshape(shape))

    def value(self):
        return self._times(self.weights, self.losses) if self.reduction == "none" else self.total

    def normalizers(self):
        return pick(self.counts, stack([row.normalizer for row in self.rows]))

    def pull(self, name, g, g_normalizers=None):
        """By that argument the derivative of the value, times `g`, and the normalizers, times theirs."""
        factor = g * self.scale
        if name == "weights":
            near = pick(self.kept, self.losses * factor)
        else:
            near = self._times(self.weights * factor, stack([row.by[name] for row in self.rows]))
            if g_normalizers is not None and name in ("logits", "softcap", "temperature"):
                by = stack([row.normalizer_by[name] for row in self.rows])
                near += self._times(g_normalizers, by)
            if name not in EACH:
                near = near.sum(0)
        if name in self.divisor_by:  # (A / D)' = (A' - (A / D) D') / D
            near += self.total * (-factor * self.divisor_by[name])
        return near

    def push(self, tangents):
        """The tangents of the value, and of the normalizers."""

        def along(field, i):
            by = getattr(self.rows[i], field)
            own = {k: t[i] if k in EACH else t for k, t in tangents.items() if k in by}
            if self.rows[i].has_absent and own.keys() & OF_TARGETS:
                return exactly(NAN)  # the infinite cost times a tangent that may be 0
            dots = [(by[k] * t).sum() for k, t in own.items()]
            return stack(dots).sum() if dots else exactly(0)

        n = len(self.rows)
        normalizers = pick(self.counts, stack([along("normalizer_by", i) for i in range(n)]))
        near = self._times(self.weights, stack([along("by", i) for i in range(n)]))
        if "weights" in tangents:
            near += pick(self.kept, self.losses * tangents["weights"])
        if self.reduction == "none":
            return near, normalizers
        near = pick(self.scale != 0, near.sum() * self.scale)
        for k in self.divisor_by.keys() & tangents.keys():
            near += self.total * (-self.scale * (tangents[k] * self.divisor_by[k]).sum())
        return near, normalizers


# -- inputs and answers ------------------------------------------------------------------------------


# A generator of random choices. Hypothesis itself would try small and similar ones first, and a program
# takes a second to compile.
EVENLY = st.randoms(use_true_random=True)


def some_of(random, *names):
    """Each as often as not."""
    return frozenset(name for name in names if random.random() < 0.5)


def draw_options(r, names, n, v, dtype):
    """Those by these names, in numbers whose products and sums a float holds exactly."""
    draws = {
        "label_smoothing": lambda: r.choice([0.0, 0.1, 1.0]),
        "class_weights": lambda: r.choice([0.0, 0.25, 1.0, 3.0], v),
        "weights": lambda: r.choice([0.0, 1.0, -0.5, 2.0], n),
        "z_loss": lambda: r.choice([0.0, 1e-4, 0.5]),
        "softcap": lambda: r.choice([0.5, 4.0, 30.0]),
        "temperature": lambda: r.choice([0.5, 1.0, 3.0], n),
    }
    return {k: np.asarray(draws[k](), dtype) for k in OPTIONS if k in names}


def draw_labels(r, kind, n, v, dtype, bad):
    """Some of them those `bad` ones, or distributions, whose sums are not one."""
    if kind == "integer":
        labels = r.integers(0, v, n, dtype=np.int32)
        spoilt = r.choice([*bad, 0], n).astype(np.int32)
        return np.where(r.random(n) < 0.15 * bool(bad), spoilt, labels)
    y = r.uniform(-0.5, 1, (n, v)) * (r.random((n, 1)) < 0.5)
    y[:, 0] += y.sum(-1) == 0
    return y.astype(jnp.dtype(dtype))


def draw_cotangent(r, *shape):
    return r.choice([1.0, -0.5, 0.25, 2.0, 0.0], shape)


def draw_tangent(r, x):
    return r.choice([1.0, -0.5, 0.25, 2.0], x.shape).astype(x.dtype)


def nothing(value):
    return np.zeros_like(value, bool)


def what_is_not_finite(value):
    return ~np.isfinite(value)


def assert_near(what, got, want, precision, excused=nothing):
    """`excused` tells of the contract's values those that are not determined, as 0 times infinity."""
    want = want.rounded(got.dtype, precision)
    value, error = np.atleast_1d(want.value, want.error)
    largest, got = float(jnp.finfo(got.dtype).max), np.atleast_1d(wide(got))
    assert got.shape == value.shape, what
    with np.errstate(invalid="ignore"):
        allowed = precision.u * error
        near = np.abs(got - value) <= allowed
        overflows = (np.abs(value) + allowed >= largest) & (got == np.copysign(INF, value))
    same = (got == value) | (np.isnan(got) & np.isnan(value))
    good = near | overflows | same | excused(value)
    assert good.all(), f"{what}: {got[~good][:3]} for {value[~good][:3]} +- {allowed[~good][:3]}"
