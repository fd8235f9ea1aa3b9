"""Choose the implementation of a row operation for the platform that a program is compiled for.

`_rows.py` has each row operation in plain JAX. Here each becomes a JAX primitive. Its derivative, its
batching rule and its fallback come from the plain form. A platform in `BACKENDS` may replace the plain
form by a kernel (an opaque call), or by another form in plain JAX that suits its compiler. The modules
that call these operations know nothing about platforms.

A kernel computes the rows of one device. In a program for one device, or inside `jax.shard_map` over
all axes of the mesh, it is called directly. In a program that the compiler splits over devices,
`custom_partitioning` calls it on each device for the device's own rows. If the classes are split, the
plain form runs on each device and the statistics of the parts are merged. In all other programs the
plain form is used: exported ones, which must run without the kernel, and those on meshes with explicit
axes or with only some manual axes. `_partition.py` makes a head a primitive in the same way."""

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

    kernels: Mapping[str, Callable]  # opaque calls that take the arguments of the operation
    supports: Callable[..., bool]  # is there a kernel for such arguments (or their shapes)?
    forms: Mapping[str, Callable]  # forms in plain JAX that replace those of `_rows.py`
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
    """A row operation: a function of `Rows` and of arrays of the same rank as the logits."""

    plain: Callable
    num_statistics: int = 0  # the number of results that are [N, 1]; 0 for a cotangent
    # For the derivative: the statistics after the maximum as sums, given the maximum. An operation that
    # has it returns one more statistic if there is a mask.
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
    """`function`, made to work on a mesh with explicit axes, too: its results get the sharding of the
    logits, and the compiler chooses the shardings inside. `results(x, y)` is the tree of the results,
    with x for each [N, V] and y for each [N, 1]."""
    sharding, ndim = jax.typeof(rows.logits).sharding, rows.logits.ndim
    if not sharding.mesh.explicit_axes:
        return function
    spec = spec_of(sharding, ndim)
    of_row = [None if axis - ndim in rows.axes else s for axis, s in enumerate(spec)]
    on = [NamedSharding(sharding.mesh, PartitionSpec(*x)) for x in (spec, of_row)]
    return jax.sharding.auto_axes(function, out_sharding=results(*on))


# The first return statistics, [N, 1] each; those named `cotangent` return the cotangent of the rows.
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
    """The primitive of an operation. It is made on first use, because its imports take long."""

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
    """A primitive with several results. `choose(platform, context, **params)` returns the function that
    it is lowered to, and the context for lowering. `jvp` gets tangents as a rule with `symbolic_zeros`
    does."""
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
    """The partition spec of a sharding, padded with None to one entry for each axis."""
    return [*sharding.spec, *[None] * (rank - len(sharding.spec))]


def flat(function: Callable, tree: Any) -> Callable[..., list[Array]]:
    """`function`, but it takes the leaves of its arguments and returns the leaves of its result."""
    return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))


def _choose(operation: Operation, platform: str | None, context, tree) -> tuple[Callable, Any]:
    """Choose a kernel, a kernel on each device, or a plain form."""
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
    """The operation on a device that holds only some of the classes of each row."""
    first_class = jnp.asarray(_axis.offset(axis_name, rows.num_classes), jnp.int32)
    rows = dataclasses.replace(rows, first_class=first_class.reshape((1,) * rows.logits.ndim))
    if not operation.num_statistics:
        return form(rows, *args)
    if operation.sums is None:  # the results are sums, given the maximum over all devices
        return tuple(_axis.total(axis_name, x) for x in form(rows, *args))
    return _rows.whole_statistics(rows, args[0], axis_name, form)


# -- what JAX keeps private ---------------------------------------------------------------------------


def program(context) -> str:
    """The kind of program that is being compiled: "local" if each device runs it by itself, "split" if
    the compiler splits it over devices, or another kind. If a later JAX moves the attributes read here,
    it is "unknown", and the plain form is used."""
    try:
        module = context.module_context
        for_export, axes = module.lowering_parameters.for_export, module.axis_context
        if for_export:
            return "exported"
        if hasattr(axes, "manual_axes"):
            return "local" if set(axes.manual_axes) == set(axes.mesh.axis_names) else "mixed"
        if axes.num_devices == 1:
            return "local"
        # On explicit axes JAX would add sharding annotations inside the function that each device runs.
        return "explicit" if jax.sharding.get_mesh().abstract_mesh.explicit_axes else "split"
    except (AttributeError, ValueError):
        return "unknown"


def num_devices(context) -> int:
    """The number of devices that the compiler may split the program over; 1 if JAX does not say."""
    axes = getattr(context.module_context, "axis_context", None)
    return getattr(axes, "num_devices", None) or 1


def with_devices(context, platform: str | None) -> Any:
    """The context with a device assignment. `custom_partitioning` needs one, and JAX gives it only to
    programs with a single mesh. Only the number of devices matters, so one device is repeated. The mesh
    is p x p x ... with a prime p, which can express every even split. The result is None if the number
    is not a power of a prime, or if the platform does not support `custom_partitioning`."""
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
