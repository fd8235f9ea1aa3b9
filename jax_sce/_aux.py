"""What the losses return for each example besides the loss."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from . import _axis, _backend, _layout
from ._rows import Rows
from ._weighting import Losses, only

NO_RANK = 2**31 - 1  # in no top k


class CrossEntropyAux(NamedTuple):
    """Further results of a loss, [N...] each. An unused field costs nothing.

    log_normalizer: float32 (float64 for float64 inputs), differentiated
      exactly.
    prediction: int32, the class of the largest logit, the lowest of equal ones.
    entropy: -sum_j o_j log o_j in nats, differentiated exactly. An absent class
      adds nothing.
    rank: int32, how many classes rank above the label; of equal logits the
      lower class ranks above. The label is among the top k if its rank is less
      than k. None if labels are not class ids.
    teacher_entropy: The entropy of a `Teacher`'s softmax, a constant. None
      without a `Teacher`.

    An example that does not count has 0, prediction -1, and rank 2^31 - 1. A
    bad label has that rank, too.
    """

    log_normalizer: Array
    prediction: Array
    entropy: Array
    rank: Array | None = None
    teacher_entropy: Array | None = None


def aux_of(rows: Rows, ids: Array | None, losses: Losses, counts: Array | None) -> CrossEntropyAux:
    """`ids` are class ids, [N...], with -1 for a bad one, or None for other labels."""
    return CrossEntropyAux(
        losses.log_normalizer,
        _prediction(rows, counts),
        losses.entropy,  # type: ignore[arg-type]
        None if ids is None else _rank(rows, ids, counts),
        losses.target_entropy,
    )


def _raw(rows: Rows) -> Array:
    # Soft-cap and temperature keep the order of the logits.
    return rows.masked(lax.stop_gradient(rows.logits))


def _prediction(rows: Rows, counts: Array | None) -> Array:
    logits = _layout.classes_last(rows, _raw(rows))
    place = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    place += _axis.offset(rows.axis_name, rows.num_classes)
    place = _axis.first_place(rows.axis_name, jnp.max(logits, axis=-1), place)
    return only(counts, place, -1)


def _rank(rows: Rows, ids: Array, counts: Array | None) -> Array:
    labels, logits = rows.expand(ids), _raw(rows)
    pick = _backend.laid_out(rows, _at, lambda _, of_row: of_row)
    at_label = _axis.largest(rows.axis_name, pick(rows, logits, labels))
    # NaN ranks above everything else, as in the prediction.
    is_nan, label_is_nan = jnp.isnan(logits), jnp.isnan(at_label)
    is_equal = (logits == at_label) | (is_nan & label_is_nan)
    is_above = (logits > at_label) | (is_nan & ~label_is_nan)
    is_above |= is_equal & (rows.classes() < labels)
    rank = jnp.sum(rows.masked(is_above, False), axis=rows.axes, dtype=jnp.int32)
    rank = _axis.total(rows.axis_name, rank)
    return only(counts, jnp.where(ids < 0, NO_RANK, rank), NO_RANK)


def _at(rows: Rows, logits: Array, labels: Array) -> Array:
    return jnp.where(rows.has(labels), rows.pick(logits, labels), -jnp.inf)
