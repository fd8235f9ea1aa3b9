"""Uses of the public functions, for type checkers alone: `test_typing.py` runs mypy and pyright on it.

A `type: ignore` marks a line that has to be an error; the checkers report those that are not needed.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from typing import Literal, assert_type

import jax
import numpy as np
from jax import Array

import jax_sce
from jax_sce import CrossEntropyAux, Sparse, Teacher, reference, shard

integer = jax_sce.softmax_cross_entropy_with_integer_labels
dense = jax_sce.softmax_cross_entropy
linear = jax_sce.linear_softmax_cross_entropy

z, ids, kernel = np.zeros((4, 6)), np.zeros(4, np.int32), np.zeros((6, 5))
Pair = tuple[Array, CrossEntropyAux]


def results(return_aux: bool, reduction: Literal["sum", "mean"]) -> None:
    assert_type(integer(z, ids), Array)
    assert_type(integer(z, ids, return_aux=False, reduction=reduction), Array)
    assert_type(integer(z, ids, return_aux=True), Pair)
    assert_type(integer(z, ids, return_aux=return_aux), Array | Pair)
    assert_type(dense(z, z, return_aux=True), Pair)
    assert_type(dense(z, z, return_aux=return_aux), Array | Pair)
    assert_type(linear(z, kernel, ids, return_aux=True)[1].rank, Array | None)
    assert_type(linear(z, kernel, ids, return_aux=return_aux), Array | Pair)
    reference.softmax_cross_entropy(z, z, reduction=reduction)
    assert_type(jax_sce.native.status().available, bool)


def arguments() -> None:
    integer([[1.0, 2], [0, 1]], [0, 1], -1, [True, False], ignore_index=-100, weights=(1, 2))
    dense([[[0.5, 1.5]]], [[[0, 1]]], (1, 2), class_weights=np.ones(2))
    dense([z[0], z[1]], Sparse([[0, 1], [2, 3]], [[0.5, 0.5], [0.1, 0.9]]), temperature=[1, 2.0])
    linear(z, kernel.T, Teacher(z, kernel, softcap=30), dtype="bfloat16", precision="highest")
    integer(z, ids, reduction="average")  # type: ignore[call-overload]
    integer(z, "cat")  # type: ignore[arg-type]
    integer(z, ids, smoothing=0.1)  # type: ignore[call-overload]
    integer(z, ids, label_smoothing=None)  # type: ignore[call-overload]
    dense(z, z, ignore_index=0)  # type: ignore[call-overload]
    dense(z, Teacher(z, kernel))  # type: ignore[call-overload]
    Sparse("ids", z)  # type: ignore[arg-type]


def on_a_mesh(mesh: jax.sharding.Mesh) -> None:
    loss = shard(linear, mesh, batch=("data", "fsdp"), classes="model")
    assert_type(loss(z, kernel, ids, reduction="mean"), Array)
    assert_type(loss(z, kernel, ids, return_aux=True), Pair)
    loss(z, kernel, ids, redaction="mean")  # type: ignore[call-overload]
    shard("linear", mesh)  # type: ignore[type-var]
