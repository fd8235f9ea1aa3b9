"""What a fused head costs each of 256 and of 4096 chips: formulas, checked against compiled programs.

    python examples/large_scale.py [--quick]

A head of 8192 features and 262,144 classes, a million tokens a step, in bfloat16, split by examples, by
classes, and by both. For each split the loss and its gradients are compiled, not run, and what a device
holds and what crosses its links are read from the program. Formulas predict both, and the script exits
with an error if a program exceeds them by more than 1 %. `large_scale.md` says which split to choose.

Compiles for TPU v5p: needs XLA's compiler for TPU, `pip install "jax[tpu]"`, and no TPU. Two to three
minutes on two CPU cores; writes its table into `large_scale.md`. `--quick` compiles a smaller head, in
float32, for eight virtual CPU devices in seconds, and writes nothing.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU to ask about
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from jax_sce import linear_softmax_cross_entropy, shard
from jax_sce.testing import collectives

PAGE = Path(__file__).with_suffix(".md")
MARGIN = 0.01
# Of a TPU v5p in a second, by Google Cloud's documentation: operations in bfloat16, and bytes sent
# (half of the 1200 GB that its links carry in both directions).
FLOPS, LINKS = 459e12, 600e9

# --- on paper --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    tokens: int = 2**20  # N
    features: int = 8192  # D
    classes: int = 2**18  # V
    dtype: str = "bfloat16"
    chunk: int = 1024  # c, the examples of which the logits exist at once


class Split(NamedTuple):
    batch: int  # a, the devices over which the examples are split
    classes: int  # b, those of the classes
    fsdp: bool = False  # whether the kernel lives split over the batch's devices too

    def __str__(self) -> str:
        return f"{self.batch} x {self.classes}" + (", FSDP" if self.fsdp else "")


class Bytes(NamedTuple):
    """Of each device."""

    held: int  # at most at once: arguments, results and what lies between
    moved: int  # sent in a step


def predict(step: Step, split: Split) -> Bytes:
    n, v, d = step.tokens // split.batch, step.classes // split.classes, step.features
    c, s = min(step.chunk, n), jnp.dtype(step.dtype).itemsize
    hidden, kernel = s * n * d, s * d * v  # and as much for their gradients
    home = kernel // split.batch if split.fsdp else kernel
    arguments, results = hidden + home + 4 * n, hidden + home

    sums = hidden + 4 * d * v  # the gradients while they are computed, the kernel's in float32
    in_loop = 4 * c * v + 2 * s * c * d + (kernel if split.fsdp else 0)
    to_send = max(hidden, kernel)  # after the loop
    held = arguments + results + sums + max(in_loop, to_send)

    moved = 0  # n devices send at most 2 B to sum B bytes each, and B to gather or scatter B in all
    if split.classes > 1:
        statistics = 16 * n  # the maximum, the tail, its leaders and the label, in float32
        moved += 2 * (statistics + hidden)
    if split.batch > 1:
        moved += 2 * kernel + 2 * 8
    return Bytes(held, moved)


# --- compiled --------------------------------------------------------------------------------------


def compile_for(step: Step, split: Split, devices: np.ndarray) -> Bytes:
    """A mesh of explicit axes, for then a kernel's layout is known and its gradient is reduced to it."""
    axes = {axis: size for axis, size in zip(("data", "model"), split[:2], strict=True) if size > 1}
    batch, classes = (axis if axis in axes else None for axis in ("data", "model"))
    shape, names = tuple(axes.values()), tuple(axes)
    mesh = Mesh(devices.reshape(shape), names, axis_types=(AxisType.Explicit,) * len(names))

    def placed(shape: tuple[int, ...], dtype: str, *spec: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    n, d, v = step.tokens, step.features, step.classes
    hidden = placed((n, d), step.dtype, batch, None)
    kernel = placed((d, v), step.dtype, batch if split.fsdp else None, classes)
    labels = placed((n,), "int32", batch)

    loss = shard(linear_softmax_cross_entropy, mesh, batch=batch, classes=classes)
    mean = partial(loss, reduction="mean", chunk_size=step.chunk)
    step_of = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    compiled = step_of.lower(hidden, kernel, labels).compile()

    memory = compiled.memory_analysis()
    if devices[0].platform == "tpu":
        held = memory.peak_memory_in_bytes
    else:  # where the peak leaves out what lies between
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        held += memory.temp_size_in_bytes
    chunks = -(-n // split.batch // step.chunk)
    moved = sum(
        x.bytes * (2 if x.kind == "all-reduce" else 1) * (chunks if x.in_loop else 1)
        for x in collectives(compiled)
    )
    return Bytes(held, moved)


# --- both ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    step: Step
    split: Split
    predicted: Bytes
    compiled: Bytes

    @property
    def is_within(self) -> bool:
        pairs = zip(self.compiled, self.predicted, strict=True)
        return all(got <= (1 + MARGIN) * want for got, want in pairs)

    def cells(self) -> list[str]:
        """As in `HEADINGS`: GB, and the least time that the arithmetic and the links take."""
        devices = self.split.batch * self.split.classes
        products = 6 * self.step.tokens * self.step.features * self.step.classes / devices
        (held, moved), (held_, moved_) = self.predicted, self.compiled
        return [
            f"{devices}",
            f"{self.step.tokens:,}",
            f"{self.step.classes:,}",
            str(self.split),
            *(f"{x / 1e9:.3f}" for x in (held, held_, moved, moved_)),
            *(f"{1e3 * seconds:.1f}" for seconds in (products / FLOPS, moved / LINKS)),
        ]


HEADINGS = ("devices", "N", "V", "a x b", "held: formula", "compiled", "moved: formula", "compiled",
            "products, ms", "links, ms")  # fmt: skip


def tpu(topology: str) -> np.ndarray:
    return np.array(topologies.get_topology_desc(topology, platform="tpu").devices)


def runs(quick: bool) -> list[tuple[Step, Split, np.ndarray]]:
    if quick:
        small = Step(2**16, 1024, 2**16, "float32", 256)
        splits = [Split(8, 1), Split(1, 8), Split(4, 2), Split(4, 2, fsdp=True)]
        return [(small, split, np.array(jax.devices("cpu"))) for split in splits]
    step, some, many = Step(), tpu("v5p:8x8x4"), tpu("v5p:16x16x16")
    larger = dataclasses.replace(step, tokens=4 * step.tokens, classes=4 * step.classes)
    return [
        *((step, split, some) for split in
          (Split(256, 1), Split(1, 256), Split(32, 8), Split(32, 8, fsdp=True))),
        *((step, split, many) for split in
          (Split(4096, 1), Split(1, 4096), Split(128, 32), Split(128, 32, fsdp=True))),
        *((larger, Split(128, 32, fsdp), many) for fsdp in (False, True)),  # as on 32 x 8
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="on eight virtual CPU devices")
    quick = parser.parse_args().quick
    if not quick and importlib.util.find_spec("libtpu") is None:
        sys.exit('needs XLA\'s compiler for TPU: pip install "jax[tpu]"')
    console, rows = Console(highlight=False), []
    with console.status("compiling"):
        for step, split, devices in runs(quick):
            compiled = compile_for(step, split, devices)
            rows.append(Row(step, split, predict(step, split), compiled))

    columns = len(HEADINGS) - 2 * quick  # the rates are not those of a CPU
    table = Table(*HEADINGS[:columns], title="GB on each device")
    for row in rows:
        table.add_row(*row.cells()[:columns], style=None if row.is_within else "red")
    console.print(table)
    if not quick:
        lines = [HEADINGS, ["--:"] * len(HEADINGS), *(row.cells() for row in rows)]
        prose, mark, _ = PAGE.read_text().partition("<!-- python examples/large_scale.py -->\n")
        made = f"JAX {jax.__version__}, libtpu {version('libtpu')}.\n\n"
        figures = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        PAGE.write_text(prose + mark + made + figures)
    if beyond := [str(row.split) for row in rows if not row.is_within]:
        sys.exit(f"more than predicted: {'; '.join(beyond)}")


if __name__ == "__main__":
    main()
