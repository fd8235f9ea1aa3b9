"""The native kernels (`_native/`) as functions of arrays, and which rows they are for.

Each is one primitive of JAX with a name in it. It is compiled to a call of the kernel where a program is
for this machine alone; in an exported program, which must run where there is no kernel, and where XLA is
to partition the program over devices, it is compiled to the same in plain JAX. `vmap` adds an axis.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _axis, native

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

Plain = Callable[..., tuple[Array, ...]]  # the same of the same arguments


def serve(logits: Array, softcap: Array | None, *labels: Array) -> bool:
    """Whether the kernels are for these rows. It is decided here and nowhere else."""
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
            # An argument that is not differentiated gets no tangent of 0, which an infinity makes NaN.
            leaves, tree = jax.tree.flatten(primals)
            dots = jax.tree.leaves(tangents, is_leaf=_is_symbolic_zero)
            moving = {i: x for i, x in enumerate(dots) if not _is_symbolic_zero(x)}

            def of_moving(moved):
                return plain(
                    *jax.tree.unflatten(tree, [moved.get(i, x) for i, x in enumerate(leaves)])
                )

            return jax.jvp(of_moving, ({i: leaves[i] for i in moving},), (moving,))

        @functools.wraps(plain)
        def chosen(*args):
            return (on_cpu if when(*args) else plain)(*args)

        return chosen

    return decorate


def _is_symbolic_zero(x: object) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


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
    return tuple(_primitive().bind(*operands, kernel=kernel, plain=plain, shared=is_shared))


@functools.cache
def _primitive():
    """Made on first use: what it needs takes long to import."""
    from jax.extend.core import Primitive
    from jax.interpreters import batching, mlir

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
        aliases = {0: 0} if kernel.endswith("cotangent") else {}
        rule = jax.ffi.ffi_lowering(f"jax_sce.{kernel}", operand_output_aliases=aliases)
        return rule(context, *operands)

    def lower_plain(context, *operands, kernel, plain, shared):
        return mlir.lower_fun(plain, multiple_results=True)(context, *operands)

    def lower_partitioned(context, *operands, kernel, plain, shared):
        call = functools.partial(primitive.bind, kernel=kernel, plain=plain, shared=shared)
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

    asked = _ask_for_devices(primitive)

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
    batching.primitive_batchers[primitive] = batch
    return primitive


def _ask_for_devices(primitive) -> bool:
    """`custom_partitioning` needs to know the devices when it is lowered, and JAX has no public way to
    ask for that: if a later version has moved its own, programs over several devices are plain JAX."""
    try:
        from jax._src.dispatch import prim_requires_devices_during_lowering
    except ImportError:
        return False
    prim_requires_devices_during_lowering.add(primitive)
    return True


def _is_local(axis_context) -> bool:
    """Whether it is for one device, or for each by itself, as in a `jax.shard_map` over all axes."""
    if hasattr(axis_context, "manual_axes"):
        return set(axis_context.manual_axes) == set(axis_context.mesh.axis_names)
    return axis_context.num_devices == 1


def _partitioned(call: Callable, plain: Plain, avals, shared: tuple[bool, ...]) -> Callable:
    """The call, and how to split it over devices: each does its own rows. Where the classes are split,
    it is plain JAX that does, for that knows how to merge the parts of a row."""
    from jax.experimental.custom_partitioning import custom_partitioning

    logits = avals[0]
    rows = " ".join(f"n{i}" for i in range(logits.ndim - 1))

    def factors(i, shape):
        if shared[i]:
            return "v" if shape == (logits.shape[-1],) != (1,) else f"x{i}"
        return f"{rows} v" if len(shape) == logits.ndim else rows

    args = ", ".join(factors(i, x.shape) for i, x in enumerate(avals))

    def rule(mesh, arg_types, result_types):
        results = (f"{rows} v" if x.rank == logits.ndim else rows for x in result_types)
        return f"{args} -> {', '.join(results)}"

    def partition(mesh, args, results):
        of_classes = args[0].sharding.spec[-1]
        local = call if of_classes is None else functools.partial(plain, axis_name=of_classes)
        args, results = (jax.tree.map(lambda x: x.sharding, x) for x in (args, results))
        return mesh, local, results, args

    function = custom_partitioning(lambda *operands: call(*operands))
    function.def_partition(partition, sharding_rule=rule)
    return function
