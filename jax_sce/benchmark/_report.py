"""All that a run of the command found, and its JSON, which `schema.json` describes."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jax_sce

from .. import native
from ._machine import hardware
from ._measure import Quartiles
from ._row import Row
from ._scaling import Fit

SCHEMA = Path(__file__).with_name("schema.json")

_PACKAGES = (
    "jax", "jaxlib", "numpy", "optax", "tokamax", "jax-cce", "torch", "liger-kernel",
    "cut-cross-entropy",
    "jax-cuda13-plugin", "nvidia-cuda-nvcc", "libtpu",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    command: list[str]  # the arguments
    rows: list[Row]
    missing: Mapping[str, list[str]]  # by subject: the packages whose peers are not there
    fits: list[Fit]
    import_seconds: Quartiles | None
    wall_seconds: float  # that the run took

    def to_json(self) -> str:
        """One line per row, without the values that are unknown."""
        document = {
            "schema": 2,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "hardware": hardware(),
            **_shortened(dataclasses.asdict(self)),
        }
        rows = ",\n ".join(_line(row) for row in document.pop("rows"))
        heading = ",\n".join(f"{_line(key)}: {_line(x)}" for key, x in document.items())
        return f'{{{heading},\n"rows": [\n {rows}\n]}}\n'


def _line(x: Any) -> str:
    return json.dumps(x, allow_nan=False)


def _shortened(x: Any) -> Any:
    """Without what is None or empty, and with six digits of each number."""
    if isinstance(x, Mapping):
        return {key: _shortened(y) for key, y in x.items() if y is not None and y != ""}
    if isinstance(x, list | tuple):
        return [_shortened(y) for y in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def versions() -> dict[str, str]:
    """Of Python, this library, and those that are installed of the others; and which native kernels."""
    found = {"python": platform.python_version(), "jax_sce": jax_sce.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if jax.default_backend() == "cpu":
        kernels = native.status()
        found["kernels"] = kernels.detail if kernels.available else "none"
    return found


def geometric_means(rows: Sequence[Row]) -> dict[tuple[str | None, str, str], float]:
    """By machine, subject and dtype, that of jax_sce's ratios to the baseline."""
    ratios: dict[tuple[str | None, str, str], list[float]] = {}
    for row in rows:
        if row.peer == "jax_sce" and row.ratio is not None:
            ratios.setdefault((row.machine, row.subject, row.dtype), []).append(row.ratio)
    return {key: math.exp(sum(map(math.log, r)) / len(r)) for key, r in ratios.items()}


def is_right(rows: Sequence[Row]) -> bool:
    """Whether jax_sce has not failed, nor been wrong."""
    return all(row.status == "ok" for row in rows if row.peer == "jax_sce")
