"""A head as one primitive: choose its loop, and split it over devices.

In a program that the compiler splits, `custom_partitioning` tells us the shardings of hidden states and
kernel, and each device runs the loop over its own examples and classes. If devices with different
examples split the kernel's features (FSDP), the features are gathered once, before the loop. In the loop
the devices exchange only row statistics. After the loop the gradients are summed once. If the features
of the kernel's gradient are split, it is reduce-scattered. A `Layout` describes this. If the shardings
are known while tracing, from `shard` or on meshes with explicit axes, `jax.shard_map` is used
instead."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import _axis, _backend, _chunks, _head, _rows
from ._head import OF_EXAMPLES, Cotangents, Inputs, Values, values_like
from ._targets import Sparse, Teacher

Axes = tuple[str, ...]
# Devices that split the classes keep their parts of these gradients, and sum all other gradients.
_OF_CLASSES = ("kernel", "bias", "class_weights", "labels")
# The axes of the features. While the loop runs, they are not split.
_FEATURES = {"hidden": -1, "kernel": 0, "labels.hidden": -1, "labels.kernel": 0}


class Layout(NamedTuple):
    """The mesh axes that split each array. No mesh axis splits both examples and classes.

    Before the loop, an all-to-all turns a split of the kernel's features over `moved` into a split of
    its classes. After the loop, another turns a split of the gradient's classes over `returned` into a
    split of its features. Both are the last axes of `classes`."""

    examples: tuple[Axes, ...]  # for each axis of the examples
    classes: Axes
    features: Axes  # of the kernel, gathered before the loop
    moved: Axes = ()
    returned: Axes = ()
    scattered: Axes = ()  # of the features of the kernel's gradient, which is reduce-scattered

    @property
    def all_examples(self) -> Axes:
        return tuple(itertools.chain(*self.examples))

    @property
    def kernel(self) -> tuple[Axes, Axes]:
        """The split of the kernel before the loop: (features, classes)."""
        return self.features + self.moved, self.classes[: len(self.classes) - len(self.moved)]

    @property
    def gradient(self) -> tuple[Axes, Axes]:
        """The split of the kernel's gradient after the loop: (features, classes)."""
        held = self.classes[: len(self.classes) - len(self.returned)]
        return self.scattered + self.returned, held


# What to compute: the values; the kernel, with all features of the classes of a device; or the values
# and the gradients with respect to the arrays of these names.
What = Literal["values", "kernel"] | frozenset[str]


def values(inputs: Inputs) -> Values:
    """The values of a head, `_head.values`, with the loop of the platform."""
    return _bind("values", inputs)


def kernel(inputs: Inputs) -> Array:
    """The kernel as a residual, from which the backward pass computes the logits again. In a program
    that the compiler splits, each device saves all features of its classes, so they are gathered only
    once."""
    return _bind("kernel", inputs)


def gradients(
    wanted: frozenset[str], inputs: Inputs, g: Cotangents
) -> tuple[Values, dict[str, Array]]:
    """The values and gradients of a head, `_head.gradients`, with the loop of the platform."""
    return _bind(wanted, inputs, g)


def by_loop(function: Callable, *args: Any) -> Any:
    """`function(loop, *args)` with the loop of the platform, in plain JAX."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count()
    if mesh.manual_axes:  # the compiler may still split over the axes that are not manual
        devices = math.prod(n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes)

    def by(loop):
        return functools.partial(function, loop._replace(devices=devices))

    loops = {platform: backend.loop for platform, backend in _backend.BACKENDS.items()}
    own = {platform: by(loop) for platform, loop in loops.items() if loop is not _chunks.LOOP}
    return lax.platform_dependent(*args, **own, default=by(_chunks.LOOP))


def _function(what: What) -> Callable:
    """The function `(loop, inputs, *g)` that computes `what`; only gradients take cotangents g. A kernel
    wider than the matrix products is narrowed once, before the loop. Its gradient stays wide."""
    if what == "values":
        return lambda loop, inputs: _head.values(loop, inputs.narrowed())
    if what == "kernel":
        return lambda loop, inputs: inputs.kernel
    return lambda loop, inputs, g: _head.gradients(what, loop, inputs.narrowed(), g)


def _narrowed(what: What, inputs: Inputs) -> Inputs:
    """Narrow the kernel before devices send it to each other."""
    return inputs if what == "kernel" else inputs.narrowed()


def _results(what: What, inputs: Inputs) -> Any:
    """The shapes and dtypes of the results."""
    if what == "kernel":
        return jax.ShapeDtypeStruct(inputs.kernel.shape, inputs.kernel.dtype)
    of_each = jax.ShapeDtypeStruct(inputs.batch, inputs.dtype)
    places = jax.ShapeDtypeStruct(inputs.batch, jnp.int32)
    values = values_like(inputs, of_each, places)
    if what == "values":
        return values
    arrays = {k: x for k, x in inputs.arrays().items() if k in what}
    return values, {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype if k in OF_EXAMPLES else inputs.dtype)
        for k, x in arrays.items()
    }


def _bind(what: What, *args: Any) -> Any:
    if jax.sharding.get_abstract_mesh().manual_axes:  # `custom_partitioning` does not work there
        return by_loop(_function(what), *args)
    leaves, tree = jax.tree.flatten(args)
    out = _primitive().bind(*leaves, what=what, tree=tree)
    return jax.tree.unflatten(jax.tree.structure(_results(what, args[0])), out)


@functools.cache
def _primitive():
    """The primitive of a head. It is made on first use, because its imports take long."""

    def eager(*leaves, what, tree):  # under `jax.disable_jit`
        loop = _backend.backend_of(jax.default_backend()).loop
        return _backend.flat(functools.partial(_function(what), loop), tree)(*leaves)

    def shapes(*leaves, what, tree):
        results = _results(what, jax.tree.unflatten(tree, leaves)[0])
        return [jax.core.ShapedArray(x.shape, x.dtype) for x in jax.tree.leaves(results)]

    def plain(what, tree):
        return _backend.flat(functools.partial(by_loop, _function(what)), tree)

    def jvp(primals, dots, *, what, tree):
        return _rows.jvp_of(plain(what, tree), primals, _rows.moving(primals, dots))

    def batch(leaves, dims, *, what, tree):
        out = jax.vmap(plain(what, tree), dims)(*leaves)
        return out, [0] * len(out)

    def choose(platform, context, *, what, tree):
        return _choose(what, platform, context, tree)

    return _backend.primitive("jax_sce_head", eager, shapes, choose, jvp, batch)


def _choose(what: What, platform: str | None, context, tree) -> tuple[Callable, Any]:
    """Choose a loop on each device, or one loop that the compiler can split."""
    function, loop = _function(what), _backend.backend_of(platform).loop
    if _backend.program(context) == "split":
        on_devices = _backend.with_devices(context, platform)
        if on_devices is not None:
            args = jax.tree.unflatten(tree, context.avals_in)
            run = _partitioned(what, functools.partial(function, loop), args)
            return _backend.flat(run, tree), on_devices
    devices = _backend.num_devices(context)
    if devices == 1:
        return _backend.flat(functools.partial(function, loop), tree), context
    loop = _chunks.LOOP._replace(devices=devices)
    run = _with_whole_features(what, functools.partial(function, loop), devices)
    return _backend.flat(run, tree), context


def _with_whole_features(what: What, function: Callable, devices: int) -> Callable:
    """Make the compiler gather the features before the loop, and split the gradients' features after it.
    Otherwise, in every chunk, it would sum logits over the devices and scatter the kernel's gradient.
    The shardings of examples and classes are left to the compiler."""
    # Only the number of devices matters, because the constraints name no mesh axis.
    mesh = Mesh(np.array(jax.devices()[:1] * devices), ("jax_sce",))

    def whole(arrays: dict[str, Array]) -> dict[str, Array]:
        for name, axis in _FEATURES.items():
            if name in arrays:
                spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * arrays[name].ndim
                spec[axis] = None
                sharding = NamedSharding(mesh, PartitionSpec(*spec))
                arrays[name] = lax.with_sharding_constraint(arrays[name], sharding)
        return arrays

    def run(inputs: Inputs, *g: Any) -> Any:
        inputs = _narrowed(what, inputs)
        out = function(inputs.having(whole(inputs.arrays())), *g)
        return out if isinstance(out, Values | Array) else (out[0], whole(out[1]))

    return run


def _partitioned(what: What, function: Callable, args) -> Callable:
    """The head on each device, following the shardings of hidden states and kernel."""
    from jax.experimental.custom_partitioning import custom_partitioning

    whole = args[0]
    results = _results(what, whole)

    def laid_out(make, row, hidden, kernel, gradient, gathered, classes, other):
        """The arguments and results with `make(*axes)` in place of each array. The parameters name the
        axes of the examples, of the hidden states' features, of the kernel (as argument, gradient and
        result), of the classes, and the other axis of an example (see `axes_of`)."""
        axes = axes_of(whole, row, hidden, kernel, classes, other)
        of_row = make(*row)
        of_g = (jax.tree.map(lambda _: of_row, g) for g in args[1:])
        operands = whole.having({k: make(*x) for k, x in axes.items()}), *of_g
        values = values_like(whole, of_row, of_row)
        if what == "kernel":
            return operands, make(*gathered)
        if what == "values":
            return operands, values
        axes["kernel"] = gradient
        return operands, (values, {k: make(*axes[k]) for k in results[1]})

    def rule(mesh, operand_types, result_types):
        row, kernel = [f"n{axis}" for axis in range(len(whole.batch))], ("d", "v")
        # The gradient may split its features differently from the kernel.
        others = ("e", "v"), ("g", "v")
        sides = laid_out(lambda *x: " ".join(x), row, "h", kernel, *others, "v", "t")
        return " -> ".join(", ".join(jax.tree.leaves(side)) for side in sides)

    def partition(mesh, operands, results):
        inputs = operands[0]
        hidden, kernel = _split_over(inputs.hidden), _split_over(inputs.kernel)
        gradient: Axes = ()
        if not isinstance(what, str) and "kernel" in what:
            gradient = _split_over(results[1]["kernel"])[0]
        layout = layout_of(inputs, hidden[:-1], kernel, gradient or kernel[0], mesh.shape)

        def make(*axes):
            return NamedSharding(mesh, PartitionSpec(*axes))

        into, out_of = laid_out(
            make, layout.examples, (), layout.kernel, layout.gradient, ((), layout.classes),
            layout.classes, ())  # fmt: skip
        return mesh, on_each_device(what, function, layout, whole), out_of, into

    call = custom_partitioning(
        lambda *args: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
    )
    call.def_partition(partition, sharding_rule=rule)
    return call


def split_over(sharding: Any, rank: int) -> tuple[Axes, ...]:
    """For each axis of an array, the mesh axes that split it."""
    spec = _backend.spec_of(sharding, rank)
    return tuple((axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec)


def _split_over(x: Any) -> tuple[Axes, ...]:
    return split_over(x.sharding, len(x.shape))


def axes_of(
    inputs: Inputs, row: Any, hidden: Any, kernel: Any, classes: Any, other: Any
) -> dict[str, Any]:
    """The axes of each array, by its name, given the axes of the examples (`row`), the hidden states'
    features, the kernel, the classes, and the other axis of an example: a teacher's features, or the K
    classes of a `Sparse`."""
    known = {
        "hidden": (*row, hidden),
        "kernel": kernel,
        "labels": row if inputs.has_ids else (*row, classes),
        "bias": (classes,),
        "class_weights": (classes,),
        "labels.ids": (*row, other),
        "labels.values": (*row, other),
        "labels.hidden": (*row, other),
        "labels.kernel": (other, classes),
        "labels.bias": (classes,),
    }
    known |= {name: row for name in OF_EXAMPLES if name not in known}
    return {name: known.get(name, ()) for name in inputs.arrays()}


def layout_of(
    inputs: Inputs, examples: tuple[Axes, ...], kernel: tuple[Axes, ...], gradient: Axes,
    sizes: Mapping[str, int],
) -> Layout:  # fmt: skip
    """The layout to compute in, given the split of the examples, of the kernel, and of the features of
    its gradient."""

    def divides(size: int, *axes: Axes) -> bool:
        return size % math.prod(sizes[axis] for axis in itertools.chain(*axes)) == 0

    features, classes = kernel
    num_features, num_classes = inputs.kernel.shape
    # If a mesh axis splits both examples and classes, keep it for whichever are more: gather the fewer.
    if math.prod(inputs.batch) > num_classes:
        classes = tuple(a for a in classes if a not in itertools.chain(*examples))
    examples = tuple(tuple(a for a in axes if a not in classes) for axes in examples)
    split = [*itertools.chain(*examples)]
    # Devices with the same examples would all compute the same, so give each a part of the classes.
    moved = tuple(axis for axis in features if axis not in split)
    features = features if divides(num_features, features) else ()
    if moved and features[-len(moved) :] == moved and divides(num_classes, classes, moved):
        features, classes = features[: -len(moved)], classes + moved
    else:
        moved = ()
    scattered = tuple(axis for axis in gradient if axis in split)
    returned = tuple(axis for axis in gradient if axis in classes)
    if returned and (returned != classes[-len(returned) :] or not divides(num_classes, classes)):
        returned = ()
    if not divides(num_features, scattered, returned):
        scattered = returned = ()
    return Layout(examples, classes, features, moved, returned, scattered)


def layout_of_arrays(inputs: Inputs, sizes: Mapping[str, int]) -> Layout:
    """`layout_of` for arrays on a mesh with explicit axes."""
    hidden, kernel = (_split_over(jax.typeof(x)) for x in (inputs.hidden, inputs.kernel))
    layout = layout_of(inputs, hidden[:-1], kernel, (), sizes)
    # A kernel gathered over devices with the same examples does not vary, but JAX does not infer that.
    features = tuple(axis for axis in layout.features if axis in layout.all_examples)
    return layout._replace(features=features)


def spec(*axes: Any) -> Any:
    """A partition spec. () or None is an axis that is not split. The return type is `Any` because specs
    replace arrays in a tree."""
    return PartitionSpec(*(x or None for x in axes))


def specs_of(inputs: Inputs, layout: Layout) -> tuple[Any, Any]:
    """The `in_specs` and `out_specs` for `jax.shard_map` of a head's loss. Each device passes its inputs
    to `gathered` first."""

    axes = axes_of(inputs, layout.examples, (), layout.kernel, layout.classes, ())
    row, options = spec(*layout.examples), inputs.options
    loss = row if options.reduction == "none" else spec()
    aux = values_like(inputs, row, row).aux
    in_specs = inputs.having({name: spec(*x) for name, x in axes.items()})
    return in_specs, (loss, aux) if options.return_aux else loss


def gathered(inputs: Inputs, layout: Layout) -> Inputs:
    """The inputs of a device, with all features of the classes that it computes."""
    kernel = inputs.kernel
    if layout.moved:
        kernel = lax.all_to_all(kernel, layout.moved, split_axis=1, concat_axis=0, tiled=True)
    if layout.features:
        kernel = lax.all_gather(kernel, layout.features, axis=0, tiled=True)
    return dataclasses.replace(inputs, kernel=kernel)


def on_each_device(what: What, function: Callable, layout: Layout, whole: Inputs) -> Callable:
    """`function(inputs, *g)` as a function of the local arrays of a device."""

    def run(inputs: Inputs, *g: Any) -> Any:
        arrays, inputs = inputs.arrays(), _narrowed(what, inputs)
        out = function(_without_padding(gathered(inputs, layout), layout, whole), *g)
        if isinstance(out, Values | Array):
            return out
        values, gradients = out
        return values, {k: _total(k, x, arrays[k], layout) for k, x in gradients.items()}

    return run


def _without_padding(inputs: Inputs, layout: Layout, whole: Inputs) -> Inputs:
    """Ignore the padding on the last devices, which may hold anything: padding among the examples
    becomes not valid, and padding among the classes does not exist."""
    kernel, bias, labels, options = inputs.kernel, inputs.bias, inputs.labels, inputs.options
    for axis, (axes, size) in enumerate(zip(layout.examples, whole.batch, strict=True)):
        here = inputs.batch[axis]
        if here * _axis.size(axes) > size:
            places = lax.broadcasted_iota(jnp.int32, inputs.batch, axis)
            options = options.where(places + _axis.offset(axes, here) < size)
    exists, num_classes, here = None, whole.kernel.shape[1], kernel.shape[1]
    if here * _axis.size(layout.classes) > num_classes:
        places = jnp.arange(here, dtype=jnp.int32) + _axis.offset(layout.classes, here)
        exists = (places < num_classes)[None]
        kernel = jnp.where(exists, kernel, 0)
        bias = None if bias is None else jnp.where(exists[0], bias, 0)
        if isinstance(labels, Teacher):
            teacher: Any = labels
            of_bias = None if teacher.bias is None else jnp.where(exists[0], teacher.bias, 0)
            of_kernel = jnp.where(exists, teacher.kernel, 0)
            labels = dataclasses.replace(teacher, kernel=of_kernel, bias=of_bias)
        elif not isinstance(labels, Sparse) and not inputs.has_ids:
            labels = jnp.where(jnp.expand_dims(exists[0], range(len(inputs.batch))), labels, 0)
        if options.class_weights is not None:
            weights = jnp.where(exists[0], options.class_weights, 0)
            options = dataclasses.replace(options, class_weights=weights)
    options = dataclasses.replace(options, axis_name=layout.classes or None)
    return Inputs(inputs.hidden, kernel, labels, bias, options, exists)


def _total(name: str, gradient: Array, like: Array, layout: Layout) -> Array:
    """The gradient summed over the devices. It is first rounded to the dtype of the array, so that
    devices send only 16 bits per element of a 16-bit array."""
    axes = () if name in OF_EXAMPLES else layout.all_examples
    if name not in _OF_CLASSES:
        axes += layout.classes
    total = gradient.astype(like.dtype)
    if name == "kernel" and layout.scattered:
        total = lax.psum_scatter(total, layout.scattered, scatter_dimension=0, tiled=True)
        axes = tuple(axis for axis in axes if axis not in layout.scattered)
    total = lax.psum(total, axes) if axes else total
    if name == "kernel" and layout.returned:
        total = lax.all_to_all(total, layout.returned, split_axis=0, concat_axis=1, tiled=True)
    return total.astype(gradient.dtype)
