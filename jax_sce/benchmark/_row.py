"""The results of a comparison: a row for each pass of each peer."""

import dataclasses

from ._measure import Quartiles

FLOOR = "floor"


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a compiled program on each of its devices. `jax_sce._hlo` has the rules."""

    bytes: int  # through the device's memory
    operations: int | None  # of matrix products; None if a kernel does not report them
    kernels: int | None  # launched
    passes: float | None  # losses on logits: bytes over those of the logits
    products: float | None  # heads: operations over 6NDV, the three products of N x V
    sent: int  # bytes to other devices around a ring; a sum goes around twice
    sent_in_loop: int  # the part of them that is sent inside loops
    seconds: float | None  # a bound: bytes and products at the machine's rates, kernel by kernel


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one pass of one peer; None where there is none."""

    subject: str  # "logits", "distributions", "softcap" or "linear"
    shape: tuple[int, ...]  # (N, V) or (N, D, V)
    dtype: str
    pass_name: str
    peer: str  # or "floor", the least work that such a loss does
    status: str  # "ok"; "wrong", and then not timed; or "failed"
    detail: str = ""  # the fault, or the error raised
    seconds: Quartiles | None = None  # measured
    ratio: float | None = None  # of the time to the baseline's: naive for heads, optax otherwise
    floor_fraction: float | None = None  # the floor's time over this one
    compile_seconds: float | None = None  # to trace and to compile
    temporary_bytes: int | None = None  # of the compiled pass, beside arguments and results
    peak_bytes: int | None = None  # of resident memory: temporaries and results
    value_error: float | None = None  # relative to float64
    gradient_error: float | None = None  # in the L1 norm
    machine: str | None = None  # compiled for this machine, and not measured
    mesh: tuple[int, int] | None = None  # its devices that split the examples, and the classes
    cost: Cost | None = None  # on that machine

    @property
    def time(self) -> float | None:
        """The median that was measured, or the bound from the compiled program."""
        if self.seconds is not None:
            return self.seconds.median
        return None if self.cost is None else self.cost.seconds


def related(rows: list[Row], baseline: str) -> list[Row]:
    """The rows with the ratios of their times to the baseline's and the floor's."""
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
