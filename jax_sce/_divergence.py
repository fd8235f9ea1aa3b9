"""The divergence of a row's softmax from another's, accurate to its own size.

With the softmax o of logits z, the softmax t of a teacher's logits z', and the log-ratio

    r_j = log t_j - log o_j = (z'_j - max z') - (z_j - max z) - c,    c = log1p(tail') - log1p(tail)

the Kullback-Leibler divergence is `sum_j t_j r_j`. Where the two nearly agree it is of the second
order in r, and that sum cancels. But the sum of `t_j (e^{-r_j} - 1)`, of all that o has less all that t
has, is 0. Added, it leaves no term that is negative:

    KL = sum_j t_j (e^{-r_j} - 1 + r_j)
    dKL/dz_j = o_j - t_j = t_j (e^{-r_j} - 1)

The cross-entropy between the two is the sum of KL and the entropy of t, neither negative.

r takes differences between the two rows first, which are short or exact, and keeps what rounding them
lost. Only c is off, by roundings of the normalizers' logarithms. That shows in the sum that should be 0:
if it is s, then c should be `c - log1p(s)`, and KL is less by `s - log1p(s)`.

References: Kullback and Leibler (1951), "On information and sufficiency"; Hinton et al. (2015),
arXiv:1503.02531, for distillation."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _rows
from ._elementary import below, difference, exp_below, expm1_remainder
from ._rows import Rows


def _apart(
    rows: Rows, teacher: Rows, highest: Array, tail: Array, teacher_highest: Array,
    teacher_tail: Array, shift: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """`t (e^{-r} - 1 + r)`, `t (e^{-r} - 1)` or o - t, and o, [N, V] each."""
    z, of_teacher = rows.values(), teacher.values()
    o = exp_below(z, highest)[0] / (1 + tail)
    t = exp_below(of_teacher, teacher_highest)[0] / (1 + teacher_tail)
    apart, lost = difference(of_teacher, z)
    maxima, lost_of_maxima = difference(teacher_highest, highest)
    r = (apart - maxima) + (lost - lost_of_maxima) - shift
    r = jnp.where(t == 0, -jnp.inf, r)  # `t e^{-r}` is o
    is_near = jnp.abs(r) < 1.5
    gap = t * expm1_remainder(jnp.where(is_near, r, 0))
    t_r = t * jnp.where(t == 0, 0, r)
    less = jnp.where(is_near, gap - t_r, o - t)
    return jnp.where(is_near, gap, less + t_r), less, o


def divergence_sums(rows: Rows, teacher: Rows, *args: Array) -> tuple[Array, Array]:
    """The sums of `t (e^{-r} - 1 + r)` and of `t (e^{-r} - 1)`, [N, 1], of the classes here, given both
    maxima and tails, and c."""
    gaps = _rows.sum_classes(rows, _apart(rows, teacher, *args)[0])
    # XLA for CPU would write what both sums share to memory; the barrier has it compute that again.
    # (JAX cannot transpose a barrier for several arrays where some are constants.)
    rows, teacher = jax.tree.map(lax.optimization_barrier, (rows, teacher))
    return gaps, _rows.sum_classes(rows, _apart(rows, teacher, *args)[1])


def divergence_cotangent(rows: Rows, teacher: Rows, *args: Any) -> list[Array]:
    """`g_loss (o - t) + (constant + slope (z - max)) o` as the cotangent of `rows`. The slope may be
    None. Where all factors are 0 the row is 0, whatever its logits hold."""
    rows, teacher = lax.optimization_barrier((rows, teacher))
    return _rows.cotangent_of(rows, divergence_cotangent_of_values(rows, teacher, *args))


def divergence_cotangent_of_values(
    rows: Rows, teacher: Rows, highest: Array, tail: Array, teacher_highest: Array,
    teacher_tail: Array, shift: Array, g_loss: Array, constant: Array, slope: Array | None,
) -> Array:  # fmt: skip
    """The same of `rows.values()`, [N, V]."""
    of_both = highest, tail, teacher_highest, teacher_tail, shift
    _, less, o = _apart(rows, teacher, *of_both)
    of_softmax = _rows.affine(constant, slope, below(rows.values(), highest)) * o
    is_lost = (g_loss == 0) & (constant == 0) & ~jnp.isfinite(tail + teacher_tail)
    return jnp.where(is_lost, 0, g_loss * less + of_softmax)
