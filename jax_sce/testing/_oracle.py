"""What is right, in NumPy's float64, from the formula and by no code of the library.

With `d_j = z_j - max z` and one maximum left out of `tail = sum_j e^{d_j} - 1`, nothing cancels:

    -log o_j = log1p(tail) - d_j
    o_j sum(y) - y_j = (e^{d_j} (sum(y) - y_j) - y_j (S - e^{d_j})) / S,    S = 1 + tail

where `S - e^{d_j}` is summed without the j-th term. Nor in the entropy, with `m = sum_k o_k d_k`:

    H = log1p(tail) - m,    dH/dz_j = o_j (m - d_j)

The logits are taken as they are given, in 16 bits too, so the only errors are those of float64, 1e-16 of
each term.
"""

from typing import NamedTuple

import numpy as np


class Exact(NamedTuple):
    """Of each row."""

    loss: np.ndarray  # [N]
    log_normalizer: np.ndarray  # [N]
    by_logits: np.ndarray  # [N, V], the derivative of the loss
    softmax: np.ndarray  # [N, V], the derivative of the log-normalizer
    by_targets: np.ndarray  # [N, V]
    by_temperature: np.ndarray  # [N]
    entropy: np.ndarray  # [N]
    entropy_by_logits: np.ndarray  # [N, V]


def wide(x) -> np.ndarray:
    """In float64, exactly."""
    x = np.asarray(x)
    return x.astype(np.float32).astype(np.float64) if x.dtype.itemsize < 4 else x.astype(np.float64)


def one_hot(labels, num_classes: int) -> np.ndarray:
    """A row of zeros for a label outside."""
    return (np.asarray(labels)[..., None] == np.arange(num_classes)).astype(np.float64)


def exact(
    logits,
    targets,
    *,
    label_smoothing: float = 0.0,
    class_weights: np.ndarray | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: np.ndarray | float = 1.0,
) -> Exact:
    """Of logits [N, V], targets [N, V] and a temperature of all or of each, [N]. A class with a logit of
    -inf is absent."""
    z, y = wide(logits), wide(targets)
    num_classes = z.shape[-1]
    y = (1 - label_smoothing) * y + label_smoothing / num_classes
    if class_weights is not None:
        y = y * wide(class_weights)
    slope = np.ones(z.shape)
    if softcap is not None:
        slope = 1 / np.cosh(z / softcap) ** 2
        z = softcap * np.tanh(z / softcap)
    degrees = wide(temperature)[..., None]
    z, slope = z / degrees, slope / degrees
    with np.errstate(invalid="ignore", over="ignore"):
        highest = z.max(-1, keepdims=True)
        d = z - highest
        e = np.exp(d)
        first = one_hot(z.argmax(-1), num_classes).astype(bool)
        tail = np.where(first, 0, e).sum(-1, keepdims=True)
        tail += highest - highest  # NaN where it is not finite
        normalizer = 1 + tail
        costs = np.log1p(tail) - d
        loss = np.where((y == 0) & np.isposinf(costs), 0, y * costs).sum(-1)
        mass = y.sum(-1, keepdims=True)
        without = np.where(first, tail, normalizer - e)  # the sum of the others
        others = _sum_of_others(y, mass)
        by_logits = (e * others - y * without) / normalizer
        log_normalizer = (highest + np.log1p(tail))[..., 0]
        softmax = e / normalizer
        by_logits = by_logits + 2 * z_loss * log_normalizer[..., None] * softmax
        loss = loss + z_loss * log_normalizer**2
        moved = np.where(np.isneginf(z), 0, z * by_logits).sum(-1)
        below = np.where(np.isneginf(d), 0, d)
        mean = (softmax * below).sum(-1, keepdims=True)
        return Exact(
            loss,
            log_normalizer,
            by_logits * slope,
            softmax * slope,
            costs,
            by_temperature=-moved / degrees[..., 0],
            entropy=(np.log1p(tail) - mean)[..., 0],
            entropy_by_logits=softmax * (mean - below) * slope,
        )


def _sum_of_others(y: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """`sum(y) - y_j`; of one-hot rows exactly."""
    lone = (y != 0).sum(-1, keepdims=True) == 1
    return np.where(lone & (y != 0), 0, mass - y)
