"""The differentiation rule of the losses on logits, for every kind of targets.

It computes the loss, the log-normalizer and, if asked for, the entropy of every row, and differentiates
each. With `d = z - max`, softmax o and `M = -sum_j o_j d_j`, the entropy is

    H = log1p(tail) + M        dH/dz_j = -o_j (log o_j + H) = -o_j (d_j + M)

so a row's cotangent is `g_loss (o sum(y) - y) + (constant + slope d) o` with

    constant = g_log_normalizer - g_entropy M        slope = -g_entropy

and without a slope if the entropy is not used.

A row that does not count has a derivative of exactly 0, even if its logits are infinite or NaN: the
caller gives it a cotangent of 0 and replaces its values. The residuals are the arguments and a few
numbers per row. These are [N...], because XLA for CPU is slow on [N, 1]."""

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
    """The results for each row, [N...]."""

    loss: Array
    log_normalizer: Array
    entropy: Array | None  # with `return_aux`
    target_entropy: Array | None  # for a teacher
    kept: list[Array]  # with a mask, one array: 1.0 for rows that keep a class, 0.0 for others


class Forward(NamedTuple):
    """What the forward pass of a kind of targets returns, [N...] each."""

    loss: Array
    stats: Statistics
    numbers: Any  # further residuals, of this kind of targets
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
    """The factors in `g_loss (o sum(y) - y) + (constant + slope d) o`, [N...]."""

    g_loss: Array
    constant: Array
    slope: Array | None


class Kind(abc.ABC):
    """One kind of targets: the loss and its derivatives."""

    @abc.abstractmethod
    def forward(self, rows: Rows, targets: Any, counts: Array | None) -> Forward: ...

    @abc.abstractmethod
    def vjp(self, residuals: Residuals, factors: Factors) -> tuple[Rows, Any]:
        """The cotangents of rows and targets."""

    @abc.abstractmethod
    def vjp_of_values(self, residuals: Residuals, factors: Factors) -> Array:
        """The cotangent of `rows.values()`, [N, V]. It subtracts the maximum by `below`."""

    def targets_jvp(
        self, residuals: Residuals, g_loss: Array, moving: dict[int, Any]
    ) -> Array | None:
        """`g_loss` times the tangent of the loss, [N, 1], given `moving[1]`, the tangent of the targets.
        None if the targets are constant."""
        return None


def statistics(operation, rows: Rows, labels: Array | Targets, counts: Array | None):
    """`counts`, `kept`, and the statistics over the classes of all devices, [N...]. Rows that keep no
    class do not count: their maximum, -inf, would make derivatives NaN."""
    whole = _rows.whole_statistics(rows, labels, rows.axis_name, operation)
    numbers = [x.squeeze(rows.axes) for x in whole]
    if rows.mask is None:
        return counts, [], numbers
    *numbers, kept = numbers
    is_kept = kept > 0
    counts = is_kept if counts is None else counts & is_kept
    return counts, [kept], [jnp.where(is_kept, x, 0) for x in numbers]


def spread(rows: Rows, highest: Array) -> Array:
    """The sum of `e^d d` over the classes of all devices, [N...]."""
    (here,) = _backend.spread(rows, rows.expand(highest))
    return _axis.total(rows.axis_name, here.squeeze(rows.axes))


# -- the rule, in both modes --------------------------------------------------------------------------


def call(program: Callable[[Any], Any], inputs: Any) -> Any:
    """`program(inputs)`. If JAX refuses forward mode because of `jax.custom_vjp`, add a note to its
    error that names our option."""
    try:
        return program(inputs)
    except TypeError as error:
        if "custom_vjp" in str(error) and not inputs.options.forward_mode:
            error.add_note(
                "jax_sce: for jvp, jacfwd, linearize or check_grads pass forward_mode=True to the loss"
            )
        raise


def _fwd(kind: Kind, has_entropy: bool, rows: Rows, targets: Any, counts: Array | None):
    forward = kind.forward(rows, targets, counts)
    stats, entropy, mean = forward.stats, None, None
    if has_entropy:
        of_row = spread(rows, stats.max)
        entropy, mean = stats.entropy(of_row), -of_row / (1 + stats.tail)
    out = Out(forward.loss, stats.log_normalizer(), entropy, forward.target_entropy, forward.kept)
    return out, Residuals(rows, targets, forward.counts, stats, forward.numbers, mean)


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
    return *kind.vjp(residuals, _factors(residuals, g)), None


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
    """The same rule as a JVP. Because of the `jax.checkpoint`, reverse mode over it saves the arguments
    and a few numbers per row, but no computed array of the logits' size. (A `jax.checkpoint` around only
    the tangents cannot be transposed under `jax_remat3`.)"""
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

    # Leave out the arguments that are not differentiated: infinity times a tangent of 0 is NaN.
    moving = _rows.moving(primals[:2], dots[:2])
    rows, one = residuals.rows, jnp.ones_like(residuals.stats.tail)
    zero, z_dot = jnp.zeros_like(one), None
    if 0 in moving:
        z_dot = _rows.tangent_of(Rows.values, (rows,), {0: moving[0]})

    def along(g):
        total, factors = rows.expand(zero), _factors(residuals, g)
        if z_dot is not None:
            of_values = kind.vjp_of_values(residuals, factors)
            total += _rows.sum_classes(rows, of_values * z_dot)
        of_targets = kind.targets_jvp(residuals, factors.g_loss, moving) if 1 in moving else None
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
    def forward(self, rows, targets, counts):
        counts, kept, (highest, tail, at_label) = statistics(
            _backend.label_statistics, rows, rows.expand(targets), counts
        )
        stats = Statistics(highest, tail)
        distance = jnp.where(targets < 0, jnp.nan, at_label - highest)
        return Forward(stats.label_loss(distance), stats, (distance,), counts, kept)

    def _operands(self, residuals, factors):
        """The arguments of `label_cotangent` after the rows."""
        rows, labels, counts, stats, (distance,), _ = residuals
        numbers = [
            None if x is None else rows.expand(_rows.counted(counts, x, stats.tail))
            for x in stats.label_factors(distance, *factors)
        ]
        return rows.expand(labels), rows.expand(stats.max), *numbers

    def vjp(self, residuals, factors):
        operands = self._operands(residuals, factors)
        return _backend.label_cotangent(residuals.rows, *operands), None

    def vjp_of_values(self, residuals, factors):
        operands = self._operands(residuals, factors)
        return _rows.label_cotangent_of_values(residuals.rows, *operands, subtract=below)


# -- distributions over the classes, `Targets` --------------------------------------------------------


def target_factors(residuals: Residuals, factors: Factors, probe: Array) -> Factors:
    """The factors, [N, 1] each. A row whose probe is not finite must get a NaN gradient, even if its
    cotangent is 0. But if the row does not count, its gradient must be 0."""
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
    def forward(self, rows, targets, counts):
        counts, kept, (highest, tail, target_sum, target_dot) = statistics(
            _backend.target_statistics, rows, targets, counts
        )
        stats = Statistics(highest, tail)
        loss = stats.target_loss(target_sum, target_dot)
        return Forward(loss, stats, (target_sum,), counts, kept)

    def _operands(self, residuals, factors):
        """The arguments of `target_cotangent` after the rows."""
        rows, targets, _, stats, (target_sum,), _ = residuals
        of_row = map(rows.expand, (*stats, target_sum))
        return targets, *of_row, *target_factors(residuals, factors, stats.tail + target_sum)

    def vjp(self, residuals, factors):
        rows, targets = residuals[:2]
        of_each = costs(residuals, targets, factors.g_loss)
        of_targets = _rows.targets_cotangent(rows, targets, of_each)
        return _backend.target_cotangent(rows, *self._operands(residuals, factors)), of_targets

    def vjp_of_values(self, residuals, factors):
        operands = self._operands(residuals, factors)
        return _rows.target_cotangent_of_values(residuals.rows, *operands, subtract=below)

    def targets_jvp(self, residuals, g_loss, moving):
        rows, targets = residuals[:2]
        dot = _rows.tangent_of(Targets.values, (targets, rows), {0: moving[1]})
        return _rows.sum_classes(rows, costs(residuals, targets, g_loss) * dot)


IDS, DISTRIBUTIONS = _Ids(), _Distributions()
