"""Softmax cross-entropy for JAX, with its derivative written by hand."""

from ._aux import CrossEntropyAux as CrossEntropyAux
from ._cross_entropy import (
    softmax_cross_entropy as softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from ._linear import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from ._sharded import shard as shard
from ._targets import Sparse as Sparse, Teacher as Teacher

__version__ = "0.2.0"
