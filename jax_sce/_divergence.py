"""The divergence between the softmaxes of two rows, accurate relative to its own size.

With the softmax o of logits z, the softmax t of a teacher's logits z', and the log-ratio

    r_j = log t_j - log o_j = (z'_j - max z') - (z_j - max z) - c,    c = log1p(tail') - log1p(tail)

the Kullback-Leibler divergence is `sum_j t_j r_j`. Where o and t nearly agree, the divergence is of
second order in r, and the terms of this sum cancel. But `t_j (e^{-r_j} - 1) = o_j - t_j` sums to 0.
If we add it, no term is negative:

    KL = sum_j t_j (e^{-r_j} - 1 + r_j)
    dKL/dz_j = o_j - t_j = t_j (e^{-r_j} - 1)

The cross-entropy is KL plus the entropy of t, and neither is negative.

To compute r we first subtract the rows from each other, which is exact or gives small numbers, and keep
the rounding error. Only c is inaccurate, because the logarithms of the normalizers are rounded. The sum
that should be 0 shows by how much: if it is s, then c must be corrected to `c - log1p(s)`, and KL is
smaller by `s - log1p(s)`.

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
    """`t (e^{-r} - 1 + r)`, `t (e^{-r} - 1)` (which is o - t), and o, [N, V] each."""
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
    """The sums of `t (e^{-r} - 1 + r)` and of `t (e^{-r} - 1)` over the classes on this device, [N, 1],
    given both maxima and tails, and c."""
    gaps = _rows.sum_classes(rows, _apart(rows, teacher, *args)[0])
    # XLA for CPU would write the terms that both sums share to memory. The barrier makes it compute them
    # twice. (Each array has a barrier of its own, because JAX cannot transpose one barrier for several
    # arrays if some are constants.)
    rows, teacher = jax.tree.map(lax.optimization_barrier, (rows, teacher))
    return gaps, _rows.sum_classes(rows, _apart(rows, teacher, *args)[1])


def divergence_cotangent(rows: Rows, teacher: Rows, *args: Any) -> list[Array]:
    """`g_loss (o - t) + (constant + slope (z - max)) o` as the cotangent of `rows`. The slope may be
    None. If all factors are 0 the row is 0, whatever its logits hold."""
    rows, teacher = lax.optimization_barrier((rows, teacher))
    return _rows.cotangent_of(rows, divergence_cotangent_of_values(rows, teacher, *args))


def divergence_cotangent_of_values(
    rows: Rows, teacher: Rows, highest: Array, tail: Array, teacher_highest: Array,
    teacher_tail: Array, shift: Array, g_loss: Array, constant: Array, slope: Array | None,
) -> Array:  # fmt: skip
    """The cotangent of `rows.values()`, [N, V]: the formula of `divergence_cotangent`."""
    of_both = highest, tail, teacher_highest, teacher_tail, shift
    _, less, o = _apart(rows, teacher, *of_both)
    of_softmax = _rows.affine(constant, slope, below(rows.values(), highest)) * o
    is_lost = (g_loss == 0) & (constant == 0) & ~jnp.isfinite(tail + teacher_tail)
    return jnp.where(is_lost, 0, g_loss * less + of_softmax)
