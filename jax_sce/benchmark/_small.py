"""Small inputs, where Python and the compiler take the time: jax_sce beside optax, and its import.

`forward` is a call of the jitted loss, `eager_forward` a call without `jax.jit`. The time to trace and
compile is the median of several, each after `jax.clear_caches()`. The time to import jax_sce is measured
in fresh processes that have imported `jax` and `jax.numpy`; its bytecode is there, as pip leaves it.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

import jax

from .._command import Progress, Steps
from ._cases import Case, shape_text
from ._compare import compare
from ._measure import Quartiles
from ._peers import choose
from ._row import FLOOR, Row

SHAPES = [(8, 10), (128, 1000)]
PEERS = ["optax", "jax_sce"]

_IMPORT = """
import time
import jax, jax.numpy
begin = time.perf_counter()
import jax_sce
print(time.perf_counter() - begin)
"""


def small(rounds: int, shapes: Sequence[tuple[int, int]], progress: Progress) -> list[Row]:
    rows = compare(
        "logits",
        shapes=shapes,
        dtypes=["float32"],
        passes=["forward", "value_and_grad", "eager_forward"],
        peers=PEERS,
        rounds=rounds,
        progress=progress,
    )
    step = Steps(len(rows), progress)
    return [dataclasses.replace(_recompiled(row, rounds, step), subject="small") for row in rows]


def _recompiled(row: Row, rounds: int, step: Steps) -> Row:
    step(f"compiling {row.peer} again: {shape_text(row.shape)} {row.pass_name}")
    if row.compile_seconds is None or row.peer == FLOOR:
        return row
    (peer,) = choose("logits", jax.default_backend(), [row.peer], {})
    seconds = []
    for _ in range(rounds):
        jax.clear_caches()
        program = peer.program(Case("logits", row.shape, row.dtype), row.pass_name)
        seconds.append(program.compile_seconds or 0.0)
    return dataclasses.replace(row, compile_seconds=statistics.median(seconds))


def import_seconds(rounds: int) -> Quartiles:
    """Seconds of `import jax_sce` after `import jax`."""
    command = [sys.executable, "-c", _IMPORT]
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def seconds() -> float:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(ended.stdout)

    seconds()  # leaves the bytecode
    return Quartiles.of([seconds() for _ in range(rounds)])
