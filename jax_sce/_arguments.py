"""Check the arguments and convert them to arrays. The options become one object, `Options`."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _axis
from ._axis import AxisName
from ._rows import STATIC, compute_dtype
from ._targets import Sparse, Teacher
from ._types import ArrayLike

REDUCTIONS = ("none", "sum", "mean")
_CUT_BY_JAX = (np.int64, np.uint64)  # without x64, JAX truncates them to 32 bits
FLOATS = ("float16", "bfloat16", "float32", "float64")
_FLOAT_NAMES = f"{', '.join(FLOATS[:-1])} or {FLOATS[-1]}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
    """The options of every loss. An array option that is not used is None, so it costs nothing. The
    others have the dtype that the loss is computed in."""

    valid: Array | None = (
        None  # bool, [N...]: False if an example does not count, whatever its weight
    )
    weights: Array | None = None  # [N...]
    label_smoothing: Array | None = None  # scalar
    class_weights: Array | None = None  # [V]
    z_loss: Array | None = None  # scalar
    softcap: Array | None = None  # scalar
    temperature: Array | None = None  # [N...]
    ignore_index: int | None = field(default=None, metadata=STATIC)
    reduction: str = field(default="none", metadata=STATIC)
    axis_name: AxisName = field(default=None, metadata=STATIC)  # mesh axes of the classes
    batch_axis: AxisName = field(default=None, metadata=STATIC)  # mesh axes of all examples
    forward_mode: bool = field(default=False, metadata=STATIC)
    return_aux: bool = field(default=False, metadata=STATIC)
    chunk_size: int | None = field(default=None, metadata=STATIC)
    precision: Any = field(default=None, metadata=STATIC)  # of the head's products

    def arrays(self) -> dict[str, Array]:
        """The array options that are used, by name."""
        fields = {name: getattr(self, name) for name in _ARRAYS}
        return {name: x for name, x in fields.items() if x is not None}

    def where(self, keep: Array | None) -> "Options":
        """The same options, but examples where `keep` is False are not valid either."""
        if keep is None:
            return self
        valid = keep if self.valid is None else self.valid & keep
        return dataclasses.replace(self, valid=valid)

    @property
    def counts(self) -> Array | None:
        """bool, [N...]: which examples are valid and have a weight other than 0; None for all."""
        if self.weights is None:
            return self.valid
        return self.where(self.weights != 0).valid


_ARRAYS = (
    "valid", "weights", "label_smoothing", "class_weights", "z_loss", "softcap", "temperature"
)  # fmt: skip


def options(
    dtype: jnp.dtype, batch: tuple[int, ...], num_classes: int, *, ignore_index: int | None = None,
    label_smoothing: ArrayLike, class_weights: ArrayLike | None, weights: ArrayLike | None,
    z_loss: ArrayLike, softcap: ArrayLike | None, temperature: ArrayLike | None, reduction: str,
    axis_name: AxisName, forward_mode: bool, return_aux: bool, chunk_size: int | None = None,
    precision: Any = None,
) -> Options:  # fmt: skip
    """Check the options. The keywords are the public argument names; `dtype` is that of the logits."""
    dtype = compute_dtype(dtype)

    def number(name: str, x: ArrayLike, interval: str | None = None) -> Array | None:
        value = scalar(name, x, interval).astype(dtype)
        return None if isinstance(x, int | float) and x == 0 else value

    def each(name: str, x: ArrayLike | None, interval: str | None = None) -> Array | None:
        return None if x is None else of_examples(name, x, batch, interval).astype(dtype)

    def numbers(name: str, x: ArrayLike | None, expected: tuple[int, ...]) -> Array | None:
        return None if x is None else array(name, x, "real", expected).astype(dtype)

    return Options(
        weights=each("weights", weights),
        label_smoothing=number("label_smoothing", label_smoothing, "[0, 1]"),
        class_weights=numbers("class_weights", class_weights, (num_classes,)),
        z_loss=number("z_loss", z_loss),
        softcap=None if softcap is None else number("softcap", softcap, "(0, inf)"),
        temperature=each("temperature", temperature, "(0, inf)"),
        ignore_index=ignore_index,
        reduction=one_of("reduction", reduction, REDUCTIONS),
        axis_name=manual_axes("axis_name", axis_name),
        forward_mode=flag("forward_mode", forward_mode),
        return_aux=flag("return_aux", return_aux),
        chunk_size=positive_or_none("chunk_size", chunk_size),
        precision=product_precision(precision),
    )


# -- masks and labels ---------------------------------------------------------------------------------


def masks(
    where: ArrayLike | None, logits_shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """`where` as a pair: a mask of examples, [N...], and a mask of classes, with the logits' rank. At
    least one of them is None. The rank of `where` decides which."""
    if where is None:
        return None, None
    where = array("where", where, "bool")
    batch = batch_shape(logits_shape, axes)
    if where.ndim == len(logits_shape) and _broadcasts(where.shape, logits_shape):
        return None, where
    if where.ndim == len(batch) and _broadcasts(where.shape, batch):
        return jnp.broadcast_to(where, batch), None
    mask = tuple(n if a in axes else 1 for a, n in enumerate(logits_shape))
    raise ValueError(
        f"where must have shape {batch}, a mask of examples, or {logits_shape}, a mask of classes (axes "
        f"of size 1 broadcast), got {where.shape}; a mask of classes for all examples has shape {mask}"
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(shape, to, strict=True))


def batch_shape(logits_shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(logits_shape) if axis not in axes)


def labels(
    x: ArrayLike, has_ids: bool, ignore_index: Any, advice: str = ""
) -> tuple[Array, int | None]:
    """Labels as an array (of integers, if `has_ids`), and the value that `ignore_index` has in it."""
    ignored = integer_or_none("ignore_index", ignore_index)
    if isinstance(x, Sparse):
        raise TypeError("labels must be class ids, got a Sparse; pass it to softmax_cross_entropy")
    if isinstance(x, Teacher):
        raise TypeError(
            "labels must be an array, got a Teacher; only linear_softmax_cross_entropy takes one"
        )
    if not has_ids:
        return array("labels", x, "real"), ignored
    return class_ids("labels", x, ignored, advice)


def class_ids(
    name: str, x: ArrayLike, ignored: int | None, advice: str = ""
) -> tuple[Array, int | None]:
    if not isinstance(x, jax.Array) and jax.dtypes.canonicalize_dtype(np.int64) == np.int32:
        x, ignored = _narrowed(x, ignored)
    return array(name, x, "integer", advice=advice), ignored


def _narrowed(x: ArrayLike, ignored: int | None) -> tuple[ArrayLike, int | None]:
    """Convert NumPy's and Python's integers to 32 bits. JAX would truncate larger ones, which can turn a
    bad label into another class. Here those become -1 or the largest int32, and ignored labels -2."""
    try:
        wide = _wide_integers(x)
    except (TypeError, ValueError):
        return x, ignored  # `array` accepts it, or raises
    if wide is None:
        return x, ignored
    fits = (wide >= np.iinfo(np.int32).min) & (wide <= np.iinfo(np.int32).max)
    if np.all(fits):
        return wide.astype(np.int32), ignored
    narrow = np.where(fits, wide, 0).astype(np.int32)
    narrow = np.where(fits & (narrow >= 0), narrow, np.where(wide > 0, np.iinfo(np.int32).max, -1))
    return np.where(wide == ignored, -2, narrow).astype(np.int32), None if ignored is None else -2


def _wide_integers(x: Any) -> np.ndarray | None:
    """Integers that may not fit in 32 bits, as a NumPy array; None for anything else."""
    if not isinstance(x, int | list | tuple):
        wide = np.asarray(x)
        return wide if wide.dtype in _CUT_BY_JAX else None
    wide = np.asarray(x, dtype=object)  # Python's integers may have any size
    if any(isinstance(n, bool) for n in wide.flat):
        return None
    return np.array([operator.index(n) for n in wide.flat], object).reshape(wide.shape)


def sparse(labels: Sparse, batch: tuple[int, ...]) -> Sparse:
    """Check the arrays, [N..., K], and convert `values` to floats."""
    ids, _ = class_ids("labels.ids", labels.ids, None)
    if ids.shape[:-1] != batch or ids.ndim != len(batch) + 1 or ids.shape[-1] == 0:
        raise ValueError(
            f"labels.ids must have shape {_with_axis(batch, 'K')} with K at least 1, got {ids.shape}"
        )
    values = array("labels.values", labels.values, "real", ids.shape)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.float32)
    return Sparse(ids, values)


def _with_axis(batch: tuple[int, ...], axis: str) -> str:
    return f"({', '.join([*map(str, batch), axis])}{'' if batch else ','})"


def teacher(labels: Teacher, batch: tuple[int, ...], num_classes: int) -> Teacher:
    """Check the arrays, broadcast the temperature to [N...], and stop the gradients of all arrays."""
    hidden = array("labels.hidden", labels.hidden, "floating")
    kernel = array("labels.kernel", labels.kernel, "floating")
    if hidden.ndim != len(batch) + 1 or hidden.shape[:-1] != batch:
        raise ValueError(
            f"labels.hidden must have shape {_with_axis(batch, 'T')}, got {hidden.shape}"
        )
    shape("labels.kernel", kernel, (hidden.shape[-1], num_classes))
    dtype = wider("labels.hidden", hidden, "labels.kernel", kernel)
    of = compute_dtype(dtype)
    bias, softcap, temperature = labels.bias, labels.softcap, labels.temperature
    if bias is not None:
        bias = array("labels.bias", bias, "floating", (num_classes,))
    if softcap is not None:
        softcap = scalar("labels.softcap", softcap, "(0, inf)").astype(of)
    if temperature is not None:
        interval = "(0, inf)"
        temperature = of_examples("labels.temperature", temperature, batch, interval).astype(of)
    arrays = hidden.astype(dtype), kernel.astype(dtype), bias, temperature, softcap
    is_divergence = flag("labels.divergence", labels.divergence)
    return Teacher(*jax.lax.stop_gradient(arrays), divergence=is_divergence)


def rank_of_labels(x: Any) -> int:
    """The rank of labels whose dtype is not checked yet."""
    try:
        return np.ndim(x)
    except (TypeError, ValueError):
        return array("labels", x, "real").ndim  # or raises


def not_ignored(labels: Array, ignore_index: int | None) -> Array | None:
    """bool, [N...]: which labels differ from `ignore_index`. None means all, also if `ignore_index` does
    not fit in the dtype of the labels."""
    if ignore_index is None:
        return None
    info = jnp.iinfo(labels.dtype)
    if not info.min <= ignore_index <= info.max:
        return None
    return labels != jnp.asarray(ignore_index, labels.dtype)


# -- arrays -------------------------------------------------------------------------------------------

_KINDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "floating": ("have a floating-point dtype", (jnp.floating,)),
    "integer": ("have an integer dtype", (jnp.integer,)),  # `jnp.integer` does not include bool
    "bool": ("have dtype bool", (jnp.bool_,)),
    "real": (
        "have a floating-point, integer or bool dtype",
        (jnp.floating, jnp.integer, jnp.bool_),
    ),
}


def array(
    name: str, x: ArrayLike, kind: str, expected: tuple[int, ...] | None = None,
    noun: str = "an array", advice: str = "",
) -> Array:  # fmt: skip
    """`x` as an array. `kind` is a key of `_KINDS`; `expected` is the shape that it must have, if
    any."""
    if x is None or isinstance(x, str):
        raise TypeError(f"{name} must be {noun}, got {x!r}")
    if kind == "real" and isinstance(x, np.ndarray | np.generic) and x.dtype in _CUT_BY_JAX:
        x = x.astype(np.float64)
    try:
        out = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be {noun}, got {type(x).__name__}: {error}") from error
    expectation, dtypes = _KINDS[kind]
    if not any(jnp.issubdtype(out.dtype, dtype) for dtype in dtypes):
        raise TypeError(f"{name} must {expectation}, got {out.dtype}{advice}")
    if jnp.issubdtype(out.dtype, jnp.floating) and out.dtype.name not in FLOATS:
        raise TypeError(f"{name} must have dtype {_FLOAT_NAMES}, got {out.dtype}")
    if expected is not None:
        shape(name, out, expected)
    return out


def shape(name: str, x: Array, expected: tuple[int, ...], advice: str = "") -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {x.shape}{advice}")


def of_examples(
    name: str, x: ArrayLike, batch: tuple[int, ...], interval: str | None = None
) -> Array:
    """One number for each example, [N...]. A scalar and axes of size 1 broadcast."""
    numbers = array(name, x, "real", noun="a number or an array")
    check_interval(name, x, interval)
    if numbers.shape == batch:
        return numbers
    if numbers.ndim and not (numbers.ndim == len(batch) and _broadcasts(numbers.shape, batch)):
        raise ValueError(
            f"{name} must be a number or have shape {batch} (axes of size 1 broadcast), "
            f"got {numbers.shape}"
        )
    return jnp.broadcast_to(numbers, batch)


def scalar(name: str, x: ArrayLike, interval: str | None = None) -> Array:
    """`x` as a real scalar. A value that is known while tracing must lie in `interval`, e.g.
    "(0, inf)"."""
    number = array(name, x, "real", noun="a number")
    if number.ndim:
        raise ValueError(f"{name} must be a number, got an array of shape {number.shape}")
    check_interval(name, x, interval)
    return number


def check_interval(name: str, x: Any, interval: str | None) -> None:
    if interval is None:
        return
    try:
        values = np.ravel(np.asarray(x))
    except jax.errors.TracerArrayConversionError:
        return
    low, high = map(float, interval[1:-1].split(","))
    above = values > low if interval[0] == "(" else values >= low
    below = values < high if interval[-1] == ")" else values <= high
    outside = values[~(above & below)]
    if outside.size:
        raise ValueError(f"{name} must lie in {interval}, got {float(outside[0])}")


def class_axes(axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of distinct axes in [0, ndim); None means all of them."""
    if axis is None:
        return tuple(range(ndim))
    try:
        axes = tuple(operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,)))
    except TypeError:
        raise TypeError(f"axis must be an int, a tuple of ints or None, got {axis!r}") from None
    if not all(-ndim <= a < ndim for a in axes):
        raise ValueError(
            f"axis must lie in [{-ndim}, {ndim}) for logits of rank {ndim}, got {axis}"
        )
    axes = tuple(a % ndim for a in axes)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"axis must name at least one axis, and none twice, got {axis}")
    return axes


def num_classes(logits: Array, axes: tuple[int, ...]) -> int:
    count = math.prod(logits.shape[a] for a in axes)
    check_classes("logits", count, f"shape {logits.shape} with the classes on axis {axes}")
    return count


def check_classes(name: str, count: Any, got: str) -> None:
    if not isinstance(count, int):  # symbolic, in `jax.export`; only the examples may be
        raise ValueError(
            f"{name} must have a known number of classes, not a symbolic one, got {got}"
        )
    if count == 0:
        raise ValueError(f"{name} must have at least one class, got {got}")


def head(hidden: Array, kernel: Array) -> tuple[tuple[int, ...], int]:
    """The shape of the examples, N..., and V, from `hidden` [N..., D] and `kernel` [D, V]."""
    if hidden.ndim == 0:
        raise ValueError("hidden must have shape (..., features), got ()")
    if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"kernel must have shape ({hidden.shape[-1]}, classes) for hidden of shape {hidden.shape}, "
            f"got {kernel.shape}"
            + ("; pass its transpose" if kernel.shape[1:] == hidden.shape[-1:] else "")
        )
    check_classes("kernel", kernel.shape[1], f"shape {kernel.shape}")
    return hidden.shape[:-1], kernel.shape[1]


def product_dtype(dtype: Any, hidden: Array, kernel: Array) -> jnp.dtype:
    """The dtype of the head's matrix products: `dtype`, or the wider dtype of the operands."""
    if dtype is None:
        return wider("hidden", hidden, "kernel", kernel, ", unless dtype is given")
    try:
        is_array = isinstance(dtype, jax.Array | np.ndarray | np.generic)
        given = None if is_array else jnp.dtype(dtype)
    except TypeError:
        given = None
    if given is None:
        raise TypeError(f"dtype must be a floating-point dtype or None, got {dtype!r}")
    if given.name not in FLOATS:
        raise TypeError(f"dtype must be {_FLOAT_NAMES}, got {given}")
    return jnp.dtype(jax.dtypes.canonicalize_dtype(given))


def wider(name: str, x: Array, other: str, y: Array, advice: str = "") -> jnp.dtype:
    """The dtype that JAX promotes `x` and `y` to."""
    try:
        return jnp.promote_types(x.dtype, y.dtype)
    except ValueError:
        expected = f"the dtype of {name}, {x.dtype}, under strict dtype promotion{advice}"
        raise TypeError(f"{other} must have {expected}, got {y.dtype}") from None


def product_precision(x: Any) -> Any:
    """`x`, if `jax.numpy.dot` accepts it as a precision. The error quotes that of `jax.numpy.dot`."""
    if x is not None:
        one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        try:
            hash(x)
            jax.eval_shape(lambda a: jnp.dot(a, a, precision=x), one)
        except Exception as error:
            expected = "precision must be one that jax.numpy.dot accepts"
            raise TypeError(f"{expected}, got {x!r}: {error}") from error
    return x


def one_of(name: str, x: Any, options: tuple[str, ...]) -> str:
    if not isinstance(x, str) or x not in options:
        raise ValueError(f"{name} must be one of {options}, got {x!r}")
    return x


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {x!r}")
    return bool(x)


def integer_or_none(name: str, x: Any) -> int | None:
    if x is None:
        return None
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{name} must be an integer or None, got {x!r}") from None


def positive_or_none(name: str, x: Any) -> int | None:
    value = integer_or_none(name, x)
    if value is not None and value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def mesh_axes(name: str, x: Any) -> tuple[str, ...]:
    """The names of mesh axes as a tuple."""
    if x is None:
        return ()
    axes = (x,) if isinstance(x, str) else x
    if not isinstance(axes, tuple) or not axes or not all(isinstance(n, str) for n in axes):
        raise TypeError(f"{name} must be a mesh axis, a tuple of mesh axes or None, got {x!r}")
    return axes


def split_over(name: str, x: Array, axis_name: AxisName) -> None:
    if whole := _axis.whole_over(axis_name, x):
        raise ValueError(
            f"{name} must be split over the mesh axis {whole[0]!r} (see axis_name), got the same array "
            "on all its devices"
        )


def manual_axes(name: str, x: Any) -> AxisName:
    """`x`, if it names mesh axes of the enclosing `jax.shard_map`."""
    for axis in mesh_axes(name, x):
        try:
            _axis.size(axis)
        except NameError:
            expected = "a mesh axis of the enclosing jax.shard_map"
            raise ValueError(f"{name} must name {expected}, got {axis!r}") from None
    return x
