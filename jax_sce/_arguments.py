"""The arguments, checked once: converted to arrays, refused in one wording each, and passed on whole."""

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from . import _axis
from ._axis import AxisName
from ._rows import compute_dtype

REDUCTIONS = ("none", "sum", "mean")
FLOATS = ("float16", "bfloat16", "float32", "float64")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["valid", "weights", "label_smoothing", "class_weights", "z_loss", "softcap"],
    meta_fields=["ignore_index", "reduction", "axis_name", "batch_axis", "forward_mode", "return_aux",
                 "chunk_size"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Options:
    """What every loss takes besides logits and labels. None where an array is not used, so that it costs
    nothing; numbers are in the dtype that the loss is computed in."""

    valid: Array | None = None  # bool, [N...]: the examples that count, unless their weight is 0
    weights: Array | None = None  # [N...]
    label_smoothing: Array | None = None  # scalar
    class_weights: Array | None = None  # [V]
    z_loss: Array | None = None  # scalar
    softcap: Array | None = None  # scalar
    ignore_index: int | None = None
    reduction: str = "none"
    axis_name: AxisName = None  # the mesh axis over which the classes are split
    batch_axis: AxisName = None  # the mesh axis of the examples, if a reduction is over all of them
    forward_mode: bool = False
    return_aux: bool = False
    chunk_size: int | None = None

    def arrays(self) -> dict[str, Array]:
        """Those that are used, by name."""
        fields = {name: getattr(self, name) for name in _ARRAYS}
        return {name: x for name, x in fields.items() if x is not None}

    def where(self, keep: Array | None) -> "Options":
        """The same for fewer examples: those that `keep` keeps, too."""
        if keep is None:
            return self
        valid = keep if self.valid is None else self.valid & keep
        return dataclasses.replace(self, valid=valid)

    @property
    def counts(self) -> Array | None:
        """bool, [N...]: the valid examples of a weight other than 0; None for all."""
        if self.weights is None:
            return self.valid
        return self.where(self.weights != 0).valid


_ARRAYS = ("valid", "weights", "label_smoothing", "class_weights", "z_loss", "softcap")


# fmt: off
def options(
    dtype: jnp.dtype, batch: tuple[int, ...], num_classes: int, *, ignore_index: int | None = None,
    label_smoothing: ArrayLike, class_weights: ArrayLike | None, weights: ArrayLike | None,
    z_loss: ArrayLike, softcap: ArrayLike | None, reduction: str, axis_name: AxisName,
    forward_mode: bool, return_aux: bool = False, chunk_size: int | None = None,
) -> Options:
    """The options of a loss of examples [N...] with logits of that dtype, by their public names."""
    dtype = compute_dtype(dtype)
    smoothing = scalar_or_none("label_smoothing", label_smoothing, dtype)
    number_in("label_smoothing", label_smoothing, 0, 1, "[0, 1]")
    cap = None
    if softcap is not None:
        number_in("softcap", softcap, 0, float("inf"), "(0, inf)")
        cap = scalar("softcap", softcap).astype(dtype)
    one_of("reduction", reduction, REDUCTIONS)
    return Options(
        weights=real_or_none("weights", weights, batch, dtype),
        label_smoothing=smoothing,
        class_weights=real_or_none("class_weights", class_weights, (num_classes,), dtype),
        z_loss=scalar_or_none("z_loss", z_loss, dtype),
        softcap=cap,
        ignore_index=integer_or_none("ignore_index", ignore_index),
        reduction=reduction,
        axis_name=mesh_axis("axis_name", axis_name),
        forward_mode=flag("forward_mode", forward_mode),
        return_aux=flag("return_aux", return_aux),
        chunk_size=positive_or_none("chunk_size", chunk_size),
    )
# fmt: on


# -- masks and labels ---------------------------------------------------------------------------------


def masks(
    where: ArrayLike | None, logits_shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """`where` as a mask of examples, [N...], or of classes, of the logits' rank. The rank alone
    decides."""
    where = boolean_or_none("where", where)
    if where is None:
        return None, None
    batch = batch_shape(logits_shape, axes)
    if where.ndim == len(logits_shape) and _broadcasts(where.shape, logits_shape):
        return None, where
    if where.ndim == len(batch) and _broadcasts(where.shape, batch):
        return jnp.broadcast_to(where, batch), None
    mask = tuple(n if a in axes else 1 for a, n in enumerate(logits_shape))
    raise ValueError(
        f"where must broadcast to the examples, {batch}, or with the logits' rank to the logits, "
        f"{logits_shape}, got {where.shape}; a mask of classes for all examples has shape {mask}"
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(shape, to, strict=True))


def batch_shape(logits_shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(logits_shape) if axis not in axes)


def class_ids(x: ArrayLike, ignore_index: Any) -> tuple[Array, int | None]:
    """Labels as an array of integers, and `ignore_index` as it is among them."""
    ignored = integer_or_none("ignore_index", ignore_index)
    if not isinstance(x, jax.Array) and jax.dtypes.canonicalize_dtype(np.int64) == np.int32:
        x, ignored = _narrowed(x, ignored)
    return integers("labels", x), ignored


def _narrowed(x: ArrayLike, ignored: int | None) -> tuple[ArrayLike, int | None]:
    """NumPy's and Python's integers in 32 bits. JAX would cut larger ones, and a bad label would become
    another class. Here it becomes a bad label that fits, and stays ignored if it was."""
    if isinstance(x, int | list | tuple):  # of Python integers, however large
        try:
            wide = np.asarray(x, dtype=object)
        except ValueError:
            return x, ignored  # `integers` says what is wrong
        if not all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in wide.flat):
            return x, ignored
        wide = np.asarray(np.clip(wide, -(2**63), 2**63 - 1)).astype(np.int64)
    elif isinstance(x, np.ndarray | np.generic) and x.dtype in (np.int64, np.uint64):
        wide = np.asarray(x)
    else:
        return x, ignored
    info = np.iinfo(np.int32)
    fits = wide <= info.max
    if wide.dtype == np.int64:
        fits &= wide >= info.min
    if fits.all():
        return wide.astype(np.int32), ignored
    signed, kept = wide.astype(np.int64), np.iinfo(wide.dtype)
    if ignored is None or info.min <= ignored <= info.max:
        bad = info.min if ignored != info.min else info.min + 1
        return np.where(fits, signed, bad).astype(np.int32), ignored
    # The lowest label stands for the ignored one, and what was that before, a bad label, is the next.
    is_ignored = wide == ignored if kept.min <= ignored <= kept.max else False
    other = np.where(fits & (signed != info.min), signed, info.min + 1)
    return np.where(is_ignored, info.min, other).astype(np.int32), info.min


def not_ignored(labels: Array, ignore_index: int | None) -> Array | None:
    """bool, [N...]: the labels other than `ignore_index`, compared without wrapping; None for all."""
    if ignore_index is None:
        return None
    info = jnp.iinfo(labels.dtype)
    if not info.min <= ignore_index <= info.max:
        return None
    return labels != jnp.asarray(ignore_index, labels.dtype)


# -- arrays -------------------------------------------------------------------------------------------


def floating(name: str, x: ArrayLike) -> Array:
    """`x` as an array of floats, real and not complex."""
    array = _array(name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {array.dtype}")
    _check_computed(name, array)
    return array


def integers(name: str, x: ArrayLike) -> Array:
    """`x` as an array of integers; bool is not an integer here."""
    array = _array(name, x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {array.dtype}")
    return array


def real(name: str, x: ArrayLike) -> Array:
    """`x` as an array of floats, integers or bools."""
    array = _array(name, x)
    if not any(jnp.issubdtype(array.dtype, d) for d in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"{name} must be real, got dtype {array.dtype}")
    _check_computed(name, array)
    return array


def real_or_none(
    name: str, x: ArrayLike | None, expected: tuple[int, ...], dtype: jnp.dtype
) -> Array | None:
    if x is None:
        return None
    array = real(name, x).astype(dtype)
    shape(name, array, expected)
    return array


def _check_computed(name: str, x: Array) -> None:
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.name not in FLOATS:
        raise TypeError(f"{name} must have a dtype among {', '.join(FLOATS)}, got {x.dtype}")


def boolean_or_none(name: str, x: ArrayLike | None) -> Array | None:
    """`x` as an array of bools."""
    if x is None:
        return None
    array = _array(name, x)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{name} must have dtype bool, got {array.dtype}")
    return array


def scalar(name: str, x: ArrayLike) -> Array:
    """`x` as a real scalar array."""
    array = real(name, x)
    shape(name, array, ())
    return array


def scalar_or_none(name: str, x: ArrayLike, dtype: jnp.dtype) -> Array | None:
    """A scalar option as an array; None for the number zero, which switches it off."""
    array = scalar(name, x).astype(dtype)
    return None if isinstance(x, int | float) and x == 0 else array


def shape(name: str, x: Array, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {x.shape}")


def number_in(name: str, x: ArrayLike, low: float, high: float, interval: str) -> None:
    """Refuse a scalar that lies outside an interval, if its value is known when tracing."""
    scalar(name, x)
    if isinstance(x, jax.core.Tracer):
        return
    value = float(np.asarray(x))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):
        raise ValueError(f"{name} must lie in {interval}, got {value}")


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
        raise ValueError(f"axis must name each axis once, and at least one, got {axis}")
    return axes


def num_classes(logits: Array, axes: tuple[int, ...]) -> int:
    count = math.prod(logits.shape[a] for a in axes)
    if count == 0:
        raise ValueError(
            f"logits must have at least one class, got shape {logits.shape} with classes on {axes}"
        )
    return count


def head(hidden: Array, kernel: Array) -> tuple[int, ...]:
    """The shape of the examples, N..., of `hidden` [N..., D] and `kernel` [D, V]."""
    if hidden.ndim == 0:
        raise ValueError("hidden must have shape (..., features), got ()")
    if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"kernel must have shape ({hidden.shape[-1]}, classes) for hidden of shape {hidden.shape}, "
            f"got {kernel.shape}"
            + (": transpose it" if kernel.shape[1:] == hidden.shape[-1:] else "")
        )
    if kernel.shape[1] == 0:
        raise ValueError(f"kernel must have at least one class, got shape {kernel.shape}")
    return hidden.shape[:-1]


def one_of(name: str, x: Any, options: tuple[str, ...]) -> None:
    if not isinstance(x, str) or x not in options:
        raise ValueError(f"{name} must be one of {options}, got {x!r}")


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
        raise ValueError(f"{name} must be above 0, got {value}")
    return value


def mesh_axis(name: str, x: Any) -> AxisName:
    """The name of a mesh axis, or several, that `jax.shard_map` splits its arguments over."""
    if x is None:
        return None
    axes = (x,) if isinstance(x, str) else x
    if not isinstance(axes, tuple) or not axes or not all(isinstance(n, str) for n in axes):
        raise TypeError(f"{name} must be the name of a mesh axis, several or None, got {x!r}")
    for axis in axes:
        try:
            _axis.size(axis)
        except NameError:
            raise ValueError(
                f"{name} must name an axis of the mesh inside jax.shard_map, got {axis!r}"
            ) from None
    return x


def rank(name: str, x: ArrayLike) -> int:
    """The number of axes of `x`, before its dtype is known."""
    try:
        return np.ndim(x)
    except ValueError:
        return _array(name, x).ndim  # says what is wrong


def _array(name: str, x: ArrayLike) -> Array:
    if x is None or isinstance(x, str):
        raise TypeError(f"{name} must be an array, got {x!r}")
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be an array, got {type(x).__name__}: {error}") from error
