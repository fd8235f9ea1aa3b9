"""The differentiation rule of the losses on logits, for targets of every kind.

It gives the loss, the log-normalizer and, if asked for, the entropy of every row, and honours a
cotangent of each. With `d = z - max`, softmax o and `M = -sum_j o_j d_j`,

    H = log1p(tail) + M        dH/dz_j = -o_j (log o_j + H) = -o_j (d_j + M)

so all that a row's cotangent has besides `g_loss (o sum(y) - y)` is `(constant + slope d) o`, where

    constant = g_log_normalizer - g_entropy M        slope = -g_entropy

and there is no slope where nobody uses the entropy.

Rows that do not count have a derivative of exactly 0, whatever their logits hold: the caller gives them
a cotangent of 0 and replaces their values. What is saved for the derivative is the arguments and some
numbers a row. Those are [N...] here: XLA for CPU is slow on [N, 1]."""

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from . import _axis, _backend, _rows
from ._elementary import below
from ._rows import Rows, Statistics, Targets


class Out(NamedTuple):
    """Of each row, [N...]."""

    loss: Array
    log_normalizer: Array
    entropy: Array | None  # if it is asked for
    target_entropy: Array | None  # of a teacher
    kept: list[Array]  # empty without a mask, else 1.0 for rows that keep a class, or 0.0


class Read(NamedTuple):
    """What a kind of targets makes of rows, [N...]."""

    loss: Array
    stats: Statistics
    numbers: Any  # what else the derivative takes
    counts: Array | None
    kept: list[Array]
    target_entropy: Array | None = None


class Residuals(NamedTuple):
    rows: Rows
    targets: Any
    counts: Array | None  # [N...]
    stats: Statistics  # [N...] each
    numbers: Any
    mean: Array | None  # M, [N...]


class Factors(NamedTuple):
    """Of `g_loss (o sum(y) - y) + (constant + slope d) o`, [N...]."""

    g_loss: Array
    constant: Array
    slope: Array | None


class Kind(abc.ABC):
    """Targets of one kind: their loss and its derivatives."""

    @abc.abstractmethod
    def read(self, rows: Rows, targets: Any, counts: Array | None) -> Read: ...

    @abc.abstractmethod
    def pull(self, residuals: Residuals, factors: Factors) -> tuple[Rows, Any]:
        """The cotangents of rows and targets."""

    @abc.abstractmethod
    def of_values(self, residuals: Residuals, factors: Factors) -> Array:
        """The cotangent of `rows.values()`, [N, V], subtracting by `below`."""

    def along(self, residuals: Residuals, g_loss: Array, moving: dict[int, Any]) -> Array | None:
        """The derivative of the loss along a tangent of the targets, times `g_loss`, [N, 1]; None if
        nothing flows into them. `moving` has the tangent under 1."""
        return None


def statistics(operation, rows: Rows, labels: Array | Targets, counts: Array | None):
    """The statistics of whole rows, [N...]: `kept`, and which rows count. Those that keep no class do
    not: their maximum, -inf, would be NaN in derivatives."""
    whole = _rows.whole_statistics(rows, labels, rows.axis_name, operation)
    numbers = [x.squeeze(rows.axes) for x in whole]
    if rows.mask is None:
        return counts, [], numbers
    *numbers, kept = numbers
    is_kept = kept > 0
    counts = is_kept if counts is None else counts & is_kept
    return counts, [kept], [jnp.where(is_kept, x, 0) for x in numbers]


def spread(rows: Rows, highest: Array) -> Array:
    """The sum of `e^d d` of whole rows, [N...]."""
    (here,) = _backend.spread(rows, rows.expand(highest))
    return _axis.total(rows.axis_name, here.squeeze(rows.axes))


# -- the rule, in both modes --------------------------------------------------------------------------


def call(program: Callable[[Any], Any], inputs: Any) -> Any:
    """`program(inputs)`. If JAX refuses forward mode, because of `jax.custom_vjp`, name our option."""
    try:
        return program(inputs)
    except TypeError as error:
        if "custom_vjp" in str(error) and not inputs.options.forward_mode:
            error.add_note(
                "jax_sce: for jvp, jacfwd, linearize or check_grads pass forward_mode=True"
            )
        raise


def _fwd(kind: Kind, has_entropy: bool, rows: Rows, targets: Any, counts: Array | None):
    read = kind.read(rows, targets, counts)
    stats, entropy, mean = read.stats, None, None
    if has_entropy:
        of_row = spread(rows, stats.max)
        for kept in read.kept:
            of_row = jnp.where(kept > 0, of_row, 0)
        entropy, mean = stats.entropy(of_row), -of_row / (1 + stats.tail)
    out = Out(read.loss, stats.log_normalizer(), entropy, read.target_entropy, read.kept)
    return out, Residuals(rows, targets, read.counts, stats, read.numbers, mean)


def _factors(residuals: Residuals, g: tuple[Array, Array, Array | None]) -> Factors:
    g_loss, constant, g_entropy = g
    if g_entropy is None:
        return Factors(g_loss, constant, None)
    return Factors(g_loss, constant - g_entropy * residuals.mean, -g_entropy)  # type: ignore[operator]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rule(kind: Kind, has_entropy: bool, rows: Rows, targets: Any, counts: Array | None) -> Out:
    return _fwd(kind, has_entropy, rows, targets, counts)[0]


def _rule_fwd(kind, has_entropy, *args):
    is_leaf = lambda x: isinstance(x, CustomVJPPrimal)  # noqa: E731
    return _fwd(kind, has_entropy, *jax.tree.map(lambda x: x.value, args, is_leaf=is_leaf))


def _rule_bwd(kind, has_entropy, residuals, cotangents):
    zeros = jnp.zeros_like(residuals.stats.tail)
    g = [zeros if isinstance(x, SymbolicZero) else x for x in cotangents[:2]]
    is_used = has_entropy and not isinstance(cotangents.entropy, SymbolicZero)
    g.append(cotangents.entropy if is_used else None)
    g = _axis.total_cotangent(residuals.rows.axis_name, tuple(g))
    return *kind.pull(residuals, _factors(residuals, g)), None


rule.defvjp(_rule_fwd, _rule_bwd, symbolic_zeros=True)


_OF_ROWS = "jax_sce: numbers of each row"


@functools.partial(
    jax.checkpoint,
    static_argnums=(0, 1),
    policy=jax.checkpoint_policies.save_only_these_names(_OF_ROWS),
)
def rule_forward(
    kind: Kind, has_entropy: bool, rows: Rows, targets: Any, counts: Array | None
) -> Out:
    """The same maps, contracted with a tangent. Reverse mode over that keeps the arguments and the row
    statistics, and no array of the logits' size. (A `jax.checkpoint` of the tangents alone cannot be
    transposed under `jax_remat3`.)"""
    return _contracted(kind, has_entropy, rows, targets, counts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _contracted(kind, has_entropy, *args):
    return _fwd(kind, has_entropy, *args)[0]


@functools.partial(_contracted.defjvp, symbolic_zeros=True)
def _rule_jvp(kind, has_entropy, primals, dots):
    from jax.ad_checkpoint import checkpoint_name

    out, residuals = _fwd(kind, has_entropy, *primals)
    of_rows = jax.tree.map(functools.partial(checkpoint_name, name=_OF_ROWS), residuals[2:])
    residuals = Residuals(*residuals[:2], *of_rows)

    # Leave out arguments that are not differentiated: infinity times their tangent, 0, is NaN.
    moving = _rows.moving(primals[:2], dots[:2])
    rows, one = residuals.rows, jnp.ones_like(residuals.stats.tail)
    zero, z_dot = jnp.zeros_like(one), None
    if 0 in moving:
        z_dot = _rows.tangent_of(Rows.values, (rows,), {0: moving[0]})

    def along(g):
        total, factors = rows.expand(zero), _factors(residuals, g)
        if z_dot is not None:
            of_values = kind.of_values(residuals, factors)
            total += _rows.sum_classes(rows, of_values * z_dot)
        of_targets = kind.along(residuals, factors.g_loss, moving) if 1 in moving else None
        if of_targets is not None:
            total += of_targets
        return total.squeeze(rows.axes)

    each = [along((one, zero, None)), along((zero, one, None))]
    if has_entropy:
        each.append(along((zero, zero, one)))
    moved = [*_axis.total(rows.axis_name, jnp.stack(each)), None][:3]
    constants = jax.tree.map(jnp.zeros_like, out[3:])
    return out, Out(*moved, *constants)


# -- class ids, [N...], -1 for a bad one --------------------------------------------------------------


class _Ids(Kind):
    def read(self, rows, targets, counts):
        counts, kept, (highest, tail, at_label) = statistics(
            _backend.label_statistics, rows, rows.expand(targets), counts
        )
        stats = Statistics(highest, tail)
        distance = jnp.where(targets < 0, jnp.nan, at_label - highest)
        return Read(stats.label_loss(distance), stats, (distance,), counts, kept)

    def _operands(self, residuals, factors):
        """Of `label_cotangent`, all but the rows."""
        rows, labels, counts, stats, (distance,), _ = residuals
        numbers = [
            None if x is None else rows.expand(_rows.counted(counts, x, stats.tail))
            for x in stats.label_factors(distance, *factors)
        ]
        return rows.expand(labels), rows.expand(stats.max), *numbers

    def pull(self, residuals, factors):
        operands = self._operands(residuals, factors)
        return _backend.label_cotangent(residuals.rows, *operands), None

    def of_values(self, residuals, factors):
        operands = self._operands(residuals, factors)
        return _rows.label_cotangent_of_values(residuals.rows, *operands, subtract=below)


# -- distributions over the classes, `Targets` --------------------------------------------------------


def target_factors(residuals: Residuals, factors: Factors, probe: Array) -> Factors:
    """[N, 1] each. A row whose probe is not finite is NaN, 0 times that too; but if it does not count,
    it is 0."""
    rows, counts, (g_loss, constant, slope) = residuals.rows, residuals.counts, factors

    def of_row(x: Array) -> Array:
        return rows.expand(_rows.counted(counts, x, probe))

    g_loss = jnp.where((g_loss == 0) & ~jnp.isfinite(probe), jnp.nan, g_loss)
    return Factors(of_row(g_loss), of_row(constant), None if slope is None else of_row(slope))


def costs(residuals: Residuals, targets: Targets, g_loss: Array) -> Array:
    """The cotangent of the targets' values, [N, V]."""
    rows, counts = residuals.rows, residuals.counts
    of_each = _rows.target_costs(rows, targets, *map(rows.expand, (*residuals.stats, g_loss)))
    return _rows.counted(None if counts is None else rows.expand(counts), of_each, of_each)


class _Distributions(Kind):
    def read(self, rows, targets, counts):
        counts, kept, (highest, tail, target_sum, target_dot) = statistics(
            _backend.target_statistics, rows, targets, counts
        )
        stats = Statistics(highest, tail)
        loss = stats.target_loss(target_sum, target_dot)
        return Read(loss, stats, (target_sum,), counts, kept)

    def _operands(self, residuals, factors):
        """Of `target_cotangent`, all but the rows."""
        rows, targets, _, stats, (target_sum,), _ = residuals
        of_row = map(rows.expand, (*stats, target_sum))
        return targets, *of_row, *target_factors(residuals, factors, stats.tail + target_sum)

    def pull(self, residuals, factors):
        rows, targets = residuals[:2]
        of_each = costs(residuals, targets, factors.g_loss)
        of_targets = _rows.targets_cotangent(rows, targets, of_each)
        return _backend.target_cotangent(rows, *self._operands(residuals, factors)), of_targets

    def of_values(self, residuals, factors):
        operands = self._operands(residuals, factors)
        return _rows.target_cotangent_of_values(residuals.rows, *operands, subtract=below)

    def along(self, residuals, g_loss, moving):
        rows, targets = residuals[:2]
        dot = _rows.tangent_of(Targets.values, (targets, rows), {0: moving[1]})
        return _rows.sum_classes(rows, costs(residuals, targets, g_loss) * dot)


IDS, DISTRIBUTIONS = _Ids(), _Distributions()
