"""The loss and derivatives for `jax_sce.Teacher`: the targets are the softmax of other rows."""

from typing import NamedTuple

import jax.numpy as jnp

from . import _axis, _backend, _divergence
from ._elementary import expm1_remainder
from ._rows import Rows, Statistics
from ._rules import Forward, Kind, spread, statistics, target_factors


class TeacherRows(NamedTuple):
    rows: Rows
    divergence: bool  # compute the divergence instead of the cross-entropy


class _Teacher(Kind):
    """`targets` are the `Rows` of the teacher, which are constants."""

    def __init__(self, divergence: bool):
        self.divergence = divergence

    def forward(self, rows, targets, counts):
        none = jnp.full(rows.row_shape, -1, jnp.int32)
        counts, kept, own = statistics(_backend.label_statistics, rows, none, counts)
        _, _, others = statistics(_backend.label_statistics, targets, none, None)
        stats, of_teacher = Statistics(*own[:2]), Statistics(*others[:2])
        shift = jnp.log1p(of_teacher.tail) - jnp.log1p(stats.tail)
        of_row = [rows.expand(x) for x in (*stats, *of_teacher, shift)]
        sums = [x.squeeze(rows.axes) for x in _backend.divergence_sums(rows, targets, *of_row)]
        gaps, rest = _axis.total(rows.axis_name, jnp.stack(sums))
        moved = jnp.log1p(rest)
        loss = gaps - expm1_remainder(-moved)
        entropy = of_teacher.entropy(spread(targets, of_teacher.max))
        loss = loss if self.divergence else loss + entropy
        return Forward(loss, stats, (*of_teacher, shift - moved), counts, kept, entropy)

    def _operands(self, residuals, factors):
        rows, teacher, _, stats, (highest, tail, shift), _ = residuals
        of_row = [rows.expand(x) for x in (*stats, highest, tail, shift)]
        return rows, teacher, *of_row, *target_factors(residuals, factors, stats.tail + tail)

    def vjp(self, residuals, factors):
        return _backend.divergence_cotangent(*self._operands(residuals, factors)), None

    def vjp_of_values(self, residuals, factors):
        return _divergence.divergence_cotangent_of_values(*self._operands(residuals, factors))


CROSS_ENTROPY, DIVERGENCE = _Teacher(divergence=False), _Teacher(divergence=True)
