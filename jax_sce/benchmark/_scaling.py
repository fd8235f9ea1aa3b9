"""How the cost of a head grows, jax_sce's beside the naive one, and the size that only jax_sce can run.

Time and temporary memory of value_and_grad are measured over the number of classes V at a fixed N, and
over the number of examples N at a fixed V. A power `cost = c * size^exponent` is fitted to each: a
straight line through the logarithms, by least squares. Then both get so many examples that the two
float32 arrays of logits of the naive head exceed the machine's memory.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from .._command import Progress
from ._compare import compare
from ._machine import total_bytes
from ._row import FLOOR, Row

PEERS = ("naive", "jax_sce")


@dataclasses.dataclass(frozen=True)
class Plan:
    features: int  # D
    examples: int  # N, where the classes grow
    classes: int  # V, where the examples grow
    over_classes: Sequence[int]
    over_examples: Sequence[int]
    rounds: int
    beyond_features: int
    beyond_classes: int
    memory: int | None  # that of the machine, in bytes; None if it is not known


def full_plan() -> Plan:
    on_cpu = jax.default_backend() == "cpu"
    return Plan(
        features=32 if on_cpu else 1024,
        examples=512 if on_cpu else 4096,
        classes=8192 if on_cpu else 131072,
        over_classes=[2**k for k in range(13, 19)],
        over_examples=[2**k for k in range(10, 15)],
        rounds=3,
        beyond_features=16,
        beyond_classes=2**18,
        memory=total_bytes(),
    )


def quick_plan() -> Plan:
    """All of it, much smaller: a machine of 64 MiB."""
    return Plan(
        features=16,
        examples=256,
        classes=1024,
        over_classes=[2**10, 2**11, 2**12],
        over_examples=[2**9, 2**10, 2**11],
        rounds=3,
        beyond_features=16,
        beyond_classes=2**13,
        memory=2**26,
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """`cost = c * size^exponent`."""

    peer: str
    cost: str  # "seconds" or "temporary_bytes"
    size: str  # "V" or "N"
    exponent: float


def fitted_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of the straight line through the logarithms.

    Example:
      >>> f"{fitted_exponent([1, 2, 4], [3, 12, 48]):.3f}"
      '2.000'
    """
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def scaling(plan: Plan, progress: Progress | None = None) -> tuple[list[Row], list[Fit]]:
    """The rows over V, over N and beyond the naive head's memory, and the exponents."""
    over_v = [(plan.examples, plan.features, v) for v in plan.over_classes]
    over_n = [(n, plan.features, plan.classes) for n in plan.over_examples]
    rows, fits = [], []
    for size, shapes in (("V", over_v), ("N", over_n)):
        found = compare(
            "linear",
            shapes=shapes,
            dtypes=["float32"],
            passes=["value_and_grad"],
            peers=PEERS,
            rounds=plan.rounds,
            progress=progress,
        )
        rows += found
        fits += _fits(found, size)
    if plan.memory is not None:
        rows += _beyond(plan, plan.memory, progress)
    return [dataclasses.replace(row, subject="scaling") for row in rows], fits


def _fits(rows: Sequence[Row], size: str) -> list[Fit]:
    fits = []
    for peer in (*PEERS, FLOOR):
        own = [row for row in rows if row.peer == peer and row.seconds is not None]
        if len(own) < 2:
            continue
        sizes = [row.shape[-1] if size == "V" else row.shape[0] for row in own]
        seconds = [row.seconds.median for row in own if row.seconds is not None]
        fits.append(Fit(peer, "seconds", size, fitted_exponent(sizes, seconds)))
        memory = [row.temporary_bytes for row in own if row.temporary_bytes]
        if len(memory) == len(own):
            fits.append(Fit(peer, "temporary_bytes", size, fitted_exponent(sizes, memory)))
    return fits


def _beyond(plan: Plan, memory: int, progress: Progress | None) -> list[Row]:
    """The problem whose two arrays of logits just exceed that memory."""
    bytes_of_an_example = 2 * 4 * plan.beyond_classes
    examples = 256 * (memory // (256 * bytes_of_an_example) + 1)
    return compare(
        "linear",
        shapes=[(examples, plan.beyond_features, plan.beyond_classes)],
        dtypes=["float32"],
        passes=["value_and_grad"],
        peers=PEERS,
        rounds=1,
        peak=True,
        memory_limit=memory,
        progress=progress,
    )
