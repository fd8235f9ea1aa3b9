"""Losses side by side: each pass of each case, checked, timed and weighed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._command import Progress, Steps, check_known
from ._accelerators import ACCELERATORS
from ._cases import (
    PASSES,
    Case,
    Errors,
    default_dtypes,
    default_passes,
    default_shapes,
    shape_text,
)
from ._compiled import compile_all
from ._machine import available_bytes
from ._measure import Quartiles, round_robin
from ._peak import peak_bytes
from ._peers import BASELINE, Peer, choose, import_packages
from ._programs import Loss, Run, floor_program
from ._row import FLOOR, Row, failed, related


def compare(
    subject: str,
    losses: Mapping[str, Loss] | None = None,
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[str] | None = None,
    passes: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    machines: Sequence[str] | None = None,
    mesh: tuple[int, int] | None = None,
    rounds: int = 7,
    peak: bool = False,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Compare losses, yours among them: time, memory and error. `jax_sce.benchmark` has the method.

    With `machines` nothing runs: the passes are compiled for these machines, and each row's `cost` and
    bound of the time are read from the program.

    Args:
      subject: "logits", with labels [N]; "softcap", the same with logits capped at 30; "distributions",
        logits with labels [N, V]; or "linear".
      losses: Your own, by name: `fn(logits, labels)` or `fn(hidden, kernel, labels)`, which JAX can
        trace and which return the mean loss or the loss of each example.
      shapes: Tuples (N, V), or (N, D, V) for "linear"; None for the usual ones on this platform.
      dtypes: "float32", "bfloat16"; None for both, or for bfloat16 alone with heads on accelerators.
      passes: "forward", "value_and_grad", "donated_gradient" (not for heads), "eager_forward" (without
        `jax.jit`); None for all but the last.
      peers: The names of the losses to compare with; None for all that are installed.
      machines: Any of "h100", "h200", "b200", "v5e", "v5p", "v6e", to compile for; None to measure on
        this one. Needs, in a checkout, `python -m pip install -e ".[compiled]"`.
      mesh: The number of devices that split the examples, and of those that split the classes. None
        for one device.
      rounds: How often each pass is timed.
      peak: Also measure the peak of resident memory, on CPU, of value_and_grad at the largest shape in
        the first dtype; not for `losses`, which a fresh process does not have.
      memory_limit: Bytes; a pass that needs more is not run. None for the memory that is free.
      progress: Called before each step with the number of steps done, the number of all, and a
        description of the next.

    Returns:
      A row for each shape, dtype, pass and peer, and for the floor, in this order.

    Raises:
      ValueError: An argument is none of those above; the message names it.
      ModuleNotFoundError: The compiler for a machine is not installed; the message gives the command.
      RuntimeError: JAX was used before, and started without the compiler for a machine.

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
    if isinstance(machines, str) or (machines is not None and not machines):
        raise ValueError(f"machines must be a list of names or None, got {machines!r}")
    check_known("machines", machines or (), ACCELERATORS)
    if mesh is not None and machines is None:
        raise ValueError("mesh is for machines, which must be given with it")
    on = "accelerator" if machines is not None or jax.default_backend() != "cpu" else "cpu"
    shapes = default_shapes(subject, on) if shapes is None else shapes
    dtypes = default_dtypes(subject, on) if dtypes is None else dtypes
    passes = default_passes(subject) if passes is None else passes
    check_known(f"passes of {subject}", passes, PASSES[subject])
    cases = [Case(subject, tuple(shape), dtype) for shape in shapes for dtype in dtypes]
    if machines is not None:
        return compile_all(cases, passes, peers, losses or {}, machines, mesh, progress)

    platform = jax.default_backend()
    contenders = [
        Peer(FLOOR, program_of=floor_program),
        *choose(subject, platform, peers, losses or {}),
    ]
    work = [(case, p, [x for x in contenders if x.fits(case, p)]) for case in cases for p in passes]
    step = Steps(sum(len(group) + rounds for _, _, group in work) + peak, progress)
    import_packages(contenders, step)
    jax.block_until_ready(jax.jit(jnp.negative)(0.0))  # JAX starts up before the first is compiled

    rows = []
    for case, pass_name, group in work:
        rows += _measure(case, pass_name, group, rounds, memory_limit, step)
    if peak and on == "cpu":
        rows = _with_peaks(rows, set(losses or ()), step)
    return rows


def _measure(
    case: Case,
    pass_name: str,
    peers: Sequence[Peer],
    rounds: int,
    memory_limit: int | None,
    step: Steps,
) -> list[Row]:
    """A row for each peer. Only those whose answer is right are timed."""
    text = f"{case.subject} {shape_text(case.shape)} {case.dtype} {pass_name}"
    limit = available_bytes() if memory_limit is None else memory_limit
    step.detail(f"drawing the inputs: {text}")
    arrays = case.arrays()
    step.detail(f"computing the float64 answer: {text}")
    case.answer()
    entries = []
    for peer in peers:
        step(f"compiling {peer.name}: {text}")
        entries.append(_enter(case, pass_name, peer, arrays, limit))
    runs = {entry.row.peer: entry.run for entry in entries if entry.run is not None}
    samples = round_robin(runs, rounds, lambda: step(f"timing: {text}"))
    rows = [_timed(entry, samples.get(entry.row.peer)) for entry in entries]
    return related(rows, BASELINE[case.subject])


class _Entry(NamedTuple):
    row: Row
    run: Run | None = None  # if it is to be timed
    times: float = 1  # what its time counts


def _enter(
    case: Case, pass_name: str, peer: Peer, arrays: tuple[Array, ...], limit: int | None
) -> _Entry:
    """Compiles the pass, runs it once and checks its answer."""
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
        return _Entry(failed(row, error))
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
        return failed(entry.row, samples)
    seconds = Quartiles.of([entry.times * x for x in samples])
    return dataclasses.replace(entry.row, seconds=seconds)


def _with_peaks(rows: list[Row], own: set[str], step: Steps) -> list[Row]:
    """The rows with the peak memory of the largest case's value_and_grad, where it can be measured."""
    largest = max((row.shape for row in rows), key=math.prod)
    case = Case(rows[0].subject, largest, rows[0].dtype)

    def with_peak(row: Row) -> Row:
        chosen = (row.shape, row.dtype, row.pass_name) == (largest, case.dtype, "value_and_grad")
        if not chosen or row.status != "ok" or row.peer in {FLOOR, *own}:
            return row
        return dataclasses.replace(row, peak_bytes=peak_bytes(case, row.pass_name, row.peer))

    step(f"measuring peak memory in fresh processes: {case.subject}")
    with ThreadPoolExecutor(2) as pool:  # they mostly start up and compile
        return list(pool.map(with_peak, rows))
