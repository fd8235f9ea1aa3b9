"""Anything at all, given for any argument: it is right, or it raises and says which argument.

Each argument of each function is replaced by each of some 150 objects. Which of them are right is said
here in a line for each argument; all others must raise a TypeError or a ValueError whose message begins
with the argument's name, or with that of one whose shape it disagrees with. None may give a number.
"""

import functools
import inspect
import math
import operator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sce

N, D, V = 4, 3, 6
GOOD = {
    "integer": {"logits": np.ones((N, V), np.float32), "labels": np.zeros(N, np.int32)},
    "dense": {"logits": np.ones((N, V), np.float32), "labels": np.full((N, V), 1 / V, np.float32)},
    "linear": {
        "hidden": np.ones((N, D), np.float32),
        "kernel": np.ones((D, V), np.float32),
        "labels": np.zeros(N, np.int32),
    },
}
FUNCTIONS = {
    "integer": jax_sce.softmax_cross_entropy_with_integer_labels,
    "dense": jax_sce.softmax_cross_entropy,
    "linear": jax_sce.linear_softmax_cross_entropy,
}
ARGUMENTS = [
    (kind, name) for kind, fn in FUNCTIONS.items() for name in inspect.signature(fn).parameters
]


BLAMED = {
    "logits": ("logits", "labels", "axis"),
    "hidden": ("hidden", "labels", "kernel"),
    "kernel": ("kernel", "labels"),
    "axis": ("axis", "labels"),
}


class Thing:
    """Nothing that anyone expects."""


SHAPES = [(), (1,), (N,), (V,), (D,), (N, 1), (1, V), (N, V), (D, V), (V, D), (N, D), (N + 1, V),
          (N, V + 1), (1, N, V), (N, V, 1), (0,), (0, V), (N, 0), (2, 2, V)]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 7, -100, 2**31, 2**70, 0.0, 0.5, 1.0, 1.5, -0.5, 1e300, math.nan, math.inf,
           -math.inf, 1j, True, False, Fraction(1, 2)]  # fmt: skip
OBJECTS = [None, "", "mean", "sum", "none", "avg", b"mean", "abc", Thing(), Thing, len, [], (), {},
           set(), {"a": 1}, [None], [[1.0], [1.0, 2.0]], ["x", "y"], (0,), (1,), (-1,), (0, 1), (1, 0),
           (1, 1), (1.0,), ("x",), (None,), [1], [0, 1], slice(None), range(2), iter([1]), Ellipsis,
           np.array("abc"), np.array(["a"] * N), np.array([None] * N), np.array([Thing()] * N),
           np.datetime64("2020-01-01"), np.zeros(N, "datetime64[s]"), np.zeros(N, [("a", float)]),
           jax.random.key(0), jax.random.split(jax.random.key(0), N), np.int64(1), np.float16(0.5),
           np.bool_(True), jax.ShapeDtypeStruct((N, V), jnp.float32)]  # fmt: skip
ARRAYS = [
    np.ones(shape, dtype) for shape in SHAPES for dtype in (np.float32, np.int32, bool, complex)
]
ARRAYS += [
    jnp.ones((N, V), dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.uint8)
]
POOL = NUMBERS + OBJECTS + ARRAYS


def like(x, shapes, kinds):
    """Whether it is a number or array of one of those shapes, of "f"loat, "i"nt or "b"ool type."""
    if isinstance(x, Fraction | str | bytes | jax.ShapeDtypeStruct) or x is None:
        return False
    if isinstance(x, int) and not -(2**31) <= x < 2**31:
        return False
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        return False
    dtypes = {"f": jnp.floating, "i": jnp.integer, "b": jnp.bool_}
    if array.dtype == jnp.float8_e4m3fn:  # which is not computed
        return False
    return array.shape in shapes and any(jnp.issubdtype(array.dtype, dtypes[k]) for k in kinds)


def is_int(x):
    try:
        operator.index(x)
    except TypeError:
        return False
    return True


def is_axis(x):
    if x is None:
        return True
    axes = x if isinstance(x, list | tuple | range) else (x,)
    if not all(is_int(a) and -2 <= operator.index(a) < 2 for a in axes):
        return False
    return len(axes) > 0 and len({operator.index(a) % 2 for a in axes}) == len(axes)


def is_dtype(x):
    try:
        return x is None or (
            not isinstance(x, np.ndarray | np.generic | jax.Array)
            and jnp.dtype(x).name in ("float16", "bfloat16", "float32", "float64")
        )
    except TypeError:
        return False


def is_precision(x):
    try:
        jnp.dot(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), precision=x)
    except Exception:
        return False
    return True


def number(x, low, high):
    return (
        like(x, [()], "fib")
        and low(float(np.asarray(x, np.float64)))
        and high(float(np.asarray(x)))
    )


def is_positive(x):
    return bool(np.all((x > 0) & (x < math.inf)))


def is_right(kind, name, x):
    shapes = [(N, V)] if kind == "dense" else [(N, v) for v in (1, D, V, V + 1)]
    if name == "axis":  # the labels here are those of classes on the last one
        if kind == "integer" and is_int(x):
            return operator.index(x) in (-1, 1)
        return is_axis(x) and (kind == "dense" or (x is not None and list(x) in ([1], [-1])))
    rules = {
        "logits": lambda: like(x, shapes, "f"),
        "hidden": lambda: like(x, [(N, D)], "f"),
        "kernel": lambda: like(x, [(D, V)], "f"),
        "bias": lambda: x is None or like(x, [(V,)], "f"),
        "labels": lambda: {
            "integer": lambda: like(x, [(N,)], "i"),
            "dense": lambda: like(x, [(N, V)], "fib"),
            "linear": lambda: like(x, [(N,)], "i") or like(x, [(N, V)], "fib"),
        }[kind](),
        "where": lambda: x is None or like(x, [(1,), (N,), (N, 1), (1, V), (N, V)], "b"),
        "ignore_index": lambda: x is None or is_int(x),
        "label_smoothing": lambda: number(x, lambda v: v >= 0, lambda v: v <= 1),
        "class_weights": lambda: x is None or like(x, [(V,)], "fib"),
        "weights": lambda: x is None or like(x, [(), (1,), (N,)], "fib"),
        "z_loss": lambda: like(x, [()], "fib"),
        "softcap": lambda: x is None or number(x, lambda v: v > 0, lambda v: v < math.inf),
        "temperature": lambda: (
            x is None
            or (like(x, [(), (1,), (N,)], "fib") and is_positive(np.asarray(x, np.float64)))
        ),
        "reduction": lambda: isinstance(x, str) and x in ("none", "sum", "mean"),
        "chunk_size": lambda: x is None or (is_int(x) and x > 0),
        "dtype": lambda: is_dtype(x),
        "precision": lambda: is_precision(x),
        "return_aux": lambda: isinstance(x, bool | np.bool_),
        "forward_mode": lambda: isinstance(x, bool | np.bool_),
        "axis_name": lambda: x is None,  # outside shard_map
    }
    return rules[name]()


@pytest.mark.usefixtures("lax_promotion")
@pytest.mark.parametrize(("kind", "name"), ARGUMENTS)
def test_anything_is_right_or_named(kind, name):
    wrong = []
    for x in POOL:
        shown = f"{type(x).__name__} {x!r}"[:80]
        call = functools.partial(FUNCTIONS[kind], **{**GOOD[kind], name: x})
        try:  # what is right is traced, and takes no time
            with np.errstate(over="ignore"):  # 1e300 is infinite in float32
                out = jax.eval_shape(call) if is_right(kind, name, x) else call()
        except (TypeError, ValueError) as error:
            if is_right(kind, name, x):
                wrong.append(f"{shown}: right, but {type(error).__name__}: {error}")
            elif not str(error).startswith(BLAMED.get(name, (name,))):
                wrong.append(f"{shown}: {type(error).__name__}: {str(error)[:120]}")
        except Exception as error:
            wrong.append(f"{shown}: raises {type(error).__name__}: {str(error)[:120]}")
        else:
            if not is_right(kind, name, x):
                wrong.append(f"{shown}: accepted, and gives {jax.tree.leaves(out)[0]}")
    assert not wrong, f"{len(wrong)} of {len(POOL)}\n" + "\n".join(wrong)
