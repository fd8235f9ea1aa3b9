"""Timing: in turns, in samples long enough for the clock, and reported as quartiles."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_SAMPLE_SECONDS = 2e-3  # at least, for one reading of the clock


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """A quarter of the samples lie below `low`, half below `median`, a quarter above `high`."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quartiles":
        """Between two samples, in proportion.

        Example:
          >>> Quartiles.of([5.0, 1.0, 2.0, 4.0])
          Quartiles(low=1.75, median=3.0, high=4.25)
        """
        return cls(*np.quantile(samples, [0.25, 0.5, 0.75]).tolist())


def round_robin(
    runs: Mapping[str, Callable[[], object]], rounds: int, each_round: Callable[[], None]
) -> dict[str, list[float] | Exception]:
    """Seconds of a run of each, once in every round; or the error that it raised.

    `each_round` is called before each round. Other work on the machine slows all of them alike, and none
    always follows the same other: each round begins with the next of them.
    """
    names = list(runs)
    results: dict[str, list[float] | Exception] = {name: [] for name in names}
    for turn in range(rounds):
        each_round()
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            samples = results[name]
            if isinstance(samples, Exception):
                continue
            try:
                samples.append(_sample(runs[name], samples))
            except Exception as error:
                results[name] = error
    return results


def _sample(run: Callable[[], object], earlier: Sequence[float]) -> float:
    """Seconds of a run. One reading of the clock covers several runs, if the shortest one so far was
    short."""
    shortest = min(earlier) if earlier else _seconds(run, 1)
    if not earlier and shortest >= _SAMPLE_SECONDS:
        return shortest
    return _seconds(run, math.ceil(_SAMPLE_SECONDS / shortest))


def _seconds(run: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats
