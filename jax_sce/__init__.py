"""Softmax cross-entropy for JAX: accurate, small, with optax's API.

    softmax_cross_entropy_with_integer_labels(logits, labels)
        one class per example
    softmax_cross_entropy(logits, labels)
        a distribution over the classes per example
    linear_softmax_cross_entropy(hidden, kernel, labels)
        either of them for logits = hidden @ kernel, which are never stored
    shard(loss, mesh)
        any of the three on a mesh of devices

Labels can also be a Sparse or a Teacher. With return_aux=True a loss also
returns a CrossEntropyAux.

Modules: native (is the fast CPU kernel in use?), reference (the naive
formulas), testing (check a loss), benchmark (time losses).
"""

from . import native as native, reference as reference
from ._aux import CrossEntropyAux as CrossEntropyAux
from ._cross_entropy import (
    softmax_cross_entropy as softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from ._linear import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from ._sharded import shard as shard
from ._targets import Sparse as Sparse, Teacher as Teacher

__all__ = [  # noqa: RUF022 - in order of importance
    "softmax_cross_entropy_with_integer_labels",
    "softmax_cross_entropy",
    "linear_softmax_cross_entropy",
    "shard",
    "Sparse",
    "Teacher",
    "CrossEntropyAux",
    "native",
    "reference",
]
__version__ = "0.2.0"
