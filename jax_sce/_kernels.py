"""The native kernels (`_native/`) as functions of arrays, and which rows they are for.

Each is one primitive of JAX with a name in it. It is compiled to a call of the kernel for each device's
own rows. In an exported program, which must run where there is no kernel, on meshes with explicit axes
or partly manual ones, and where the classes are split, it is compiled to the same in plain JAX. `vmap`
adds an axis.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from . import _axis, native

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

Plain = Callable[..., tuple[Array, ...]]  # the same of the same arguments


def serve(logits: Array, softcap: Array | None, *labels: Array) -> bool:
    """Whether the kernels are for logits and labels like these; `lower_on_cpu`, if for a program."""
    return (
        all(x.dtype in _DTYPES for x in (logits, *labels))
        and softcap is None
        and not jax.typeof(logits).sharding.mesh.explicit_axes
        and native.status().available
    )


def or_by_kernel(kernel: Callable[[], Callable], *, when: Callable[..., bool]) -> Callable:
    """Of a function: computed by `kernel()` where the program is compiled for CPU, `when` it says so of
    the arguments. The derivatives are those of the function."""

    def decorate(plain: Callable) -> Callable:
        @jax.custom_jvp
        def on_cpu(*args):
            return lax.platform_dependent(*args, cpu=kernel(), default=plain)

        @functools.partial(on_cpu.defjvp, symbolic_zeros=True)
        def jvp(primals, tangents):
            leaves, tree = jax.tree.flatten(primals)
            dots = jax.tree.leaves(tangents, is_leaf=is_symbolic_zero)

            def of_leaves(*leaves):
                return plain(*jax.tree.unflatten(tree, leaves))

            return _push(of_leaves, leaves, dots, is_symbolic_zero)

        @functools.wraps(plain)
        def chosen(*args):
            return (on_cpu if when(*args) else plain)(*args)

        return chosen

    return decorate


def is_symbolic_zero(x: object) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _push(function: Callable, primals: Sequence, tangents: Sequence, is_zero: Callable):
    """As `jax.jvp`. What does not move gets no tangent of 0, which an infinity makes NaN."""
    moving = {i: x for i, x in enumerate(tangents) if not is_zero(x)}

    def of_moving(moved):
        return function(*(moved.get(i, x) for i, x in enumerate(primals)))

    return jax.jvp(of_moving, ({i: primals[i] for i in moving},), (moving,))


class Shared(NamedTuple):
    """An array that all rows have in common: of rank 1, [V] or [1], or [0] for none."""

    array: Array


def run(kernel: str, plain: Plain, logits: Array, *operands: Array | Shared) -> tuple[Array, ...]:
    """One of `native.TARGETS`. The logits are [N..., V], and all that is not shared [N...] or [N..., V].
    `plain` computes the same."""
    is_shared = tuple(isinstance(x, Shared) for x in (logits, *operands))
    operands = _axis.vary_alike(
        logits, *(x.array if isinstance(x, Shared) else x for x in operands)
    )
    primitive = _primitive(_may_be_split())
    return tuple(primitive.bind(*operands, kernel=kernel, plain=plain, shared=is_shared))


def _may_be_split() -> bool:
    """Whether XLA may be to split the rows over devices that the kernels are for."""
    mesh = jax.sharding.get_abstract_mesh()
    is_split = not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)
    return not is_split and jax.default_backend() == "cpu" and jax.device_count() > 1


@functools.cache
def _primitive(may_be_split: bool):
    """Made on first use: what it needs takes long to import."""
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    primitive = Primitive("jax_sce_rows")
    primitive.multiple_results = True

    def eager(*operands, kernel, plain, shared):  # under `jax.disable_jit`
        return plain(*operands)

    def shapes(logits, *operands, kernel, plain, shared):
        if kernel.endswith("cotangent"):
            return [logits.update(weak_type=False)]
        of_rows = logits.update(
            shape=logits.shape[:-1],
            dtype=jnp.dtype(jnp.float32),
            weak_type=False,
            sharding=logits.sharding.update(spec=logits.sharding.spec[:-1]),
        )
        return [of_rows] * (3 if kernel == "label_statistics" else 4)

    def lower(context, *operands, kernel, plain, shared):
        call = functools.partial(_call, kernel, shared, context.avals_out)
        return mlir.lower_fun(call, multiple_results=True)(context, *operands)

    def lower_plain(context, *operands, kernel, plain, shared):
        return mlir.lower_fun(plain, multiple_results=True)(context, *operands)

    def lower_partitioned(context, *operands, kernel, plain, shared):
        local = _primitive(may_be_split=False)
        call = functools.partial(local.bind, kernel=kernel, plain=plain, shared=shared)
        partitioned = _partitioned(call, plain, context.avals_in, shared)
        return mlir.lower_fun(partitioned, multiple_results=True)(context, *operands)

    def lower_on_cpu(context, *operands, **params):
        module = context.module_context
        if module.lowering_parameters.for_export:
            rule = lower_plain
        elif _is_local(module.axis_context):
            rule = lower
        else:
            rule = lower_partitioned if can_be_partitioned(module.axis_context) else lower_plain
        return rule(context, *operands, **params)

    def jvp(primals, tangents, *, kernel, plain, shared):
        # `or_by_kernel` has the derivatives, but JAX 0.10 forgets that of what `jax.checkpoint` computes
        # again, and differentiates this then for the second derivatives.
        return _push(plain, primals, tangents, lambda x: isinstance(x, ad.Zero))

    def batch(args, dims, *, kernel, plain, shared):
        if any(is_shared and d is not None for is_shared, d in zip(shared, dims, strict=True)):
            out = jax.vmap(plain, in_axes=tuple(dims))(*args)
        else:
            (size,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}
            args = [
                x if is_shared else batching.bdim_at_front(x, d, size)
                for x, d, is_shared in zip(args, dims, shared, strict=True)
            ]
            out = primitive.bind(*args, kernel=kernel, plain=plain, shared=shared)
        return out, [0] * len(out)

    asked = may_be_split and _ask_for_devices(primitive)

    def can_be_partitioned(axis_context):
        # Of a mesh that is partly manual, JAX does not name the axes; of one that is explicit, it would
        # annotate what each device does by itself.
        mesh = getattr(axis_context, "abstract_mesh", None)
        explicit = jax.sharding.get_abstract_mesh().explicit_axes
        return asked and mesh is not None and not mesh.explicit_axes and not explicit

    primitive.def_impl(eager)
    primitive.def_abstract_eval(shapes)
    mlir.register_lowering(primitive, lower_plain)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive


def _call(kernel: str, shared: tuple[bool, ...], results, *operands: Array) -> list[Array]:
    """The kernel itself, which is given all rows on one axis. A cotangent is written over the logits."""
    rows = operands[0].shape[:-1]

    def flat(x):
        return (math.prod(rows), *x.shape[len(rows) :])

    logits, *others = (
        x if is_shared else x.reshape(flat(x))
        for x, is_shared in zip(operands, shared, strict=True)
    )
    aliases = {}
    if kernel.endswith("cotangent"):
        # What was reshaped just before, XLA's layout assignment would copy, to have it written over.
        logits, aliases = lax.optimization_barrier(logits), {0: 0}
    out = jax.ffi.ffi_call(
        f"jax_sce.{kernel}",
        [jax.ShapeDtypeStruct(flat(x), x.dtype) for x in results],
        input_output_aliases=aliases,
    )(logits, *others)
    return [x.reshape(result.shape) for x, result in zip(out, results, strict=True)]


def _ask_for_devices(primitive) -> bool:
    """`custom_partitioning` needs to know the devices when it is lowered, and JAX has no public way to
    ask for that: if a later version has moved its own, programs over several devices are plain JAX. JAX
    refuses what asks where a program has several meshes or abstract ones, so nothing asks in vain."""
    try:
        from jax._src.dispatch import prim_requires_devices_during_lowering as asking

        asking.add(primitive)
    except (ImportError, AttributeError):
        return False
    return True


def _is_local(axis_context) -> bool:
    """Whether it is for one device, or for each by itself, as in a `jax.shard_map` over all axes."""
    if hasattr(axis_context, "manual_axes"):
        return set(axis_context.manual_axes) == set(axis_context.mesh.axis_names)
    return axis_context.num_devices == 1


def _partitioned(call: Callable, plain: Plain, avals, shared: tuple[bool, ...]) -> Callable:
    """The call, and how to split it over devices: as the logits are split, each does its own rows. Where
    the classes are split, it is plain JAX that does, for that knows how to merge the parts of a row."""
    from jax.experimental.custom_partitioning import custom_partitioning

    logits = avals[0]
    rows = tuple(f"n{i}" for i in range(logits.ndim - 1))

    def factors(i: int, rank: int) -> tuple[str, ...]:
        """The names of an operand's axes. Results have those that logits of their rank would have."""
        if shared[i]:
            return ("v",) if avals[i].shape == (logits.shape[-1],) != (1,) else (f"x{i}",)
        return (*rows, "v") if rank == logits.ndim else rows

    def rule(mesh, arg_types, result_types):
        args = (factors(i, x.ndim) for i, x in enumerate(avals))
        results = (factors(0, x.rank) for x in result_types)
        return " -> ".join(", ".join(map(" ".join, names)) for names in (args, results))

    def partition(mesh, args, results):
        spec = tuple(args[0].sharding.spec)
        axes = dict(itertools.zip_longest((*rows, "v"), spec))

        def split(names: tuple[str, ...]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*map(axes.get, names)))

        of_classes = axes["v"]
        local = call if of_classes is None else functools.partial(plain, axis_name=of_classes)
        return (
            mesh,
            local,
            [split(factors(0, len(x.shape))) for x in results],
            tuple(split(factors(i, len(x.shape))) for i, x in enumerate(args)),
        )

    function = custom_partitioning(lambda *operands: call(*operands))
    function.def_partition(partition, sharding_rule=rule)
    return function
