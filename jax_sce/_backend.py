"""The seam: which code computes a row operation, or a head, on the platform that a program is compiled
for.

`_rows.py` has each row operation in plain JAX. Here each is bound as one primitive, and takes from its
plain form the derivative, the batching rule and the fallback. A platform in `BACKENDS` may replace it:
by a kernel, an opaque call, or by another form in plain JAX that its compiler likes better. Nothing
above knows of platforms.

A kernel computes the rows of one device. In a program for one device, or inside `jax.shard_map` over
all axes of the mesh, it is called as it is. In a program that the compiler splits over devices,
`custom_partitioning` calls it on each device for its own rows; where the classes are split, the plain
form runs on each device and the statistics of the parts are merged. Everywhere else the plain form is
used: exported programs, which must run where there is no kernel, meshes with explicit axes, and partly
manual ones."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from . import _axis, _chunks, _cpu, _gpu, _rows, _split
from ._axis import AxisName
from ._chunks import Loop
from ._rows import Cotangent, Rows, Targets


class Backend(NamedTuple):
    """What a platform computes in its own way, by the names of the operations."""

    kernels: Mapping[str, Callable]  # opaque calls, with the arguments of the operation
    supports: Callable[..., bool]  # are there kernels for arguments (or their shapes) like these?
    forms: Mapping[str, Callable]  # other plain forms
    loop: Loop  # how a head runs over its chunks


BACKENDS = {
    "cpu": Backend(_cpu.KERNELS, _cpu.supports, _cpu.FORMS, _cpu.LOOP),
    "cuda": Backend(_gpu.KERNELS, _gpu.supports, {}, _chunks.LOOP),
}
_NONE = Backend({}, lambda *_: False, {}, _chunks.LOOP)


class Operation(NamedTuple):
    name: str
    plain: Callable  # of `Rows` and further arrays of their rank
    num_statistics: int = 0  # results that are [N, 1], and one more with a mask; 0 for a cotangent
    whole: Callable | None = None  # of rows split over devices: (*args, axis_name, local)
    tangents: Callable | None = None  # of statistics: (out, primals, dots); else those of `plain`


OPERATIONS = (
    Operation(
        "label_statistics",
        _rows.label_statistics,
        3,
        _split.whole_label_statistics,
        _rows.label_tangents,
    ),
    Operation("label_cotangent", _rows.label_cotangent),
    Operation(
        "target_statistics",
        _rows.target_statistics,
        4,
        _split.whole_target_statistics,
        _rows.target_tangents,
    ),
    Operation("target_cotangent", _rows.target_cotangent),
)


def label_statistics(rows: Rows, labels: Array) -> tuple[Array, ...]:
    return tuple(_bind(OPERATIONS[0], rows, labels))


def label_cotangent(rows: Rows, *args: Array) -> Rows:
    return Cotangent(*_bind(OPERATIONS[1], rows, *args), *_no_softcap(rows)).of(rows)


def target_statistics(rows: Rows, targets: Targets) -> tuple[Array, ...]:
    return tuple(_bind(OPERATIONS[2], rows, targets))


def target_cotangent(rows: Rows, targets: Targets, *args: Array) -> Rows:
    return Cotangent(*_bind(OPERATIONS[3], rows, targets, *args), *_no_softcap(rows)).of(rows)


def by_loop(function: Callable, *args: Any) -> Any:
    """`function(loop, *args)`, a head's values or gradients, by the loop of the platform."""
    loops = {
        platform: functools.partial(function, backend.loop)
        for platform, backend in BACKENDS.items()
        if backend.loop is not _NONE.loop
    }
    return lax.platform_dependent(*args, **loops, default=functools.partial(function, _NONE.loop))


def _no_softcap(rows: Rows) -> tuple[None, ...]:
    return (None,) if rows.softcap is None else ()


def _bind(operation: Operation, *args: Any) -> list[Array]:
    leaves, tree = jax.tree.flatten(args)

    def bind(*leaves):
        return _primitive(operation).bind(*_axis.vary_alike(*leaves), tree=tree)

    rows = args[0]
    sharding = jax.typeof(rows.logits).sharding
    if not sharding.mesh.explicit_axes:
        return bind(*leaves)
    # The compiler lays out what is between the arguments and the results; those follow the logits.
    spec = [*sharding.spec, *[None] * (rows.logits.ndim - len(sharding.spec))]
    of_rows = [None if a - len(spec) in rows.axes else axis for a, axis in enumerate(spec)]
    specs = _results(operation, rows, spec, of_rows)
    out = [NamedSharding(sharding.mesh, PartitionSpec(*x)) for x in specs]
    return jax.sharding.auto_axes(bind, out_sharding=out)(*leaves)


def _results(operation: Operation, rows: Rows, of_logits: Any, of_row: Any) -> list[Any]:
    """One entry for each result: `of_logits` for [N, V], `of_row` for [N, 1]."""
    if operation.num_statistics:
        return [of_row] * (operation.num_statistics + (rows.mask is not None))
    return [of_logits] if rows.softcap is None else [of_logits, of_row]


@functools.cache
def _primitive(operation: Operation):
    """Made on first use: what it needs takes long to import."""
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    def eager(*leaves, tree):  # under `jax.disable_jit`
        backend = BACKENDS.get(jax.default_backend(), _NONE)
        return _flat(backend.forms.get(operation.name, operation.plain), tree)(*leaves)

    def shapes(*leaves, tree):
        rows = jax.tree.unflatten(tree, leaves)[0]
        logits = rows.logits.update(weak_type=False)
        of_row = logits.update(shape=rows.row_shape, dtype=rows.dtype)
        return _results(operation, rows, logits, of_row)

    def lower(platform: str | None, context, *leaves, tree):
        chosen, context = _choose(operation, platform, context, tree)
        return mlir.lower_fun(_flat(chosen, tree), multiple_results=True)(context, *leaves)

    def jvp(primals, dots, *, tree):
        out = primitive.bind(*primals, tree=tree)
        if operation.tangents is not None:
            zero = jax.custom_derivatives.SymbolicZero
            dots = [zero(t.aval) if isinstance(t, ad.Zero) else t for t in dots]
            args, dots = jax.tree.unflatten(tree, primals), jax.tree.unflatten(tree, dots)
            return out, list(operation.tangents(tuple(out), args, dots))
        # Leave out arguments that do not move: infinity times their tangent of 0 would be NaN.
        moving = {i: t for i, t in enumerate(dots) if not isinstance(t, ad.Zero)}

        def of_moving(moved):
            return _flat(operation.plain, tree)(*(moved.get(i, x) for i, x in enumerate(primals)))

        return out, jax.jvp(of_moving, ({i: primals[i] for i in moving},), (moving,))[1]

    def batch(leaves, dims, *, tree):
        # Every array has the rank of the logits and broadcasts to them: one more axis, in front.
        (size,) = {x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None}
        leaves = [
            x[None] if d is None else jnp.moveaxis(x, d, 0)
            for x, d in zip(leaves, dims, strict=True)
        ]
        args = jax.tree.unflatten(tree, leaves)
        logits = args[0].logits
        logits = jnp.broadcast_to(logits, (size, *logits.shape[1:]))
        args = (dataclasses.replace(args[0], logits=logits), *args[1:])
        out = primitive.bind(*jax.tree.leaves(args), tree=tree)
        return out, [0] * len(out)

    primitive = Primitive(f"jax_sce_{operation.name}")
    primitive.multiple_results = True
    primitive.def_impl(eager)
    primitive.def_abstract_eval(shapes)
    mlir.register_lowering(primitive, functools.partial(lower, None))
    for platform in BACKENDS:
        mlir.register_lowering(primitive, functools.partial(lower, platform), platform=platform)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive


def _flat(function: Callable, tree: Any) -> Callable:
    """The function of arrays alone."""
    return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))


def _choose(operation: Operation, platform: str | None, context, tree) -> tuple[Callable, Any]:
    """The function to compile, and in which context: a kernel, a kernel on each device, or a plain
    form."""
    backend = BACKENDS.get(platform, _NONE)  # type: ignore[arg-type]
    form = backend.forms.get(operation.name, operation.plain)
    kernel = backend.kernels.get(operation.name)
    args = jax.tree.unflatten(tree, context.avals_in)
    if kernel is None or not backend.supports(operation.name, *args):
        return form, context
    match _program(context):
        case "local":
            return kernel, context
        case "split" if len(args[0].axes) == 1:
            with_devices = _with_devices(context, platform)
            if with_devices is not None:
                return _partitioned(operation, kernel, form, args), with_devices
    return form, context


def _partitioned(operation: Operation, kernel: Callable, form: Callable, args) -> Callable:
    """The operation on each device: split as the logits are, each has its own rows."""
    from jax.experimental.custom_partitioning import custom_partitioning

    logits = args[0].logits
    avals, tree = jax.tree.flatten(args)

    def names(i: int, shape: tuple[int, ...]) -> str:
        """The axes of array i: those of the logits where it is as long."""
        return " ".join(
            f"n{axis}" if size == logits.shape[axis] else f"x{i}_{axis}"
            for axis, size in enumerate(shape)
        )

    def rule(mesh, operands, results):
        inputs = ", ".join(names(i, x.shape) for i, x in enumerate(avals))
        outputs = ", ".join(names(len(avals) + i, x.shape) for i, x in enumerate(results))
        return f"{inputs} -> {outputs}"

    def partition(mesh, operands, results):
        spec = tuple(operands[0].sharding.spec)
        spec += (None,) * (logits.ndim - len(spec))

        def sharding(x) -> NamedSharding:
            axes = (
                s if n == m else None for s, n, m in zip(spec, x.shape, logits.shape, strict=True)
            )
            return NamedSharding(mesh, PartitionSpec(*axes))

        of_classes = spec[args[0].axes[0]]
        local = (
            kernel
            if of_classes is None
            else functools.partial(_of_part, operation, form, of_classes)
        )
        return (
            mesh,
            _flat(local, tree),
            list(map(sharding, results)),
            tuple(map(sharding, operands)),
        )

    call = custom_partitioning(_flat(kernel, tree))
    call.def_partition(partition, sharding_rule=rule)
    return lambda *args: call(*jax.tree.leaves(args))


def _of_part(
    operation: Operation, form: Callable, axis_name: AxisName, rows: Rows, *args: Any
) -> Any:
    """The operation on a device that has a part of each row's classes."""
    first_class = _axis.offset(axis_name, rows.num_classes)
    rows = dataclasses.replace(
        rows, first_class=jnp.full((1,) * rows.logits.ndim, first_class, jnp.int32)
    )
    if operation.whole is None:
        return form(rows, *args)
    return operation.whole(rows, *args, axis_name, form)


# -- what JAX keeps private ---------------------------------------------------------------------------


def _program(context) -> str:
    """What is being compiled: "local", for one device or for each by itself; "split" over devices by
    the compiler; or neither. If a later JAX has moved what this reads, it is neither: the plain form is
    used."""
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


def _with_devices(context, platform: str | None) -> Any:
    """The context, naming devices, or None if there are none. `custom_partitioning` needs them, and JAX
    gives them only to programs with a single mesh. Any devices will do, for only their order counts;
    they stand in a mesh with an axis for each prime factor of their number. If those are all the same,
    that can express every even split. Otherwise return None."""
    try:
        module = context.module_context
        axes = module.axis_context
        devices = tuple(jax.devices(platform))[: axes.num_devices]
        factors = _prime_factors(axes.num_devices)
        mesh = AbstractMesh(tuple(factors), tuple(f"jax_sce_{i}" for i in range(len(factors))))
        if len(devices) < axes.num_devices or len(set(factors)) > 1:
            return None
        axes = dataclasses.replace(axes, device_assignment=devices, abstract_mesh=mesh)
        return context.replace(module_context=module.replace(axis_context=axes))
    except (AttributeError, TypeError, RuntimeError):  # moved by a later JAX; no such devices
        return None


def _prime_factors(n: int) -> list[int]:
    for p in range(2, n):
        if n % p == 0:
            return [p, *_prime_factors(n // p)]
    return [n]
