"""The seam: choose the code of a row operation for the platform that a program is compiled for.

`_rows.py` has each row operation in plain JAX. Here each is bound as one primitive, whose derivative,
batching rule and fallback come from the plain form. A platform in `BACKENDS` may replace it by a kernel
(an opaque call), or by another form in plain JAX that suits its compiler. No code above this file knows
about platforms.

A kernel computes the rows of one device. In a program for one device, or inside `jax.shard_map` over
all axes of the mesh, it is called directly. In a program that the compiler splits over devices,
`custom_partitioning` calls it on each device for the device's own rows; if the classes are split, the
plain form runs on each device and the statistics of the parts are merged. Everywhere else the plain form
is used: in exported programs, which must run without the kernel, on meshes with explicit axes, and in
partly manual ones. `_partition.py` binds a head in the same way."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from . import _axis, _chunks, _cpu, _divergence, _gpu, _rows
from ._axis import AxisName
from ._chunks import Loop
from ._rows import Rows


class Backend(NamedTuple):
    """How a platform computes the operations, by their names."""

    kernels: Mapping[str, Callable]  # opaque calls, with the arguments of the operation
    supports: Callable[..., bool]  # is there a kernel for such arguments (or their shapes)?
    forms: Mapping[str, Callable]  # other plain forms
    loop: Loop  # the loop of a head over its chunks


BACKENDS = {
    "cpu": Backend(_cpu.KERNELS, _cpu.supports, _cpu.FORMS, _cpu.LOOP),
    "cuda": Backend(_gpu.KERNELS, _gpu.supports, {}, _chunks.LOOP),
}
_NONE = Backend({}, lambda *_: False, {}, _chunks.LOOP)
_PARTITIONS = ("cpu", "cuda")  # platforms known to support `custom_partitioning`; TPUs do not


def backend_of(platform: str | None) -> Backend:
    return BACKENDS.get(platform, _NONE)  # type: ignore[arg-type]


class Operation(NamedTuple):
    """A function of `Rows` and of arrays with their rank."""

    plain: Callable
    num_statistics: int = 0  # results that are [N, 1]; 0 for a cotangent
    # The statistics as sums, given the maximum, for their derivative. With a mask there is one statistic
    # more.
    sums: Callable | None = None

    @property
    def name(self) -> str:
        return self.plain.__name__


# -- the row operations -------------------------------------------------------------------------------


def _bind(operation: Operation, rows: Rows, *args: Any) -> Any:
    leaves, tree = jax.tree.flatten((rows, *args))

    def bind(*leaves):
        return _primitive(operation).bind(*_axis.vary_alike(*leaves), tree=tree)

    out = laid_out(rows, bind, functools.partial(_results, operation, rows))(*leaves)
    if operation.num_statistics:
        return out
    softcap, temperature = _rows.of_row(rows, out[1:])
    return dataclasses.replace(
        rows, logits=out[0], mask=None, softcap=softcap, temperature=temperature, first_class=None
    )


def laid_out(rows: Rows, function: Callable, results: Callable[[Any, Any], Any]) -> Callable:
    """`function`, made to work also on a mesh with explicit axes: its results are laid out like the
    logits, and the compiler lays out what is in between. `results(x, y)` is the tree of the results with
    x for [N, V] and y for [N, 1]."""
    sharding, ndim = jax.typeof(rows.logits).sharding, rows.logits.ndim
    if not sharding.mesh.explicit_axes:
        return function
    spec = spec_of(sharding, ndim)
    of_row = [None if axis - ndim in rows.axes else s for axis, s in enumerate(spec)]
    on = [NamedSharding(sharding.mesh, PartitionSpec(*x)) for x in (spec, of_row)]
    return jax.sharding.auto_axes(function, out_sharding=results(*on))


# Statistics, [N, 1] each; and the cotangent of the rows.
label_statistics = functools.partial(_bind, Operation(_rows.label_statistics, 3, _rows.label_sums))
target_statistics = functools.partial(
    _bind, Operation(_rows.target_statistics, 4, _rows.target_sums)
)
spread = functools.partial(_bind, Operation(_rows.spread, 1))
label_cotangent = functools.partial(_bind, Operation(_rows.label_cotangent))
target_cotangent = functools.partial(_bind, Operation(_rows.target_cotangent))
divergence_sums = functools.partial(_bind, Operation(_divergence.divergence_sums, 2))
divergence_cotangent = functools.partial(_bind, Operation(_divergence.divergence_cotangent))


def _results(operation: Operation, rows: Rows, of_logits: Any, of_row: Any) -> list[Any]:
    """One entry for each result: `of_logits` for [N, V], `of_row` for [N, 1]."""
    if operation.num_statistics:
        tells_kept = operation.sums is not None and rows.mask is not None
        return [of_row] * (operation.num_statistics + tells_kept)
    return [of_logits] + [of_row] * sum(x is not None for x in (rows.softcap, rows.temperature))


@functools.cache
def _primitive(operation: Operation):
    """Made on first use: its imports take long."""

    def eager(*leaves, tree):  # under `jax.disable_jit`
        backend = backend_of(jax.default_backend())
        return flat(backend.forms.get(operation.name, operation.plain), tree)(*leaves)

    def shapes(*leaves, tree):
        rows = jax.tree.unflatten(tree, leaves)[0]
        logits = rows.logits.update(weak_type=False)
        of_row = logits.update(shape=rows.row_shape, dtype=rows.dtype)
        return _results(operation, rows, logits, of_row)

    def jvp(primals, dots, *, tree):
        out = _primitive(operation).bind(*primals, tree=tree)
        if operation.sums is None:
            moving = _rows.moving(primals, dots)
            return out, _rows.tangent_of(flat(operation.plain, tree), primals, moving)
        args, dots = jax.tree.unflatten(tree, primals), jax.tree.unflatten(tree, dots)
        return out, _rows.statistics_tangents(operation.sums, out, args, dots)

    def batch(leaves, dims, *, tree):
        # Every array has the rank of the logits and broadcasts to them: add one axis in front.
        (size,) = {x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None}
        leaves = [
            x[None] if d is None else jnp.moveaxis(x, d, 0)
            for x, d in zip(leaves, dims, strict=True)
        ]
        rows, *args = jax.tree.unflatten(tree, leaves)
        logits = jnp.broadcast_to(rows.logits, (size, *rows.logits.shape[1:]))
        rows = dataclasses.replace(rows, logits=logits)
        out = _primitive(operation).bind(*jax.tree.leaves((rows, *args)), tree=tree)
        return out, [0] * len(out)

    def choose(platform, context, *, tree):
        return _choose(operation, platform, context, tree)

    return primitive(f"jax_sce_{operation.name}", eager, shapes, choose, jvp, batch)


def primitive(
    name: str, eager: Callable, shapes: Callable, choose: Callable, jvp: Callable, batch: Callable
):
    """A primitive with several results. `choose(platform, context, **params)` returns the function of
    the operands that it is lowered to, and the context for that. `jvp` gets tangents like a rule with
    `symbolic_zeros`."""
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    def lower(platform: str | None, context, *leaves, **params):
        chosen, context = choose(platform, context, **params)
        return mlir.lower_fun(chosen, multiple_results=True)(context, *leaves)

    def with_symbolic_zeros(primals, dots, **params):
        zero = jax.custom_derivatives.SymbolicZero
        dots = [zero(t.aval) if isinstance(t, ad.Zero) else t for t in dots]
        return jvp(primals, dots, **params)

    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(eager)
    primitive.def_abstract_eval(shapes)
    mlir.register_lowering(primitive, functools.partial(lower, None))
    for platform in BACKENDS:
        mlir.register_lowering(primitive, functools.partial(lower, platform), platform=platform)
    ad.primitive_jvps[primitive] = with_symbolic_zeros
    batching.primitive_batchers[primitive] = batch
    return primitive


def spec_of(sharding: Any, rank: int) -> list[Any]:
    """The partition spec of a sharding, with an entry for each axis."""
    return [*sharding.spec, *[None] * (rank - len(sharding.spec))]


def flat(function: Callable, tree: Any) -> Callable[..., list[Array]]:
    """`function` of the leaves of its arguments, returning the leaves of its result."""
    return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))


def _choose(operation: Operation, platform: str | None, context, tree) -> tuple[Callable, Any]:
    """A kernel, a kernel on each device, or a plain form."""
    backend = backend_of(platform)
    form = backend.forms.get(operation.name, operation.plain)
    kernel = backend.kernels.get(operation.name)
    args = jax.tree.unflatten(tree, context.avals_in)
    if kernel is not None and backend.supports(operation.name, *args):
        kind = program(context)
        if kind == "local":
            return flat(kernel, tree), context
        if kind == "split" and len(args[0].axes) == 1:
            on_devices = with_devices(context, platform)
            if on_devices is not None:
                return _partitioned(operation, kernel, form, args), on_devices
    return flat(form, tree), context


def _partitioned(operation: Operation, kernel: Callable, form: Callable, args) -> Callable:
    """The operation on each device, for its own rows. All arrays are split like the logits."""
    from jax.experimental.custom_partitioning import custom_partitioning

    (axis,), shape = args[0].axes, args[0].logits.shape
    avals, tree = jax.tree.flatten(args)

    def rule(mesh, operands, results):
        """Name the axes of each array: an axis as long as the logits' has the logits' name."""
        names = [
            " ".join(f"n{a}" if n == shape[a] else f"x{i}_{a}" for a, n in enumerate(x.shape))
            for i, x in enumerate([*avals, *results])
        ]
        return f"{', '.join(names[: len(avals)])} -> {', '.join(names[len(avals) :])}"

    def partition(mesh, operands, results):
        spec = spec_of(operands[0].sharding, len(shape))

        def sharding(x) -> NamedSharding:
            axes = [s if n == m else None for s, n, m in zip(spec, x.shape, shape, strict=True)]
            return NamedSharding(mesh, PartitionSpec(*axes))

        local = kernel
        if spec[axis] is not None:
            local = functools.partial(_of_part, operation, form, spec[axis])
        shardings = [*map(sharding, results)], tuple(map(sharding, operands))
        return mesh, flat(local, tree), *shardings

    call = custom_partitioning(flat(kernel, tree))
    call.def_partition(partition, sharding_rule=rule)
    return call


def _of_part(operation: Operation, form: Callable, axis_name: AxisName, rows: Rows, *args: Any):
    """The operation on a device that holds a part of each row's classes."""
    first_class = jnp.asarray(_axis.offset(axis_name, rows.num_classes), jnp.int32)
    rows = dataclasses.replace(rows, first_class=first_class.reshape((1,) * rows.logits.ndim))
    if not operation.num_statistics:
        return form(rows, *args)
    if operation.sums is None:  # given the maximum of whole rows
        return tuple(_axis.total(axis_name, x) for x in form(rows, *args))
    return _rows.whole_statistics(rows, args[0], axis_name, form)


# -- what JAX keeps private ---------------------------------------------------------------------------


def program(context) -> str:
    """The kind of program that is being compiled: "local", for one device or for each by itself;
    "split" over devices by the compiler; or another. If a later JAX moves what this reads it is another,
    and the plain form is used."""
    try:
        module = context.module_context
        for_export, axes = module.lowering_parameters.for_export, module.axis_context
        if for_export:
            return "exported"
        if hasattr(axes, "manual_axes"):
            return "local" if set(axes.manual_axes) == set(axes.mesh.axis_names) else "mixed"
        if axes.num_devices == 1:
            return "local"
        # On explicit axes JAX would annotate what each device does by itself.
        return "explicit" if jax.sharding.get_mesh().abstract_mesh.explicit_axes else "split"
    except (AttributeError, ValueError):
        return "unknown"


def num_devices(context) -> int:
    """The number of devices that the compiler may split the program over; 1 if JAX does not say."""
    axes = getattr(context.module_context, "axis_context", None)
    return getattr(axes, "num_devices", None) or 1


def with_devices(context, platform: str | None) -> Any:
    """The context with devices, which `custom_partitioning` needs and JAX gives only to programs with a
    single mesh. Only their number counts, so the same device may be repeated. They form a mesh of
    p x p x ... with a prime p, which can express every even split. None if their number is not a power
    of a prime, or if the platform does not support `custom_partitioning`."""
    try:
        if platform not in _PARTITIONS:
            return None
        module = context.module_context
        n = module.axis_context.num_devices
        prime = next(p for p in range(2, n + 1) if n % p == 0)
        rank = round(math.log(n, prime))
        if prime**rank != n:
            return None
        mesh = AbstractMesh((prime,) * rank, tuple(f"jax_sce_{i}" for i in range(rank)))
        axes = dataclasses.replace(
            module.axis_context, device_assignment=tuple(jax.devices()[:1]) * n, abstract_mesh=mesh
        )
        return context.replace(module_context=module.replace(axis_context=axes))
    except (AttributeError, TypeError, RuntimeError):  # moved by a later JAX
        return None
