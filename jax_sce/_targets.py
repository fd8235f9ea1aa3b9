"""Labels that are neither class ids nor distributions."""

from __future__ import annotations

import dataclasses

import jax

from ._rows import STATIC
from ._types import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse:
    """Targets on K classes of each example, as from a teacher's top-k or a mix-up of two labels.

    As `labels` of `softmax_cross_entropy` and `linear_softmax_cross_entropy` it means the distribution
    with those values at those classes and 0 elsewhere, which is never made.

    Args:
      ids: [N..., K], classes in [0, V), of any integer dtype. The values of a class that occurs twice
        add up. A negative id is an empty place (of unsigned ids there is none).
      values: [N..., K], the targets there. They need not sum to one, and are differentiated.

    Raises:
      TypeError, ValueError: From the loss, if they are not integers and real numbers of those shapes. An
        id of V or more makes its example's loss NaN, as a bad label does.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sce import Sparse, softmax_cross_entropy
      >>> logits = jnp.array([1.2, -0.8, -0.5])
      >>> mixed = Sparse(jnp.array([0, 2]), jnp.array([0.7, 0.3]))
      >>> print(f"{softmax_cross_entropy(logits, mixed):.4f}")
      0.7861
    """

    ids: ArrayLike
    values: ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """Targets that are the softmax of another linear head: distillation without either's logits.

    As `labels` of `linear_softmax_cross_entropy`. The teacher's logits `hidden @ kernel + bias`,
    soft-capped and divided by its temperature, are computed chunk by chunk beside the student's. A
    teacher is a constant: its arrays get no gradient.

    Args:
      hidden: [N..., T], with T features of its own.
      kernel: [T, V].
      bias: [V].
      temperature: Positive, a scalar or [N...], of the teacher's logits. That of the student's is the
        argument of the loss.
      softcap: A positive scalar.
      divergence: Make the loss the Kullback-Leibler divergence of the student from the teacher. It is
        the cross-entropy less the teacher's entropy, and has the same gradient. That difference cancels
        where the two nearly agree; the divergence is accurate to its own size. It is a flag here, and
        not a part of the aux, so that weights, reductions and the one pass over the chunks are those of
        any loss.

    Raises:
      TypeError, ValueError: From the loss, for wrong types, shapes or ranges, and for `label_smoothing`
        or `class_weights` beside it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sce import Teacher, linear_softmax_cross_entropy
      >>> hidden, kernel = jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, -1.0]])
      >>> same = Teacher(hidden, kernel)
      >>> print(f"{linear_softmax_cross_entropy(hidden, kernel, same)[0]:.4f}")
      0.3666
      >>> apart = Teacher(hidden, kernel, temperature=2.0, divergence=True)
      >>> print(f"{linear_softmax_cross_entropy(hidden, kernel, apart)[0]:.4f}")
      0.1888

    References:
      Hinton et al. (2015), "Distilling the knowledge in a neural network", arXiv:1503.02531.
    """

    hidden: ArrayLike
    kernel: ArrayLike
    bias: ArrayLike | None = None
    temperature: ArrayLike | None = None
    softcap: ArrayLike | None = None
    divergence: bool = dataclasses.field(default=False, metadata=STATIC)
