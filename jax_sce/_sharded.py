"""The losses on global arrays that are split over a mesh."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from . import _arguments, _cross_entropy, _head, _linear, _partition, _rules
from ._aux import CrossEntropyAux
from ._axis import AxisName
from ._cross_entropy import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels
from ._linear import linear_softmax_cross_entropy
from ._partition import Layout
from ._targets import Sparse

AnyMesh = Mesh | AbstractMesh
Loss = TypeVar("Loss", bound=Callable[..., Any])


def shard(
    loss: Loss, mesh: Mesh | AbstractMesh | None = None, *, batch: AxisName = "data",
    classes: AxisName = None,
) -> Loss:  # fmt: skip
    """Make a loss work on global arrays, sharded over a mesh of devices.

    The examples are split over the mesh axis `batch`, the classes over
    `classes`. The devices along `classes` exchange only a few numbers per row.
    A kernel whose features are split over `batch` (FSDP) is gathered once,
    before the loop over the chunks, and its gradient is reduced once, after the
    loop. "sum" and "mean" are over the whole batch, and "mean" divides by the
    total weight of the whole batch.

    Under `jax.jit`, `linear_softmax_cross_entropy` does the same without
    `shard`. It follows the shardings of its arguments, while `shard` fixes
    them.

    Args:
      loss: `softmax_cross_entropy`, `softmax_cross_entropy_with_integer_labels`
        or `linear_softmax_cross_entropy`.
      mesh: The mesh. Its axes are all Auto or all Explicit. None means the
        mesh of `jax.set_mesh`.
      batch: The mesh axis, or a tuple of axes, over which the first axis of the
        examples is split. None means that it is not split.
      classes: The mesh axis, or a tuple of axes, over which the classes are
        split (the first class axis, if there are several). None means that they
        are not split.

    Returns:
      The loss as a function of global arrays, run by `jax.shard_map`. It takes
      the arguments of `loss`, except `axis_name`.

    Raises:
      TypeError, ValueError: `loss` is not one of the three; the mesh lacks an
        axis, or has both Auto and Explicit axes; or the examples or classes do
        not divide evenly over the devices. If so, pad a head with columns whose
        `bias` is -inf, which marks absent classes, or pad logits with classes
        that `where` masks.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_sce import linear_softmax_cross_entropy, shard
      >>> auto = jax.sharding.AxisType.Auto
      >>> axes = ("data", "model")
      >>> mesh = jax.make_mesh((1, 1), axes, axis_types=(auto, auto))
      >>> loss = shard(linear_softmax_cross_entropy, mesh, classes="model")
      >>> hidden, kernel = jnp.ones((4, 2)), jnp.eye(2, 3)
      >>> labels = jnp.array([0, 1, 2, 0])
      >>> print(f"{loss(hidden, kernel, labels, reduction='mean'):.4f}")
      1.1120

    References:
      Shoeybi et al. (2019), "Megatron-LM", arXiv:1909.08053, section 3, for a
      cross-entropy in which devices exchange only sums over the classes.
    """
    if not callable(loss) or loss not in _LOSSES:
        known = ", ".join(function.__name__ for function in _LOSSES)
        raise ValueError(
            f"loss must be one of {known} (pass options when you call the result), got {loss!r}"
        )
    if not isinstance(mesh, Mesh | AbstractMesh | None):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got {mesh!r}")
    inputs, plan, signature = *_LOSSES[loss], inspect.signature(loss)
    of_batch = _arguments.mesh_axes("batch", batch)
    of_classes = _arguments.mesh_axes("classes", classes)
    used = of_batch + of_classes
    if len(set(used)) < len(used):
        raise ValueError(
            f"batch and classes must not name an axis twice, got {batch!r} and {classes!r}"
        )

    @functools.wraps(loss)
    def sharded(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["axis_name"] is not None:
            raise ValueError("axis_name must be None; to split the classes, pass classes to shard")
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
                f"mesh must not be manual over {manual[0]!r}; inside jax.shard_map, call the loss with "
                "axis_name"
            )
        if on.explicit_axes and len(on.explicit_axes) < len(on.axis_names):
            raise ValueError(f"mesh must have only Auto or only Explicit axes, got {on.axis_types}")
        if any(
            jnp.size(x) == 0 for x in jax.tree.leaves(bound.arguments["labels"])
        ):  # XLA cannot compile a program without operands
            return loss(*args, **kwargs)
        arguments = inputs(**bound.arguments)
        options = dataclasses.replace(
            arguments.options, axis_name=of_classes or None, batch_axis=of_batch or None
        )
        arguments = dataclasses.replace(arguments, options=options)
        program = plan(_Split(on, of_batch, of_classes), arguments)
        if on.explicit_axes:
            shardings = jax.tree.map(partial(NamedSharding, on), program.in_specs)
            arguments = jax.tree.map(jax.sharding.reshard, arguments, shardings)
        return _rules.call(_compiled(program, mesh, on), arguments)

    return cast(Loss, sharded)


class _Program(NamedTuple):
    """The program of each device, and how its arguments and results are split."""

    loss_of: Callable[..., Any]
    layout: Layout | None  # for a head only
    in_specs: Any
    out_specs: Any


@functools.lru_cache(maxsize=256)
def _compiled(program: _Program, mesh: AnyMesh | None, on: AnyMesh) -> Callable[..., Any]:
    """`mesh` is None for the ambient mesh. `on` is the mesh in both cases: the cache's key needs it."""

    def on_each_device(inputs: Any) -> Any:
        if program.layout is not None:
            inputs = _partition.gathered(inputs, program.layout)
        return program.loss_of(inputs)

    specs = {"in_specs": (program.in_specs,), "out_specs": program.out_specs}
    return jax.jit(jax.shard_map(on_each_device, mesh=mesh, **specs))


class _Split(NamedTuple):
    mesh: AnyMesh
    batch: tuple[str, ...]
    classes: tuple[str, ...]

    def check_divides(self, name: str, size: int, axes: tuple[str, ...]) -> None:
        n = math.prod(self.mesh.shape[axis] for axis in axes)
        if size % n:
            along = ", ".join(axes)
            raise ValueError(
                f"{name} must be a multiple of the {n} devices along {along}, got {size}"
            )


def _plan_logits(split: _Split, inputs: _cross_entropy.Inputs) -> _Program:
    shape, axes = inputs.logits.shape, inputs.axes
    of_rows = [axis for axis in range(len(shape)) if axis not in axes]
    of_axis = {axes[0]: split.classes}
    if of_rows:
        of_axis[of_rows[0]] = split.batch
        split.check_divides("the size of the first batch axis", shape[of_rows[0]], split.batch)
    name = "the number of classes" if len(axes) == 1 else "the size of the first class axis"
    split.check_divides(name, shape[axes[0]], split.classes)

    def spec(x: Array) -> Any:
        """The spec of an array of the logits' rank. Axes of size 1 are not split."""
        return _partition.spec(*(None if n == 1 else of_axis.get(a) for a, n in enumerate(x.shape)))

    row = _partition.spec(*(of_axis.get(axis) for axis in of_rows))
    if isinstance(inputs.labels, Sparse):
        several = _partition.spec(*row, *[None] * (len(of_rows) - len(row)), None)
        of_labels: Any = Sparse(several, several)
    else:
        of_labels = row if inputs.has_ids else spec(inputs.logits)
    of_options = {"valid": row, "weights": row, "temperature": row}
    of_options["class_weights"] = _partition.spec(split.classes)
    options = {name: of_options.get(name, _partition.spec()) for name in inputs.options.arrays()}
    in_specs = _cross_entropy.Inputs(
        logits=spec(inputs.logits),
        labels=of_labels,
        mask=None if inputs.mask is None else spec(inputs.mask),
        options=dataclasses.replace(inputs.options, **options),
        axes=axes,
    )
    out_specs = row if inputs.options.reduction == "none" else _partition.spec()
    if inputs.options.return_aux:
        rank = row if inputs.has_ids else None
        out_specs = (out_specs, CrossEntropyAux(row, row, entropy=row, rank=rank))
    return _Program(_cross_entropy.loss_of, None, in_specs, out_specs)


def _plan_head(split: _Split, inputs: _head.Inputs) -> _Program:
    rank = len(inputs.batch)
    if rank:
        split.check_divides("the size of the first batch axis", inputs.batch[0], split.batch)
    split.check_divides("the number of classes", inputs.kernel.shape[1], split.classes)
    examples = (split.batch, *[()] * (rank - 1))[:rank]
    features = _gathered(inputs.kernel, split.batch if rank else ())
    layout = Layout(examples, split.classes, features)
    return _Program(_linear.loss_of, layout, *_partition.specs_of(inputs, layout))


def _gathered(kernel: Array, batch: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of `batch` that are known to split the kernel's features. They are not known under
    `jax.jit` on a mesh with automatic axes: there the compiler gathers the kernel."""
    sharding = jax.typeof(kernel).sharding
    if not isinstance(kernel, jax.core.Tracer) and isinstance(kernel.sharding, NamedSharding):
        sharding = kernel.sharding
    axes, _ = _partition.split_over(sharding, 2)
    return axes if set(axes) <= set(batch) else ()


_LOSSES: dict[Callable[..., Any], tuple[Callable[..., Any], Callable[..., Any]]] = {
    softmax_cross_entropy: (partial(_cross_entropy.inputs, has_ids=False), _plan_logits),
    softmax_cross_entropy_with_integer_labels: (
        partial(_cross_entropy.inputs, has_ids=True),
        _plan_logits,
    ),
    linear_softmax_cross_entropy: (_linear.inputs, _plan_head),
}
