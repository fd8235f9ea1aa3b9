"""The losses on a mesh, of global arrays."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from . import _cross_entropy, _linear
from ._axis import AxisName
from ._cross_entropy import (
    Arguments,
    Options,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from ._linear import CrossEntropyAux, Examples, Head, linear_softmax_cross_entropy


def shard(
    loss: Callable[..., Any],
    mesh: Mesh | AbstractMesh | None = None,
    *,
    batch: AxisName = "data",
    classes: AxisName = None,
) -> Callable[..., Any]:
    """One of the losses as the same function of global arrays, run by `jax.shard_map` on a mesh.

    The examples are split over `batch`, the classes over `classes`. Between the devices of `classes`
    row statistics alone cross. A kernel that lives split over `batch` too (FSDP) is gathered once,
    before the chunks, and its gradient is reduced once, after them: each device sums its own part where
    JAX knows the layout, which it does not under `jax.jit` on automatic axes. "sum" and "mean" are over
    the whole batch, and a mean divides by all of its weight.

    Args:
      loss: `softmax_cross_entropy`, `softmax_cross_entropy_with_integer_labels` or
        `linear_softmax_cross_entropy`.
      mesh: The mesh, with automatic or with explicit axes; None takes that of `jax.set_mesh`.
      batch: The mesh axis, or axes, over which the first axis of the examples is split; None: none.
      classes: The mesh axis, or axes, over which the classes are split, of several class axes the first;
        None: none.

    Returns:
      The function. It takes the arguments of `loss`, but `axis_name`.

    Raises:
      TypeError, ValueError: `loss` is not one of the three, the mesh lacks an axis or has axes of both
        types, or examples or classes do not divide evenly over it. Pad a head with columns whose `bias`
        is -inf: those are absent classes. Of logits, mask them with `where`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_sce import linear_softmax_cross_entropy, shard
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> loss = shard(linear_softmax_cross_entropy, mesh, batch="data", classes="model")
      >>> hidden, kernel = jnp.ones((4, 2)), jnp.eye(2, 3)
      >>> print(f"{loss(hidden, kernel, jnp.array([0, 1, 2, 0]), reduction='mean'):.4f}")
      1.1120

    References:
      Shoeybi et al. (2019), "Megatron-LM", arXiv:1909.08053, section 3, for a cross-entropy of which
      only sums over the classes cross the devices.
    """
    if not callable(loss) or loss not in _LOSSES:
        known = ", ".join(function.__name__ for function in _LOSSES)
        raise ValueError(f"loss must be one of {known} (options go to the call), got {loss!r}")
    if not isinstance(mesh, Mesh | AbstractMesh | None):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got {mesh!r}")
    read, plan = _LOSSES[loss]
    signature = inspect.signature(loss)
    of_batch, of_classes = _axes("batch", batch), _axes("classes", classes)
    used = of_batch + of_classes
    if len(set(used)) < len(used):
        raise ValueError(f"batch and classes must name an axis once, got {batch!r} and {classes!r}")

    @functools.wraps(loss)
    def sharded(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["axis_name"] is not None:
            raise ValueError("axis_name must be None: `shard` is told the axes of the mesh")
        on = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        if on.empty:
            raise ValueError("mesh must be given, or set by jax.set_mesh")
        for name, axes in (("batch", of_batch), ("classes", of_classes)):
            if missing := [axis for axis in axes if axis not in on.axis_names]:
                raise ValueError(
                    f"{name} must name axes of the mesh, {on.axis_names}, got {missing[0]!r}"
                )
        if manual := sorted(set(used) & set(on.manual_axes)):
            raise ValueError(
                f"mesh must not be manual over {manual[0]!r}: inside jax.shard_map, give axis_name"
            )
        if on.explicit_axes and len(on.explicit_axes) < len(on.axis_names):
            raise ValueError(f"mesh must have axes of one type, got {on.axis_types}")
        if jnp.size(bound.arguments["labels"]) == 0:  # XLA compiles no program of no operands
            return loss(*args, **kwargs)
        setting, arrays = read(**bound.arguments)
        program = plan(on, of_batch, of_classes, setting, arrays)
        if on.explicit_axes:
            shardings = jax.tree.map(functools.partial(NamedSharding, on), program.in_specs)
            arrays = jax.tree.map(jax.sharding.reshard, arrays, shardings)
        return _compiled(program, mesh, on)(arrays)

    return sharded


def _spec(*axes: Any) -> Any:
    """Put where an array stands in a tree of arrays."""
    return PartitionSpec(*(axis or None for axis in axes))


def _axes(name: str, x: AxisName) -> tuple[str, ...]:
    axes = () if x is None else (x,) if isinstance(x, str) else x
    if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"{name} must be the name of a mesh axis, several or None, got {x!r}")
    return axes


class _Program(NamedTuple):
    """What each device runs."""

    run: Callable[..., Any]
    setting: Any
    gather: AxisName  # the mesh axis over which the kernel is split
    in_specs: Any
    out_specs: Any


@functools.lru_cache(maxsize=256)
def _compiled(
    program: _Program, mesh: Mesh | AbstractMesh | None, on: Mesh | AbstractMesh
) -> Callable[..., Any]:
    """For that mesh, or else for the ambient one, which it is `on`."""

    def on_each_device(arrays: Any) -> Any:
        if program.gather:
            head, examples = arrays
            kernel = lax.all_gather(head.kernel, program.gather, axis=0, tiled=True)
            arrays = head._replace(kernel=kernel), examples
        return program.run(program.setting, arrays)

    specs = {"in_specs": (program.in_specs,), "out_specs": program.out_specs}
    return jax.jit(jax.shard_map(on_each_device, mesh=mesh, **specs))


def _check_divides(what: str, size: int, mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> None:
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if size % devices:
        raise ValueError(
            f"{what} must divide evenly over the {devices} devices of {', '.join(axes)}, got {size}"
        )


def _plan_logits(
    mesh: Mesh | AbstractMesh,
    batch: tuple[str, ...],
    classes: tuple[str, ...],
    setting: _cross_entropy.Setting,
    arrays: Arguments,
) -> _Program:
    shape, axes = arrays.logits.shape, setting.axes
    of_rows = [axis for axis in range(len(shape)) if axis not in axes]
    if not of_rows:
        batch = ()
    split: dict[int, tuple[str, ...]] = {axes[0]: classes}
    if of_rows:
        split[of_rows[0]] = batch
        _check_divides("the first axis of the examples", shape[of_rows[0]], mesh, batch)
    _check_divides("the classes" if len(axes) == 1 else "the first class axis", shape[axes[0]],
                   mesh, classes)  # fmt: skip

    def spec(x: Array) -> Any:
        """Of an array of the logits' rank; one that is broadcast is whole."""
        sizes = enumerate(x.shape)
        return _spec(*(None if n == 1 else split.get(a) for a, n in sizes))

    row = _spec(*(split.get(axis) for axis in of_rows))
    labels = row if arrays.has_ids else spec(arrays.logits)
    where = None if arrays.where is None else spec(arrays.where)
    specs = Options(
        kept=row,
        weights=row,
        smoothing=_spec(),
        class_weights=_spec(classes),
        z_loss=_spec(),
        softcap=_spec(),
    )
    in_specs = Arguments(spec(arrays.logits), labels, where, _where_given(specs, arrays.options))
    setting = setting._replace(classes=classes or None, batch=batch or None)
    out_specs = row if setting.reduction == "none" else _spec()
    return _Program(_cross_entropy.run, setting, None, in_specs, out_specs)


def _plan_head(
    mesh: Mesh | AbstractMesh,
    batch: tuple[str, ...],
    classes: tuple[str, ...],
    setting: _linear.Setting,
    arrays: tuple[Head, Examples],
) -> _Program:
    head, examples = arrays
    rank = examples.hidden.ndim - 1
    if rank == 0:
        batch = ()
    else:
        _check_divides("the first axis of the examples", len(examples.hidden), mesh, batch)
    _check_divides("the classes", head.kernel.shape[1], mesh, classes)
    row = _spec(*[batch, *[None] * (rank - 1)][:rank])
    of_class, whole = _spec(classes), _spec()
    gather = _gathered(head.kernel, batch)
    of_head = Head(_spec(gather, classes), of_class, whole, of_class, whole, whole)
    labels = row if examples.has_ids else _spec(*row, classes)
    of_examples = Examples(_spec(*row, None), labels, row, row)
    in_specs = _where_given(of_head, head), _where_given(of_examples, examples)
    setting = setting._replace(classes=classes or None, batch=batch or None)
    out_specs: Any = row if setting.reduction == "none" else whole
    if setting.return_aux:
        out_specs = (out_specs, CrossEntropyAux(row, row))
    return _Program(_linear.run, setting, gather, in_specs, out_specs)


def _where_given(specs: Any, arrays: Any) -> Any:
    """Those of the arrays that are there."""
    return type(specs)(*(None if x is None else s for x, s in zip(arrays, specs, strict=True)))


def _gathered(kernel: Array, batch: tuple[str, ...]) -> tuple[str, ...] | None:
    """The axes of `batch` over which the kernel's features are known to be split. Where they are not
    known, under `jax.jit` on a mesh with automatic axes, the compiler gathers it."""
    sharding = jax.typeof(kernel).sharding
    if not isinstance(kernel, jax.core.Tracer) and isinstance(kernel.sharding, NamedSharding):
        sharding = kernel.sharding
    spec = tuple(sharding.spec)
    features = spec[0] if spec else None
    axes = (features,) if isinstance(features, str) else features
    return axes if axes and set(axes) <= set(batch) else None


_LOSSES: dict[Callable[..., Any], tuple[Callable[..., Any], Callable[..., Any]]] = {
    softmax_cross_entropy: (_cross_entropy.read_targets, _plan_logits),
    softmax_cross_entropy_with_integer_labels: (_cross_entropy.read_labels, _plan_logits),
    linear_softmax_cross_entropy: (_linear.read, _plan_head),
}
