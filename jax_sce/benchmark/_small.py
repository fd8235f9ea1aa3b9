"""Small work, where the time is that of Python and the compiler: beside optax's loss, and `import`.

`forward` is what a call of the jitted loss takes, `eager_forward` one without `jax.jit`. The time to
trace and compile is the median of several, each after `jax.clear_caches()`. The time to import jax_sce
is that of fresh processes that have imported `jax` and `jax.numpy` already and find its modules in
bytecode, as pip leaves them.
"""

import dataclasses
import os
import statistics
import subprocess
import sys

import jax

from ._cases import Case
from ._compare import compare
from ._measure import Quartiles
from ._peers import choose
from ._row import FLOOR, Progress, Row

SHAPES = [(8, 10), (128, 1000)]
PEERS = ["optax", "jax_sce"]

_IMPORT = """
import time
import jax, jax.numpy
begin = time.perf_counter()
import jax_sce
print(time.perf_counter() - begin)
"""


def small(rounds: int, progress: Progress | None = None) -> list[Row]:
    rows = compare(
        "logits",
        shapes=SHAPES,
        dtypes=["float32"],
        passes=["forward", "value_and_grad", "eager_forward"],
        peers=PEERS,
        rounds=rounds,
        progress=progress,
    )
    return [dataclasses.replace(_recompiled(row, rounds), subject="small") for row in rows]


def _recompiled(row: Row, rounds: int) -> Row:
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
    """What `import jax_sce` takes beyond `import jax`."""
    command = [sys.executable, "-c", _IMPORT]
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def seconds() -> float:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(ended.stdout)

    seconds()  # leaves the bytecode
    return Quartiles.of([seconds() for _ in range(rounds)])
