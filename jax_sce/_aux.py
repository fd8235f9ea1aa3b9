"""The further results of a loss, for each example (`return_aux`)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from . import _axis, _backend, _layout
from ._rows import Rows
from ._weighting import Losses, only

NO_RANK = 2**31 - 1  # a label of this rank is in no top k


class CrossEntropyAux(NamedTuple):
    """What a loss returns besides the loss. Every field is [N...].

    Under `jax.jit`, a field that you do not use costs nothing.

    log_normalizer: log sum_k e^z_k, in float32 (float64 for float64
      inputs). It is differentiated exactly.
    prediction: int32, the class of the largest logit. If several are equal,
      it is the lowest class.
    entropy: -sum_j o_j log o_j in nats, differentiated exactly. An absent
      class adds nothing.
    rank: int32, the number of classes that rank above the label. Of two
      equal logits, the one of the lower class ranks above. The label is
      among the top k if its rank is less than k. None if labels are not
      class ids.
    teacher_entropy: The entropy of a `Teacher`'s softmax, a constant. None
      without a `Teacher`.

    If an example does not count, its prediction is -1, its rank 2^31 - 1,
    and the other fields are 0. The rank of a bad label is 2^31 - 1, too.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sce import softmax_cross_entropy_with_integer_labels
      >>> loss, aux = softmax_cross_entropy_with_integer_labels(
      ...     jnp.array([1.2, -0.8, -0.5]), 2, return_aux=True)
      >>> print(f"{loss:.4f} {aux.prediction} {aux.rank}")
      1.9761 0 1
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
    # Soft-cap and temperature do not change the order of the logits, so they are not applied.
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
