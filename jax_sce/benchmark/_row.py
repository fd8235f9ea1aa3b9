"""What a comparison finds: a row for each pass of each peer, and how it tells of its progress."""

import dataclasses
from collections.abc import Callable

from ._measure import Quartiles

FLOOR = "floor"

Progress = Callable[[int, int, str], None]  # steps done, steps in all, and what comes next


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a compiled program, on each device that it runs on. `jax_sce._hlo` has the rules."""

    bytes: int  # through the device's memory
    operations: int | None  # of matrix products; None if a kernel does not tell
    kernels: int | None  # launched
    passes: float | None  # of losses on logits: bytes over those of the logits
    products: float | None  # of heads: operations over 6NDV, the three products of N x V
    sent: int  # bytes to other devices around a ring; a sum goes around twice
    sent_in_loop: int  # those of it that loops send
    seconds: (
        float | None
    )  # a bound: its bytes and its products at the machine's rates, kernel by kernel


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of one pass of one peer; None for what was not, or does not exist."""

    subject: str  # "logits", "distributions", "softcap" or "linear"
    shape: tuple[int, ...]  # (N, V) or (N, D, V)
    dtype: str
    pass_name: str
    peer: str  # "floor" for what bounds them all
    status: str  # "ok"; "wrong", and then without a time; or "failed"
    detail: str = ""  # what is wrong, or what it raised
    seconds: Quartiles | None = None  # measured
    ratio: float | None = None  # of the time to the baseline's: naive for heads, optax otherwise
    floor_fraction: float | None = None  # the floor's time over this one
    compile_seconds: float | None = None  # to trace and to compile
    temporary_bytes: int | None = None  # of the compiled pass, beside arguments and results
    peak_bytes: int | None = None  # of resident memory: temporaries and results
    value_error: float | None = None  # relative to float64
    gradient_error: float | None = None  # in the L1 norm
    machine: str | None = None  # that it was compiled for, and not measured
    mesh: tuple[int, int] | None = None  # of it: devices that split the examples, and the classes
    cost: Cost | None = None  # there

    @property
    def time(self) -> float | None:
        """The median that was measured, or the bound from the compiled program."""
        if self.seconds is not None:
            return self.seconds.median
        return None if self.cost is None else self.cost.seconds


def related(rows: list[Row], baseline: str) -> list[Row]:
    """With the ratios to the baseline's time and to the floor's."""
    times = {row.peer: row.time for row in rows if row.time and row.status == "ok"}

    def of(row: Row) -> Row:
        if row.peer not in times:
            return row
        base, floor, time = times.get(baseline), times.get(FLOOR), times[row.peer]
        return dataclasses.replace(
            row,
            ratio=None if base is None else time / base,
            floor_fraction=None if floor is None else floor / time,
        )

    return [of(row) for row in rows]


def failed(row: Row, error: Exception) -> Row:
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    return dataclasses.replace(row, status="failed", detail=message)


@dataclasses.dataclass
class Steps:
    """Counts the steps, and tells of each as it begins."""

    total: int
    progress: Progress | None
    done: int = 0

    def __call__(self, text: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, text)
        self.done += 1
