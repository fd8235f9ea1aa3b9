"""README.md's figures are those that `python -m jax_sce.benchmark` left in examples/benchmark/."""

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest

from jax_sce.benchmark import Row
from jax_sce.benchmark._report import SCHEMA

ROOT = Path(__file__).parents[1]
REPORTS = sorted((ROOT / "examples" / "benchmark").glob("*.json"))
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "examples" / "benchmark" / "README.md").read_text()


def rows_of(name):
    """Those of a report, with None for what it leaves out."""
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(Row))
    report = json.loads((ROOT / "examples" / "benchmark" / name).read_text())
    return [unknown | row for row in report["rows"]]


def find(rows, **wanted):
    (row,) = [row for row in rows if all(row[k] == x for k, x in wanted.items())]
    return row


CPU_SHAPES = ([65536, 10], [4096, 1000], [512, 32000], [128, 128256])


def logits_lines(rows, shapes=CPU_SHAPES):
    """Ours, as a ratio to optax's time: with class ids, and with distributions where those were run."""
    passes = ("forward", "value_and_grad", "donated_gradient")
    for dtype in ("float32", "bfloat16"):
        for shape in shapes:
            cells = []
            for subject in ("logits", "distributions"):
                own = {"subject": subject, "dtype": dtype, "shape": shape, "peer": "jax_sce"}
                if subject == "distributions" and shape == [128, 128256]:
                    cells += [""] * 3
                else:
                    cells += [f"{find(rows, **own, pass_name=p)['ratio']:.2f}" for p in passes]
            yield f"| {shape[0]} x {shape[1]} | {dtype} | {' | '.join(cells)} |"


def head_lines(rows):
    """Each peer, as a ratio to the time of whole logits with optax's loss, and its memory."""
    own = [
        row
        for row in rows
        if row["shape"] == [1024, 64, 32000]
        and row["pass_name"] == "value_and_grad"
        and row["peer"] != "floor"
    ]
    for peer in dict.fromkeys(row["peer"] for row in own):
        cells = []
        for dtype in ("float32", "bfloat16"):
            row = find(own, dtype=dtype, peer=peer)
            if row["status"] == "ok":
                cells.append(f"{row['ratio']:.2f}")
            else:
                cells.append({"wrong": "wrong", "failed": "not run"}[row["status"]])
            memory = row["temporary_bytes"]
            cells.append("" if memory is None else f"{memory / 2**20:.0f}")
        yield f"| {peer} | {' | '.join(cells)} |"


def test_the_tables_of_the_gpu():
    rows = rows_of("h100.json") + rows_of("h100_heads.json")
    for line in logits_lines(rows, ([8192, 32000], [8192, 128256], [4096, 1000])):
        assert line in README
    for shape in ([8192, 2304, 256000], [4096, 4096, 128256], [32768, 2560, 128256],
                  [32768, 4096, 128256]):  # fmt: skip
        cells = []
        for peer in ("floor", "naive", "jax_sce"):
            row = find(rows, subject="linear", shape=shape, dtype="bfloat16", peer=peer,
                       pass_name="value_and_grad")  # fmt: skip
            time = "" if row["seconds"] is None else f"{1e3 * row['seconds']['median']:.1f}"
            cells += [time] + [f"{row['temporary_bytes'] / 2**30:.1f}"] * (peer != "floor")
        line = f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |"
        assert line.replace("|  |", "| |") in README


@pytest.mark.parametrize("lines", [logits_lines, head_lines])
def test_the_tables(lines):
    for line in lines(rows_of("cpu.json")):
        assert line in README


def test_what_whole_logits_cannot_hold():
    rows = [row for row in rows_of("scaling.json") if row["subject"] == "scaling"]
    naive = find(rows, peer="naive", status="failed")
    ours = find(rows, peer="jax_sce", shape=naive["shape"])
    size = " x ".join(map(str, naive["shape"]))
    whole = f"{naive['temporary_bytes'] / 2**30:.0f} GiB"
    assert f"A head of {size} has logits and cotangents of {whole}" in README
    assert f"one runs in {ours['peak_bytes'] / 2**20:.0f} MiB" in README


def test_the_time_of_importing():
    report = json.loads((ROOT / "examples" / "benchmark" / "scaling.json").read_text())
    assert f"`import jax_sce` {1e3 * report['import_seconds']['median']:.0f} ms beyond" in README


def test_where_it_is_not_the_fastest():
    """The sentences about what takes longer than optax."""
    rows = rows_of("cpu.json") + rows_of("scaling.json")
    ours = [r for r in rows if r["peer"] == "jax_sce" and r["subject"] in ("logits", "small")]
    jitted = [
        r["ratio"] for r in ours if r["subject"] == "small" and r["pass_name"] != "eager_forward"
    ]
    assert f"take {min(jitted):.1f} to {max(jitted):.1f} times as long" in README
    compiling = []
    for row in ours:
        if row["compile_seconds"] is not None:
            same = {k: row[k] for k in ("subject", "shape", "dtype", "pass_name")}
            theirs = find(rows, **same, peer="optax")["compile_seconds"]
            compiling.append((row["compile_seconds"] / theirs, row["compile_seconds"]))
    assert f"compiling takes up to {max(compiling)[0]:.1f} times as long" in README
    assert f"{max(s for _, s in compiling):.1f} s at most" in README


# -- compiled for machines that are not here -----------------------------------------------------------

MACHINES = ("h100", "v5p", "v6e")


def passes_lines(rows):
    """Passes over the logits with the gradient, on each machine."""
    for peer in ("jax_sce", "optax", "optax float32", "naive"):
        cells = []
        for subject in ("logits", "softcap", "distributions"):
            own = {"subject": subject, "shape": [8192, 128256], "pass_name": "value_and_grad"}
            found = [find(rows, **own, peer=peer, machine=m)["cost"]["passes"] for m in MACHINES]
            cells.append(" / ".join(f"{x:.1f}" for x in found))
        yield f"| {peer} | {' | '.join(cells)} |"


HEADS = (
    "jax_sce",
    "naive",
    "tokamax xla",
    "tokamax chunked_xla",
    "tokamax mosaic_tpu",
    "jax-cce",
)


def bound_and_memory(row):
    """The bound over that of the three products, and GiB."""
    return [f"{1 / row['floor_fraction']:.2f}", f"{row['temporary_bytes'] / 2**30:.1f}"]


def compiled_head_lines(rows, shape=(32768, 4096, 128256), machines=MACHINES):
    """The bound over that of the three products, and the temporary memory."""
    own = {"subject": "linear", "shape": [*shape], "pass_name": "value_and_grad"}
    for peer in HEADS:
        cells = []
        for machine in machines:
            found = [r for r in rows if all(r[k] == x for k, x in own.items())]
            found = [r for r in found if (r["peer"], r["machine"]) == (peer, machine)]
            cells += bound_and_memory(found[0]) if found else ["", ""]
        yield f"| {peer} | {' | '.join(cells)} |"


def mesh_lines(rows):
    """On 2 x 4 devices: the same, with the megabytes that each sends, and in loops."""
    own = {"subject": "linear", "shape": [32768, 4096, 128256], "pass_name": "value_and_grad"}
    for peer in ("jax_sce", "naive", "tokamax xla", "tokamax chunked_xla", "jax-cce"):
        cells = []
        for machine in ("h100", "v5p"):
            row = find(rows, **own, peer=peer, machine=machine)
            sent = [f"{row['cost'][x] / 1e6:,.1f}" for x in ("sent", "sent_in_loop")]
            cells += bound_and_memory(row) + sent
        yield f"| {peer} | {' | '.join(cells)} |"


def beside_lines():
    """What an H100 took over the bound from the program, of jax_sce, optax and naive."""
    measured = rows_of("h100.json") + rows_of("h100_heads.json")
    compiled = rows_of("compiled_h100.json")
    for subject, shape in (
        ("logits", [8192, 32000]), ("logits", [8192, 128256]), ("distributions", [8192, 128256]),
        ("linear", [8192, 2304, 256000]), ("linear", [4096, 4096, 128256]),
        ("linear", [32768, 2560, 128256]), ("linear", [32768, 4096, 128256]),
    ):  # fmt: skip
        for pass_name in ("forward", "value_and_grad"):
            own = {"subject": subject, "shape": shape, "dtype": "bfloat16", "pass_name": pass_name}
            cells = []
            for peer in ("jax_sce", "naive" if subject == "linear" else "optax"):
                there = [r for r in measured if all(r[k] == x for k, x in own.items())]
                there = [r for r in there if r["peer"] == peer and r["seconds"] is not None]
                if not there:
                    cells += ["", "", ""]
                    continue
                bound = find(compiled, **own, peer=peer)["cost"]["seconds"]
                took = there[0]["seconds"]["median"]
                cells += [f"{1e3 * bound:.2f}", f"{1e3 * took:.2f}", f"{took / bound:.2f}"]
            if any(cells):
                size = " x ".join(map(str, shape))
                name = "class ids" if subject == "logits" else subject
                yield f"| {name} {size}, {pass_name} | {' | '.join(cells)} |"


def test_the_tables_of_what_was_compiled():
    rows = rows_of("compiled.json")
    for line in [*passes_lines(rows), *compiled_head_lines(rows)]:
        assert line in README
    smaller = compiled_head_lines(rows, (8192, 2304, 256000))
    for line in [*smaller, *mesh_lines(rows_of("compiled_mesh.json")), *beside_lines()]:
        assert line in PAGE


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.name)
def test_the_reports_are_as_described(path):
    jsonschema.validate(json.loads(path.read_text()), json.loads(SCHEMA.read_text()))
