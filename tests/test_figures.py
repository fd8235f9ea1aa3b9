"""README.md and the pages: their figures stand in the reports, their code runs, their links resolve."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import optax
import pytest
from support import lax_rules, rng

import jax_sce
from jax_sce.benchmark import Row
from jax_sce.benchmark._report import SCHEMA

ROOT = Path(__file__).parents[1]
REPORTS = sorted((ROOT / "examples" / "benchmark").glob("*.json"))
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in (
        ".",
        "examples",
        "examples/benchmark",
        "jax_sce/testing",
        "jax_sce/_native",
        "tests",
    )
    for path in (ROOT / folder).glob("*.md")
}
README = PAGES["README.md"]
PAGE = PAGES["examples/benchmark/README.md"]


def said(text, page=PAGE):
    """Is this said, wherever the lines are broken?"""
    return " ".join(text.split()) in " ".join(page.split())


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
        assert line in PAGE
    for shape in ([8192, 2304, 256000], [4096, 4096, 128256], [32768, 2560, 128256],
                  [32768, 4096, 128256]):  # fmt: skip
        cells = []
        for peer in ("floor", "naive", "jax_sce"):
            row = find(rows, subject="linear", shape=shape, dtype="bfloat16", peer=peer,
                       pass_name="value_and_grad")  # fmt: skip
            time = "" if row["seconds"] is None else f"{1e3 * row['seconds']['median']:.1f}"
            cells += [time] + [f"{row['temporary_bytes'] / 2**30:.1f}"] * (peer != "floor")
        line = f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |"
        assert line.replace("|  |", "| |") in PAGE


@pytest.mark.parametrize("lines", [logits_lines, head_lines])
def test_the_tables(lines):
    for line in lines(rows_of("cpu.json")):
        assert line in PAGE


def test_what_whole_logits_cannot_hold():
    rows = [row for row in rows_of("scaling.json") if row["subject"] == "scaling"]
    naive = find(rows, peer="naive", status="failed")
    ours = find(rows, peer="jax_sce", shape=naive["shape"])
    size = " x ".join(map(str, naive["shape"]))
    whole = f"{naive['temporary_bytes'] / 2**30:.0f} GiB"
    assert said(f"A head of {size} has logits and cotangents of {whole}")
    assert said(f"one runs in {ours['peak_bytes'] / 2**20:.0f} MiB")


def test_the_time_of_importing():
    report = json.loads((ROOT / "examples" / "benchmark" / "scaling.json").read_text())
    assert said(f"`import jax_sce` takes {1e3 * report['import_seconds']['median']:.0f} ms beyond")


def test_where_it_is_not_the_fastest():
    """The sentences about what takes longer than optax."""
    rows = rows_of("cpu.json") + rows_of("scaling.json")
    ours = [r for r in rows if r["peer"] == "jax_sce" and r["subject"] in ("logits", "small")]
    jitted = [
        r["ratio"] for r in ours if r["subject"] == "small" and r["pass_name"] != "eager_forward"
    ]
    assert said(f"take {min(jitted):.1f} to {max(jitted):.1f} times as long")
    compiling = []
    for row in ours:
        if row["compile_seconds"] is not None:
            same = {k: row[k] for k in ("subject", "shape", "dtype", "pass_name")}
            theirs = find(rows, **same, peer="optax")["compile_seconds"]
            compiling.append((row["compile_seconds"] / theirs, row["compile_seconds"]))
    assert said(f"compiling takes up to {max(compiling)[0]:.1f} times as long")
    assert said(f"{max(s for _, s in compiling):.1f} s at most")


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
    heads = [*compiled_head_lines(rows), *compiled_head_lines(rows, (8192, 2304, 256000))]
    mesh = mesh_lines(rows_of("compiled_mesh.json"))
    for line in [*passes_lines(rows), *heads, *mesh, *beside_lines()]:
        assert line in PAGE


def readme_lines():
    """README.md's first table."""
    cpu, h100, compiled = (rows_of(f"{name}.json") for name in ("cpu", "h100", "compiled"))

    def gradient(rows, subject, shape, dtype="float32", peer="jax_sce", **machine):
        own = {"subject": subject, "shape": [*shape], "dtype": dtype, "peer": peer, **machine}
        return find(rows, **own, pass_name="value_and_grad")

    def logits(rows, shape):
        float32, bfloat16 = (
            gradient(rows, "logits", shape, x)["ratio"] for x in ("float32", "bfloat16")
        )
        return f"{float32:.2f} × optax; bfloat16 {bfloat16:.2f} ×"

    def memory(ours, whole, unit, bits, digits=1):
        ours, whole = (row["temporary_bytes"] / 2**bits for row in (ours, whole))
        return f"{ours:.{digits}f} {unit}; whole logits {whole:.{digits}f} {unit}"

    ours, whole = (gradient(cpu, "linear", (1024, 64, 32000), peer=x) for x in ("jax_sce", "naive"))
    heads = [ours, *rows_of("heads.json")]
    heads = [row for row in heads if (row["peer"], row["dtype"]) == ("jax_sce", "float32")]
    ratios = [row["ratio"] for row in heads]
    times = f"{min(ratios):.2f} to {max(ratios):.2f} × whole logits"
    head = times, memory(ours, whole, "MiB", 20, 0)
    yield "CPU, two threads", logits(cpu, (512, 32000)), *head, "measured"

    ours, whole = (
        gradient(h100, "linear", (8192, 2304, 256000), "bfloat16", x) for x in ("jax_sce", "naive")
    )
    times = [f"{1e3 * row['seconds']['median']:.0f} ms" for row in (ours, whole)]
    head = f"{times[0]}; whole logits {times[1]}", memory(ours, whole, "GiB", 30)
    yield "one NVIDIA H100", logits(h100, (8192, 128256)), *head, "measured"

    def head(rows, machine):
        ours, whole = (
            gradient(rows, "linear", (32768, 4096, 128256), "bfloat16", x, machine=machine)
            for x in ("jax_sce", "naive")
        )
        bounds = [f"{1 / row['floor_fraction']:.2f}" for row in (ours, whole)]
        time = f"{bounds[0]} × its products; whole logits {bounds[1]} ×"
        return time, memory(ours, whole, "GiB", 30), "compiled"

    for machine in ("v5p", "v6e"):
        passes = [
            gradient(compiled, "logits", (8192, 128256), "bfloat16", x, machine=machine)["cost"]
            for x in ("jax_sce", "optax")
        ]
        ours, optaxs = (f"{cost['passes']:.1f}" for cost in passes)
        time = f"{ours} passes over the logits; optax {optaxs}"
        yield f"TPU {machine}", time, *head(compiled, machine)
    yield "2 x 4 H100, each", "", *head(rows_of("compiled_mesh.json"), "h100")


def test_the_first_table():
    for cells in readme_lines():
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in README


def test_the_readme_is_short():
    assert README.count("\n") <= 160
    prose = re.sub(r"^\|.*|^!\[.*", "", README, flags=re.M)
    assert max(map(len, prose.splitlines())) <= 105


@pytest.mark.parametrize("page", PAGES)
def test_the_links(page):
    """Files that a page names are there, and headings too."""
    text = re.sub(r"^ *```.*?^ *```", "", PAGES[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), target
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings]
            assert not anchor or anchor in slugs, target


# -- their code ----------------------------------------------------------------------------------------


def code(page):
    """The blocks that run; a fragment of another program's code is marked as ```py."""
    return [re.sub(r"^  ", "", x, flags=re.M) if x.startswith("  ") else x
            for x in re.findall(r"^ *```python\n(.*?)^ *```", PAGES[page], re.M | re.S)]  # fmt: skip


def arrays():
    """What the blocks of the pages name and do not make."""
    r = rng(7)

    def floats(*shape):
        return jnp.asarray(r.normal(size=shape).astype(np.float32))

    ids = jnp.asarray(r.integers(0, 5, (2, 6)).astype(np.int32))
    return {
        "jax": jax, "jnp": jnp, "jax_sce": jax_sce, "optax": optax,
        "logits": floats(2, 6, 5), "hidden": floats(2, 6, 4), "kernel": floats(4, 5),
        "embedding": floats(5, 4), "labels": ids, "tokens": ids, "segment_ids": ids // 3,
        "advantage": floats(2, 6), "old_nll": floats(2, 6), "is_prompt": ids == 1,
        "is_padding": ids == 2, "teacher_hidden": floats(2, 6, 3), "teacher_kernel": floats(3, 5),
        "top_ids": jnp.stack([ids, ids], axis=-1), "top": jnp.full((2, 6, 2), 0.3),
    }  # fmt: skip


def test_the_quick_example(capsys):
    """README.md's prints what it says."""
    (block,) = [x for x in code("README.md") if "set_printoptions" in x]
    with np.printoptions(), lax_rules():
        exec(block, {})
    assert capsys.readouterr().out == "".join(re.findall(r"^# (.*\n)", block, re.M))


@lax_rules()
def test_the_code_of_the_pages():
    """It can be traced. (What the losses compute is the other tests' subject.)"""

    def run(*blocks):
        names = arrays()
        for block in blocks:
            wanted = re.findall(r"^(?:import|from) (\w+)", block, re.M)
            if all(map(importlib.util.find_spec, wanted)):  # not every package is a test's
                exec(block, names)

    before_and_after, *_ = code("README.md")
    jax.eval_shape(lambda: run(before_and_after))
    recipes = code("examples/recipes.md")
    assert len(recipes) > 10
    jax.eval_shape(lambda: run(*recipes))


@lax_rules()
def test_what_changes_for_who_comes_from_elsewhere():
    """examples/migrating.md: each `after` is the `before`."""
    logits, tangent = (rng(seed).normal(size=(4, 5)).astype(np.float32) for seed in (1, 2))
    ids, labels = np.array([0, 2, 4, 1]), np.array([0, -1, 4, 1])

    @jax.jit
    def pairs(logits, tangent):
        names = {
            "logits": logits, "tangent": tangent, "ids": ids, "labels": labels, "num_classes": 5,
            "weights": jnp.array([1.0, 0.0, 2.0, 0.5]), "hidden": logits, "kernel": tangent.T,
        }  # fmt: skip
        found = []
        for block in code("examples/migrating.md"):
            exec(block, names)
            if "before" in block:
                found.append((names.pop("before"), names.pop("after")))
        return found

    found = pairs(logits, tangent)
    assert len(found) == 7
    for before, after in found:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, 2e-6), before, after)

    def masked(z):  # the first thing that the page says
        losses = jax_sce.softmax_cross_entropy_with_integer_labels(z, labels)
        return jnp.where(labels >= 0, losses, 0).sum()

    value, gradient = jax.jit(jax.value_and_grad(masked))(logits)
    assert np.isfinite(value)
    assert np.isnan(gradient).any(axis=1).tolist() == [False, True, False, False]


@lax_rules()
def test_the_limits_name_a_bad_label(capsys):
    def loss(logits, labels):
        return jax_sce.softmax_cross_entropy_with_integer_labels(logits, labels, reduction="mean")

    (block,) = code("examples/limits.md")
    names = {
        "jax": jax,
        "train_step": loss,
        "logits": jnp.zeros((3, 5)),
        "labels": np.array([0, 1, 7]),
    }
    exec(block, names)
    printed, (says,) = capsys.readouterr().out, re.findall(r"# (.*)", block)
    assert printed.startswith(says)


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.name)
def test_the_reports_are_as_described(path):
    jsonschema.validate(json.loads(path.read_text()), json.loads(SCHEMA.read_text()))
