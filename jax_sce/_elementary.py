"""Functions of numbers whose rounding or whose derivative is written by hand."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax


def difference(a: Array, b: Array) -> tuple[Array, Array]:
    """`a - b`, and what its rounding lost; nothing where it is not finite."""
    rounded = a - b
    finite = jnp.isfinite(rounded)
    a, b, known = (jnp.where(finite, x, 0) for x in (a, b, rounded))
    shift = known - a
    return rounded, (a - (known - shift)) - (b + shift)  # exact: Knuth's two-sum


def exp_difference(a: Array, b: Array) -> Array:
    """`exp(a - b)`, without the error of rounding `a - b`, which grows with the difference."""
    rounded, error = difference(a, b)
    return jnp.exp(rounded) * (1 + error)


def expm1_remainder(x: Array) -> Array:
    """`e^{-x} - 1 + x` by its series, for |x| of at most 3/2, where it would cancel."""
    terms = 22 if x.dtype == jnp.float64 else 13  # the next one is below a rounding
    series = jnp.zeros_like(x)
    for n in range(terms, 1, -1):
        series = series * -x + 1 / math.factorial(n)
    return series * jnp.square(x)


def exp_below(x: Array, highest: Array) -> tuple[Array, Array]:
    """`exp(x - highest)`, without the error of rounding that, and `x - highest`, for x that is not
    larger. Where the one is 0 anyway, the other is -1000 at least. It is arithmetic alone: where
    anything is selected or compared, XLA for CPU writes an array before it sums."""
    x = jnp.maximum(x, highest - 1000)
    distance = below(x, highest)
    shift = distance - x
    error = (x - (distance - shift)) - (highest + shift)
    return jnp.exp(distance) * (1 + error), distance


@jax.custom_jvp
def below(x: Array, highest: Array) -> Array:
    """`x - highest`, for x that is not larger: never positive, and 0 where they are equal. `highest` is
    a constant to differentiation.

    A compiler that contracts the product in `x * t - highest` cannot do so past the minimum."""
    return jnp.minimum(x, highest) - highest


@below.defjvp
def _below_jvp(primals, tangents):
    out = below(*primals)
    return out, jnp.broadcast_to(tangents[0], out.shape)


@jax.custom_jvp
def soft_cap(x: Array, cap: Array) -> Array:
    """`cap * tanh(x / cap)`, with a derivative that does not cancel (`1 - tanh^2` does)."""
    return cap * jnp.tanh(x / cap)


@soft_cap.defjvp
def _soft_cap_jvp(primals, tangents):
    (x, cap), (x_dot, cap_dot) = primals, tangents
    ratio = x / cap
    decay = jnp.exp(-2 * jnp.abs(ratio))
    slope = 4 * decay / (1 + decay) ** 2  # sech^2
    # A logit of NaN makes its row's cotangent NaN already; a row that does not count must stay at 0.
    known = ~jnp.isnan(ratio)
    by_x = jnp.where(known, slope, 0)
    by_cap = jnp.where(known, jnp.tanh(ratio) - jnp.where(slope == 0, 0, ratio * slope), 0)
    return soft_cap(x, cap), x_dot * by_x + cap_dot * by_cap


@jax.custom_jvp
def temper(x: Array, temperature: Array) -> Array:
    """`x / temperature`. Its derivative by the temperature leaves out quotients that are not finite: an
    absent class has none, and a row that does not count must stay at 0."""
    return x / temperature


@temper.defjvp
def _temper_jvp(primals, tangents):
    (x, temperature), (x_dot, temperature_dot) = primals, tangents
    out = temper(x, temperature)
    by_temperature = jnp.where(jnp.isfinite(out), out, 0) / temperature
    return out, x_dot / temperature - temperature_dot * by_temperature


@jax.custom_jvp
def weigh(targets: Array, class_weights: Array) -> Array:
    """The product, with a derivative in which a factor of 0 leaves out even an infinite cost."""
    return targets * class_weights


@weigh.defjvp
def _weigh_jvp(primals, tangents):
    (y, w), (y_dot, w_dot) = primals, tangents
    return weigh(y, w), jnp.where(w == 0, 0, y_dot * w) + jnp.where(y == 0, 0, y * w_dot)


def times(weight: Array, loss: Array) -> Array:
    """`weight * loss`, where a weight of 0 leaves out even a loss of +inf. NaN stays NaN.

    The derivative with respect to a weight of 0 is the loss still, wherever that is finite.
    """
    return weight * jnp.where((weight == 0) & jnp.isposinf(loss), 0, loss)


def to_bits(x: Array) -> Array:
    """The bits of a 16-bit type, for a gather or scatter: XLA's CPU compiler would first widen all of
    the operand. Not to be differentiated."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Array, dtype: jnp.dtype) -> Array:
    return lax.bitcast_convert_type(x, dtype) if dtype.itemsize == 2 else x
