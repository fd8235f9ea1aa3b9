"""Losses side by side: each pass of each case, checked, timed and weighed."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._command import check_known
from ._cases import (
    PASSES,
    Case,
    Errors,
    default_dtypes,
    default_passes,
    default_shapes,
    shape_text,
)
from ._machine import available_bytes
from ._measure import Quartiles, round_robin
from ._peak import peak_bytes
from ._peers import BASELINE, Peer, choose, import_packages
from ._programs import Loss, Run, floor_program

FLOOR = "floor"

Progress = Callable[[int, int, str], None]  # steps done, steps in all, and what comes next


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of one pass of one peer; None for what was not, or does not exist."""

    subject: str  # "logits", "distributions" or "linear"
    shape: tuple[int, ...]  # (N, V) or (N, D, V)
    dtype: str
    pass_name: str
    peer: str  # "floor" for what bounds them all
    status: str  # "ok"; "wrong", and then without a time; or "failed"
    detail: str = ""  # what is wrong, or what it raised
    seconds: Quartiles | None = None
    ratio: float | None = None  # of the median to the baseline's: naive for heads, optax otherwise
    floor_fraction: float | None = None  # the floor's median over this one
    compile_seconds: float | None = None  # to trace and to compile
    temporary_bytes: int | None = None  # of the compiled pass, beside arguments and results
    peak_bytes: int | None = None  # of resident memory: temporaries and results
    value_error: float | None = None  # relative to float64
    gradient_error: float | None = None  # in the L1 norm


def compare(
    subject: str,
    losses: Mapping[str, Loss] | None = None,
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[str] | None = None,
    passes: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    rounds: int = 7,
    peak: bool = False,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Compare losses, yours among them: time, memory and error, as `jax_sce.benchmark` tells.

    Args:
      subject: "logits", with labels [N], "distributions", logits with labels [N, V], or "linear".
      losses: Your own, by name: `fn(logits, labels)`, or `fn(hidden, kernel, labels)`, which give the
        mean loss or that of each example and can be traced by JAX.
      shapes: (N, V) each, or (N, D, V); None for the subject's usual ones on this platform.
      dtypes: "float32", "bfloat16"; None for both, and on accelerators for bfloat16 heads.
      passes: "forward", "value_and_grad", "donated_gradient" (not of heads), "eager_forward"; None for
        all but the last.
      peers: Their names; None for all that are installed.
      rounds: How many times each is timed.
      peak: Also measure the peak of resident memory, on CPU, of value_and_grad at the largest
        shape in the first dtype; not that of `losses`, which a fresh process does not have.
      memory_limit: Bytes; what needs more is not run. None for the memory that is free.
      progress: Called with the number of steps done, that of all, and what the next one does.

    Returns:
      A row for each shape, dtype, pass and peer, and for the floor, in this order.

    Raises:
      ValueError: An argument is none of those above; the message names it.

    Example:
      >>> import optax
      >>> from jax_sce.benchmark import compare
      >>> def mine(logits, labels):
      ...     return 1.1 * optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      >>> rows = compare("logits", {"mine": mine}, shapes=[(64, 100)], dtypes=["float32"],
      ...                passes=["forward"], peers=["optax", "jax_sce"], rounds=1)
      >>> for row in rows:
      ...     print(f"{row.peer}: {row.status}{row.detail and ', ' + row.detail}")
      floor: ok
      optax: ok
      jax_sce: ok
      mine: wrong, the value is off by 0.1 of its size
    """
    check_known("subject", [subject], PASSES)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    shapes = default_shapes(subject) if shapes is None else shapes
    dtypes = default_dtypes(subject) if dtypes is None else dtypes
    passes = default_passes(subject) if passes is None else passes
    check_known(f"passes of {subject}", passes, PASSES[subject])
    cases = [Case(subject, tuple(shape), dtype) for shape in shapes for dtype in dtypes]
    contenders = [Peer(FLOOR, floor_program), *choose(subject, peers, losses or {})]
    groups = {p: [peer for peer in contenders if p in peer.passes] for p in passes}
    step = _Steps(len(cases) * sum(len(group) + rounds for group in groups.values()), progress)
    import_packages(contenders)
    jax.block_until_ready(jax.jit(jnp.negative)(0.0))  # JAX starts up before the first is compiled

    rows = []
    for case in cases:
        for pass_name, group in groups.items():
            rows += _measure(case, pass_name, group, rounds, memory_limit, step)
    if peak and jax.default_backend() == "cpu":
        rows = _with_peaks(rows, set(losses or ()), step)
    return rows


@dataclasses.dataclass
class _Steps:
    """Counts the steps, and tells of each as it begins."""

    total: int
    progress: Progress | None
    done: int = 0

    def __call__(self, text: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, text)
        self.done += 1


def _measure(
    case: Case,
    pass_name: str,
    peers: Sequence[Peer],
    rounds: int,
    memory_limit: int | None,
    step: _Steps,
) -> list[Row]:
    """A row for each peer. Only those whose answer is right are timed."""
    text = f"{case.subject} {shape_text(case.shape)} {case.dtype}, {pass_name}"
    limit = available_bytes() if memory_limit is None else memory_limit
    arrays = case.arrays()
    entries = []
    for peer in peers:
        step(f"{text}: {peer.name}")
        entries.append(_enter(case, pass_name, peer, arrays, limit))
    runs = {entry.row.peer: entry.run for entry in entries if entry.run is not None}
    samples = round_robin(runs, rounds, lambda: step(f"{text}: timing"))
    return _related([_timed(entry, samples.get(entry.row.peer)) for entry in entries])


class _Entry(NamedTuple):
    row: Row
    run: Run | None = None  # if it is to be timed
    times: float = 1  # what its time counts


def _enter(
    case: Case, pass_name: str, peer: Peer, arrays: tuple[Array, ...], limit: int | None
) -> _Entry:
    """Compiles it, runs it once and checks its answer."""
    row = Row(case.subject, case.shape, case.dtype, pass_name, peer.name, status="failed")
    try:
        program = peer.program(case, pass_name)
        row = dataclasses.replace(
            row,
            compile_seconds=program.compile_seconds,
            temporary_bytes=program.temporary_bytes,
        )
        if limit is not None and program.needed_bytes > limit:
            needed, available = (x / 2**30 for x in (program.needed_bytes, limit))
            detail = f"needs {needed:.3g} GiB, {available:.3g} GiB are available"
            return _Entry(dataclasses.replace(row, detail=detail))
        run = program.start(arrays)
        value, gradients = run()
        errors = Errors() if peer.name == FLOOR else case.check(value, gradients)
    except Exception as error:
        return _Entry(_failed(row, error))
    row = dataclasses.replace(
        row, value_error=_finite(errors.value), gradient_error=_finite(errors.gradient)
    )
    if fault := errors.fault(case.dtype):
        return _Entry(dataclasses.replace(row, status="wrong", detail=fault))
    return _Entry(dataclasses.replace(row, status="ok"), run, program.times)


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else number


def _timed(entry: _Entry, samples: list[float] | Exception | None) -> Row:
    if samples is None:
        return entry.row
    if isinstance(samples, Exception):
        return _failed(entry.row, samples)
    seconds = Quartiles.of([entry.times * x for x in samples])
    return dataclasses.replace(entry.row, seconds=seconds)


def _failed(row: Row, error: Exception) -> Row:
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    return dataclasses.replace(row, status="failed", detail=message)


def _related(rows: list[Row]) -> list[Row]:
    """With the ratios to the baseline's median and to the floor's."""
    medians = {row.peer: row.seconds.median for row in rows if row.seconds is not None}
    baseline, floor = medians.get(BASELINE[rows[0].subject]), medians.get(FLOOR)

    def related(row: Row) -> Row:
        if row.peer not in medians:
            return row
        median = medians[row.peer]
        return dataclasses.replace(
            row,
            ratio=None if baseline is None else median / baseline,
            floor_fraction=None if floor is None else floor / median,
        )

    return [related(row) for row in rows]


def _with_peaks(rows: list[Row], own: set[str], step: _Steps) -> list[Row]:
    """With the peak memory of the largest case's value_and_grad, where a fresh process can tell."""
    largest = max((row.shape for row in rows), key=math.prod)
    case = Case(rows[0].subject, largest, rows[0].dtype)

    def with_peak(row: Row) -> Row:
        chosen = (row.shape, row.dtype, row.pass_name) == (largest, case.dtype, "value_and_grad")
        if not chosen or row.status != "ok" or row.peer in {FLOOR, *own}:
            return row
        return dataclasses.replace(row, peak_bytes=peak_bytes(case, row.pass_name, row.peer))

    step(f"{case.subject}: peak memory, in fresh processes")
    with ThreadPoolExecutor(2) as pool:  # they mostly start up and compile
        return list(pool.map(with_peak, rows))
