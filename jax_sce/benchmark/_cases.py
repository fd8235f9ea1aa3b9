"""What is measured: the subjects with their passes and shapes, the inputs, and the float64 answers.

The inputs are drawn once for a shape and rounded to bfloat16, so that both dtypes see the same numbers
and have the same answer; distributions then sum to not quite one. It is computed in float64, in blocks
of examples, and of the gradients, which are as large as the inputs, as a sample: 64 rows of the logits'
or the hidden states' gradient, spread evenly from the first to the last, and some 64 columns of the
kernel's, half of them those of labels.

The error of a gradient is relative in the L1 norm, `sum |g - g64| / sum |g64|`: over all sampled rows
together, and for the worst column of the kernel. A norm of the largest element would see little but the
labels' elements, and not that the softmax's part is lost.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .._command import check_known

DTYPES = ("float32", "bfloat16")
_OF_LOGITS = ("forward", "value_and_grad", "donated_gradient", "eager_forward")
PASSES = {
    "logits": _OF_LOGITS,
    "softcap": _OF_LOGITS,
    "distributions": _OF_LOGITS,
    "linear": ("forward", "value_and_grad", "eager_forward"),
}
SOFTCAP = 30.0  # of the subject of that name, as Gemma 2's language models have it

# (N, V) and (N, D, V), the largest last: from few classes to the vocabularies of language models.
_SHAPES: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "cpu": {
        "logits": [(65536, 10), (4096, 1000), (512, 32000), (128, 128256)],
        "softcap": [(512, 32000)],
        "distributions": [(65536, 10), (4096, 1000), (512, 32000)],
        "linear": [(1024, 64, 8192), (1024, 64, 32000)],
    },
    "accelerator": {
        "logits": [(8192, 32000), (8192, 128256), (4096, 256000)],
        "softcap": [(8192, 128256)],
        "distributions": [(8192, 32000), (8192, 128256)],
        "linear": [(8192, 2304, 256000), (32768, 4096, 128256)],
    },
}

# The largest errors of the value and of the gradient that are taken for rounding. The most that right
# losses showed on CPU: 2e-7 and 2e-6 in float32, whose gradients get room for products in TF32, and 6e-3
# and 2e-2 in bfloat16. A lost term is some per cent or more. A few padded classes that are counted, of
# many thousand, are 2e-5 of the value or more: seen in float32, but not in bfloat16.
_BOUNDS = {"float32": (1e-5, 1e-3), "bfloat16": (2e-2, 5e-2)}

_SAMPLE = 64  # rows, and columns
_BLOCK = 2**25  # float64 logits at a time


def shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def rank(subject: str) -> int:
    """Of its shapes: (N, D, V) of heads, (N, V) of all others."""
    return 3 if subject == "linear" else 2


def default_shapes(subject: str, on: str) -> list[tuple[int, ...]]:
    return _SHAPES[on][subject]


def default_dtypes(subject: str, on: str) -> list[str]:
    """Heads as large as those for an accelerator are run there in 16 bits."""
    only_16_bits = subject == "linear" and on == "accelerator"
    return ["bfloat16"] if only_16_bits else list(DTYPES)


def default_passes(subject: str) -> list[str]:
    return [name for name in PASSES[subject] if name != "eager_forward"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A subject, the shape of its problem, and the dtype of its float arguments."""

    subject: str  # "logits", "softcap", "distributions" or "linear"
    shape: tuple[int, ...]  # (N, V) or (N, D, V)
    dtype: str  # "float32" or "bfloat16"

    def __post_init__(self) -> None:
        check_known("subject", [self.subject], PASSES)
        if len(self.shape) != rank(self.subject) or min(self.shape) < 1:
            sizes = "NxDxV" if self.subject == "linear" else "NxV"
            raise ValueError(f"a shape of {self.subject} must be {sizes}, got {self.shape}")
        check_known("dtype", [self.dtype], DTYPES)

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What a loss takes: logits [N, V], or hidden [N, D] and kernel [D, V]; and labels, which are
        classes [N], or distributions [N, V] of the logits' dtype."""
        n, *d, v = self.shape
        floats = [(n, *d), (*d, v)] if d else [(n, v)]
        dtype = jnp.dtype(self.dtype)
        labels = jax.ShapeDtypeStruct((n,), jnp.int32)
        if self.subject == "distributions":
            labels = jax.ShapeDtypeStruct((n, v), dtype)
        return (*(jax.ShapeDtypeStruct(shape, dtype) for shape in floats), labels)

    def arrays(self) -> tuple[Array, ...]:
        """Those arguments, on the device and ready."""
        drawn = zip(_draw(self.subject, self.shape), self.arguments(), strict=True)
        return jax.block_until_ready(tuple(jnp.asarray(x).astype(like.dtype) for x, like in drawn))

    def answer(self) -> "_Expected":
        """The float64 answer, computed once for a shape."""
        return _expected(self.subject, self.shape)

    def check(self, value: Any, gradients: Sequence[Any]) -> "Errors":
        """The errors of a pass's answer, in arrays of JAX or PyTorch."""
        expected = self.answer()
        sample = expected.sample
        gradients = [jnp.from_dlpack(x) for x in gradients]
        value_error = gradient_error = None
        if value is not None:
            value_error = abs(float(value) - expected.value) / abs(expected.value)
        if gradients:
            gradient_error = _l1_error(gradients[0][sample.rows], expected.rows, axis=None)
        if len(gradients) > 1:
            by_column = _l1_error(gradients[1][:, sample.columns], expected.columns, axis=0)
            gradient_error = np.max([gradient_error, by_column])  # NaN if one of them is
        return Errors(value_error, None if gradient_error is None else float(gradient_error))


class Errors(NamedTuple):
    """Relative to float64; None for what the pass does not return."""

    value: float | None = None
    gradient: float | None = None

    def fault(self, dtype: str) -> str:
        """What is wrong, in words, or nothing."""
        for name, error, bound in zip(self._fields, self, _BOUNDS[dtype], strict=True):
            if error is not None and not math.isfinite(error):
                return f"the {name} is not finite"
            if error is not None and error > bound:
                return f"the {name} is off by {error:.2g} of its size"
        return ""


class _Sample(NamedTuple):
    rows: np.ndarray  # examples
    columns: np.ndarray  # classes


class _Expected(NamedTuple):
    sample: _Sample
    value: float  # the mean loss
    rows: np.ndarray  # of the gradient by the logits or the hidden states, [rows, V or D]
    columns: np.ndarray | None  # of the gradient by the kernel, [D, columns]


def _l1_error(got: Array, expected: Any, axis: int | None) -> np.ndarray:
    difference = np.abs(np.asarray(got.astype(jnp.float32), np.float64) - expected)
    return np.max(difference.sum(axis) / np.abs(expected).sum(axis))


@functools.lru_cache(maxsize=1)
def _draw(subject: str, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Logits of a trained model's spread, in bfloat16, and labels."""
    draws = np.random.default_rng(0)

    def normal(scale: float, *shape: int) -> np.ndarray:
        return (scale * draws.standard_normal(shape, np.float32)).astype(jnp.bfloat16)

    n, *d, v = shape
    if subject == "distributions":
        masses = np.exp(normal(1.5, n, v).astype(np.float32))
        masses /= masses.sum(-1, keepdims=True)
        return normal(2.5, n, v), masses.astype(jnp.bfloat16)
    labels = draws.integers(v, size=n, dtype=np.int32)
    if subject == "logits":
        return normal(2.5, n, v), labels
    if subject == "softcap":
        return normal(10.0, n, v), labels
    return normal(1.0, n, *d), normal(2.5 / math.sqrt(d[0]), *d, v), labels


@functools.lru_cache(maxsize=1)
def _expected(subject: str, shape: tuple[int, ...]) -> _Expected:
    n, v = shape[0], shape[-1]
    inputs = _draw(subject, shape)
    rows = np.unique(np.linspace(0, n - 1, _SAMPLE, dtype=np.int64))
    columns = np.linspace(0, v - 1, _SAMPLE // 2, dtype=np.int64)
    if subject == "linear":
        columns = np.unique(np.concatenate([columns, inputs[-1][rows[::2]]]))
    sample = _Sample(rows, columns)
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        softcap = SOFTCAP if subject == "softcap" else None
        answers = jax.jit(functools.partial(_answers, softcap))(sample, inputs)
        return _Expected(sample, float(answers[0]), *jax.tree.map(np.asarray, answers[1:]))


def _answers(
    softcap: float | None, sample: _Sample, inputs: tuple[Array, ...]
) -> tuple[Array, Array, Array | None]:
    """The naive formulas in float64, in blocks of examples."""
    examples, *kernels, labels = inputs
    kernel = kernels[0].astype(jnp.float64) if kernels else None
    n, v = len(labels), inputs[-2].shape[-1]

    def logits(example: Array) -> Array:
        wide = example.astype(jnp.float64)
        return wide if kernel is None else wide @ kernel

    def loss_and_cotangents(example: Array, label: Array, at: Any) -> tuple[Array, Array]:
        z, slope = logits(example), jnp.ones(v)
        if softcap is not None:
            slope = 1 / jnp.cosh(z / softcap) ** 2
            z = softcap * jnp.tanh(z / softcap)
        normalizer = jax.nn.logsumexp(z)
        if label.ndim:  # a distribution
            y = label.astype(jnp.float64)
            mass, picked, targets = jnp.sum(y), jnp.sum(y * z), y[at]
        else:
            mass, picked, targets = jnp.float64(1), z[label], at == label
        by_capped = mass * jnp.exp(z[at] - normalizer) - targets
        return mass * normalizer - picked, slope[at] * by_capped / n

    losses, at_columns = lax.map(
        lambda x: loss_and_cotangents(x[0], x[1], sample.columns),
        (examples, labels),
        batch_size=max(_BLOCK // v, 1),
    )
    _, rows = jax.vmap(loss_and_cotangents, (0, 0, None))(
        examples[sample.rows], labels[sample.rows], jnp.arange(v)
    )
    if kernel is None:
        return jnp.mean(losses), rows, None
    return jnp.mean(losses), rows @ kernel.T, examples.astype(jnp.float64).T @ at_columns
