"""Labels other than class ids and distributions."""

from __future__ import annotations

import dataclasses

import jax

from ._rows import STATIC
from ._types import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse:
    """Labels: a distribution with mass on K classes of each example.

    Pass it as `labels` to `softmax_cross_entropy` or
    `linear_softmax_cross_entropy`, e.g. for a teacher's top-k or a mix-up
    of two labels. It stands for the distribution with `values` at the
    classes `ids` and 0 elsewhere. That array, [N..., V], is never stored.

    Args:
      ids: [N..., K], classes in [0, V), of any integer dtype. If a class
        occurs twice, its values add up. A negative id is padding: its value
        is ignored.
      values: [N..., K], the targets of these classes. They need not sum to
        one. They are differentiable.

    Raises:
      TypeError, ValueError: The loss raises it for wrong types or shapes.
        An id of V or more is not an error: the loss of its example is NaN,
        as for a bad label.

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
    """Labels: the softmax of another linear head, for distillation.

    Pass it as `labels` to `linear_softmax_cross_entropy`. The logits of the
    teacher, `hidden @ kernel + bias` with its soft-cap and temperature, are
    computed chunk by chunk like the student's, and neither is stored. A
    teacher is a constant: its arrays get no gradient.

    Args:
      hidden: [N..., T]; T may differ from the student's D.
      kernel: [T, V].
      bias: [V].
      temperature: A positive number, or one for each example, [N...]. It
        divides the teacher's logits. The `temperature` of the loss divides
        the student's.
      softcap: A positive number.
      divergence: Compute the Kullback-Leibler divergence from the teacher
        to the student: the cross-entropy minus the teacher's entropy, with
        the same gradient. It is accurate relative to its own size. If you
        subtract the two yourself, the digits cancel where teacher and
        student nearly agree.

    Raises:
      TypeError, ValueError: The loss raises it for wrong types, shapes or
        ranges, and if `label_smoothing` or `class_weights` are given, too.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_sce import Teacher, linear_softmax_cross_entropy
      >>> hidden = jnp.array([[1.0, 0.0]])
      >>> kernel = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, -1.0]])
      >>> same = Teacher(hidden, kernel)
      >>> loss = linear_softmax_cross_entropy(hidden, kernel, same)
      >>> print(f"{loss[0]:.4f}")
      0.3666
      >>> apart = Teacher(hidden, kernel, temperature=2.0, divergence=True)
      >>> loss = linear_softmax_cross_entropy(hidden, kernel, apart)
      >>> print(f"{loss[0]:.4f}")
      0.1888

    References:
      Hinton et al. (2015), "Distilling the knowledge in a neural network",
      arXiv:1503.02531.
    """

    hidden: ArrayLike
    kernel: ArrayLike
    bias: ArrayLike | None = None
    temperature: ArrayLike | None = None
    softcap: ArrayLike | None = None
    divergence: bool = dataclasses.field(default=False, metadata=STATIC)
