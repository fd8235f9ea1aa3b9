"""Elementwise functions that correct their rounding errors, or have a derivative rule of their own."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax


def difference(a: Array, b: Array) -> tuple[Array, Array]:
    """`a - b` and its rounding error, which is 0 where the difference is not finite."""
    rounded = a - b
    finite = jnp.isfinite(rounded)
    a, b, known = (jnp.where(finite, x, 0) for x in (a, b, rounded))
    shift = known - a
    return rounded, (a - (known - shift)) - (b + shift)  # exact: Knuth's two-sum


def exp_difference(a: Array, b: Array) -> Array:
    """`exp(a - b)`, corrected for the rounding error of `a - b`, which grows with the difference."""
    rounded, error = difference(a, b)
    return jnp.exp(rounded) * (1 + error)


def expm1_remainder(x: Array) -> Array:
    """`e^{-x} - 1 + x` for |x| <= 3/2, by its series, because the formula loses digits there."""
    terms = 22 if x.dtype == jnp.float64 else 13  # the next term is below the rounding error
    series = jnp.zeros_like(x)
    for n in range(terms, 1, -1):
        series = series * -x + 1 / math.factorial(n)
    return series * jnp.square(x)


def exp_below(x: Array, highest: Array) -> tuple[Array, Array]:
    """`exp(x - highest)`, corrected for the rounding of the difference, and `x - highest` itself, for
    x <= highest. The difference is cut off at -1000, where the exponential is 0 anyway. A select or a
    comparison is avoided, because XLA for CPU would then write an array before summing it."""
    x = jnp.maximum(x, highest - 1000)
    distance = below(x, highest)
    shift = distance - x
    error = (x - (distance - shift)) - (highest + shift)
    return jnp.exp(distance) * (1 + error), distance


@jax.custom_jvp
def below(x: Array, highest: Array) -> Array:
    """`x - highest` for x <= highest: never positive, and 0 where they are equal. Its derivative treats
    `highest` as a constant.

    The minimum keeps a compiler from contracting `x * t - highest` into a fused multiply-add."""
    return jnp.minimum(x, highest) - highest


@below.defjvp
def _below_jvp(primals, tangents):
    out = below(*primals)
    return out, jnp.broadcast_to(tangents[0], out.shape)


@jax.custom_jvp
def soft_cap(x: Array, cap: Array) -> Array:
    """`cap * tanh(x / cap)`, with an accurate derivative (`1 - tanh^2` would lose digits)."""
    return cap * jnp.tanh(x / cap)


@soft_cap.defjvp
def _soft_cap_jvp(primals, tangents):
    (x, cap), (x_dot, cap_dot) = primals, tangents
    ratio = x / cap
    decay = jnp.exp(-2 * jnp.abs(ratio))
    slope = 4 * decay / (1 + decay) ** 2  # sech^2
    # A NaN logit already makes the cotangent of its row NaN. In a row that does not count, it must not:
    # so the derivative here is 0.
    known = ~jnp.isnan(ratio)
    by_x = jnp.where(known, slope, 0)
    by_cap = jnp.where(known, jnp.tanh(ratio) - jnp.where(slope == 0, 0, ratio * slope), 0)
    return soft_cap(x, cap), x_dot * by_x + cap_dot * by_cap


@jax.custom_jvp
def temper(x: Array, temperature: Array) -> Array:
    """`x / temperature`. Its derivative with respect to the temperature ignores quotients that are not
    finite: an absent class contributes nothing, and a row that does not count must stay 0."""
    return x / temperature


@temper.defjvp
def _temper_jvp(primals, tangents):
    (x, temperature), (x_dot, temperature_dot) = primals, tangents
    out = temper(x, temperature)
    by_temperature = jnp.where(jnp.isfinite(out), out, 0) / temperature
    return out, x_dot / temperature - temperature_dot * by_temperature


@jax.custom_jvp
def weigh(targets: Array, class_weights: Array) -> Array:
    """`targets * class_weights`. In the derivative, a factor of 0 removes even an infinite cost."""
    return targets * class_weights


@weigh.defjvp
def _weigh_jvp(primals, tangents):
    (y, w), (y_dot, w_dot) = primals, tangents
    return weigh(y, w), jnp.where(w == 0, 0, y_dot * w) + jnp.where(y == 0, 0, y * w_dot)


def times(weight: Array, loss: Array) -> Array:
    """`weight * loss`, but a weight of 0 removes even a loss of +inf. NaN stays NaN.

    The derivative with respect to a weight of 0 is still the loss, if that is finite.
    """
    return weight * jnp.where((weight == 0) & jnp.isposinf(loss), 0, loss)


def to_bits(x: Array) -> Array:
    """A 16-bit array as integers, to gather from it or scatter into it: XLA for CPU would first widen a
    whole float operand. Other arrays are returned as they are. It has no derivative."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Array, dtype: jnp.dtype) -> Array:
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, dtype) if dtype.itemsize == 2 else x
