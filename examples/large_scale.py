"""What a fused head costs each of 256 and of 4096 chips: formulas and compiled programs.

    python examples/large_scale.py [--quick]

A head of 8192 features and 262,144 classes takes a million tokens a step in bfloat16, and is split by
examples, by classes, and by both. For each split the loss and its gradients are compiled, not run.
The compiled program says how many bytes a device holds and how many cross its links. Formulas
predict both numbers, and the script fails if a program needs over 1 % more. `large_scale.md` says
which split to choose.

The programs are for TPU v5p, which needs XLA's compiler for TPU, `pip install "jax[tpu]"`, but no TPU.
Time: two to three minutes on two CPU cores. The script writes its table into `large_scale.md`.
`--quick` compiles a smaller head, in float32, for eight virtual CPU devices: it takes seconds and
writes nothing. Ctrl-C prints the table so far.
"""

import common  # first, because of Ctrl-C

# isort: split
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
# A TPU v5p's operations in bfloat16 and bytes sent per second, by Google Cloud's documentation (its
# links carry 1200 GB in both directions together).
FLOPS, LINKS = 459e12, 600e9

# --- on paper --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    tokens: int = 2**20  # N
    features: int = 8192  # D
    classes: int = 2**18  # V
    dtype: str = "bfloat16"
    chunk: int = 1024  # c, the number of examples whose logits exist at once


class Split(NamedTuple):
    batch: int  # a, the number of devices over which the examples are split
    classes: int  # b, the same for the classes
    fsdp: bool = False  # the kernel is stored split over the batch's devices too

    def __str__(self) -> str:
        return f"{self.batch} x {self.classes}" + (", FSDP" if self.fsdp else "")


class Bytes(NamedTuple):
    """The bytes of each device."""

    held: int  # the most at any time: arguments, results and temporary arrays
    moved: int  # sent in a step


def predict(step: Step, split: Split) -> Bytes:
    n, v, d = step.tokens // split.batch, step.classes // split.classes, step.features
    c, s = min(step.chunk, n), jnp.dtype(step.dtype).itemsize
    hidden, kernel = s * n * d, s * d * v  # their gradients have the same size
    home = kernel // split.batch if split.fsdp else kernel
    arguments, results = hidden + home + 4 * n, hidden + home

    sums = hidden + 4 * d * v  # the gradients during the loop, the kernel's in float32
    in_loop = 4 * c * v + 2 * s * c * d + (kernel if split.fsdp else 0)
    to_send = max(hidden, kernel)  # after the loop
    held = arguments + results + sums + max(in_loop, to_send)

    moved = 0  # a device sends at most 2 B to sum B bytes, and B to gather or scatter B bytes
    if split.classes > 1:
        statistics = 16 * n  # the maximum, the tail, its leaders and the label, in float32
        moved += 2 * (statistics + hidden)
    if split.batch > 1:
        moved += 2 * kernel + 2 * 8
    return Bytes(held, moved)


# --- compiled --------------------------------------------------------------------------------------


def compile_for(step: Step, split: Split, devices: np.ndarray) -> Bytes:
    """Compiles the step. The mesh axes are explicit: then JAX knows the kernel's sharding, and sums
    its gradient directly into it."""
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
    else:  # the CPU's peak does not count temporary arrays
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
        """For `HEADINGS`: GB, and the least time that the products and the links take."""
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
        # A device has as many tokens and classes as on 32 x 8.
        *((larger, Split(128, 32, fsdp), many) for fsdp in (False, True)),
    ]  # fmt: skip


def show(rows: list[Row]) -> Table:
    """The table without its last columns, the times of a TPU, which are only on the page."""
    table = Table(*HEADINGS[:-2], title="GB on each device", padding=0)
    for row in rows:
        table.add_row(*row.cells()[:-2], style=None if row.is_within else "red")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true",
        help="compile a smaller head for eight virtual CPU devices, in seconds, and leave "
        "large_scale.md as it is",
    )  # fmt: skip
    quick = parser.parse_args().quick
    if not quick:
        if importlib.util.find_spec("libtpu") is None:
            sys.exit('large_scale.py needs XLA\'s compiler for TPU: pip install "jax[tpu]"')
        common.check_folder("examples/", PAGE.parent)
    console, rows = Console(highlight=False), []
    try:
        with common.progress_bar(console) as progress:
            task = progress.add_task("describing the chips", total=None)
            cases = runs(quick)
            for step, split, devices in cases:
                progress.update(task, description=f"compiling for {split}", total=len(cases))
                compiled = compile_for(step, split, devices)
                rows.append(Row(step, split, predict(step, split), compiled))
                progress.advance(task)
    except KeyboardInterrupt:
        console.print(show(rows))
        kept = f"Stopped after {len(rows)} programs. {PAGE.name} was not changed."
        raise KeyboardInterrupt(kept) from None

    console.print(show(rows))
    if not quick:
        lines = [HEADINGS, ["--:"] * len(HEADINGS), *(row.cells() for row in rows)]
        prose, mark, _ = PAGE.read_text().partition("<!-- python examples/large_scale.py -->\n")
        made = f"JAX {jax.__version__}, libtpu {version('libtpu')}.\n\n"
        figures = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        PAGE.write_text(prose + mark + made + figures)
        print(f"Written to {PAGE}, with the times")
    if beyond := [str(row.split) for row in rows if not row.is_within]:
        sys.exit(f"more than predicted: {'; '.join(beyond)}")


if __name__ == "__main__":
    main()
