"""The benchmark: what it finds out, what it writes, and that nothing stops it. No time is asserted."""

import io
import json
import re
import subprocess
import sys
import time
from itertools import groupby

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from support import covering, exact_gradient, exact_loss, installed, wide

from jax_sce._hlo import Kernel, Product
from jax_sce.benchmark import Cost, Quartiles, Row, _accelerators, _scaling, compare
from jax_sce.benchmark.__main__ import FOLDER, parse
from jax_sce.benchmark._accelerators import ACCELERATORS
from jax_sce.benchmark._cases import DTYPES, PASSES, SOFTCAP, Case, shape_text
from jax_sce.benchmark._measure import round_robin
from jax_sce.benchmark._peak import peak_bytes
from jax_sce.benchmark._plot import draw
from jax_sce.benchmark._report import SCHEMA, Report, geometric_means, is_right
from jax_sce.benchmark._scaling import Fit, Plan, fitted_exponent, scaling
from jax_sce.benchmark._table import print_report
from jax_sce.testing._oracle import exact

pytestmark = pytest.mark.usefixtures("lax_promotion")  # the peers are not ours

SHAPES = {
    "logits": (96, 200),
    "softcap": (96, 200),
    "distributions": (96, 200),
    "linear": (64, 16, 200),
}
OURS = ["optax", "naive", "jax_sce"]


def logits_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def head_loss(hidden, kernel, labels):
    return logits_loss(jnp.dot(hidden, kernel, preferred_element_type=jnp.float32), labels)


def capped_loss(logits, labels):
    return logits_loss(SOFTCAP * jnp.tanh(logits.astype(jnp.float32) / SOFTCAP), labels)


LOSSES = {
    "logits": logits_loss,
    "softcap": capped_loss,
    "distributions": optax.softmax_cross_entropy,
    "linear": head_loss,
}


def compare_one(loss, subject="logits", dtype="float32", pass_name="value_and_grad", **options):
    """The row of a loss of one's own."""
    rows = compare(
        subject,
        {"mine": loss},
        shapes=[SHAPES[subject]],
        dtypes=[dtype],
        passes=[pass_name],
        peers=[],
        rounds=1,
        **options,
    )
    assert [row.peer for row in rows] == ["floor", "mine"]
    return rows[-1]


def with_gradient(loss, change, argument):
    """The value of `loss`, and its gradient by that argument as `change` makes it."""

    @jax.custom_vjp
    def altered(x):
        return x

    altered.defvjp(lambda x: (x, None), lambda _, g: (change(g),))
    return lambda *args: loss(*(altered(x) if i == argument else x for i, x in enumerate(args)))


# -- what is right and what is wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    "subject", ["logits", *(pytest.param(s, marks=pytest.mark.thorough) for s in [*SHAPES][1:])]
)
def test_right_losses_are_timed(subject):
    steps = []
    peers = ["naive", "jax_sce"] if subject == "linear" else ["optax", "jax_sce"]
    rows = compare(
        subject,
        {"mine": LOSSES[subject]},
        shapes=[SHAPES[subject]],
        dtypes=["float32"],
        passes=PASSES[subject],
        peers=peers,
        rounds=2,
        progress=lambda done, total, text: steps.append((done, total, text)),
    )
    assert len(rows) == len(PASSES[subject]) * (2 + len(peers))
    assert {total for _, total, _ in steps} == {len(rows) + 2 * len(PASSES[subject])}
    assert [done for done, *_ in steps] == sorted(done for done, *_ in steps)
    what = f"{subject} {shape_text(SHAPES[subject])} float32 forward"
    assert [text for *_, text in steps if text.endswith(what)] == [
        f"drawing the inputs: {what}",
        f"computing the float64 answer: {what}",
        *(f"compiling {peer}: {what}" for peer in ("floor", *peers, "mine")),
        f"timing: {what}",
        f"timing: {what}",
    ]
    for row in rows:
        assert (row.status, row.detail) == ("ok", "")
        assert row.seconds.low <= row.seconds.median <= row.seconds.high
        is_floor = row.peer == "floor"
        assert (row.floor_fraction == 1) == is_floor
        assert (row.value_error is None) == (is_floor or row.pass_name == "donated_gradient")
        assert (row.gradient_error is None) == (is_floor or "grad" not in row.pass_name)
        assert (row.compile_seconds is None) == (row.pass_name == "eager_forward" and not is_floor)
    assert {row.peer for row in rows if row.ratio == 1} == {peers[0]}


def a_tenth_too_large(g):
    return 1.1 * g


def without_the_softmax(g):
    return jnp.where(g < 0, g, 0)


def without_the_labels(g):
    return jnp.where(g > 0, g, 0)


def last_class_lost(g):
    return g.at[:, -1].set(0)


CHANGES = {
    "logits": [(0, a_tenth_too_large), (0, without_the_softmax)],
    "softcap": [(0, without_the_softmax)],
    "distributions": [(0, a_tenth_too_large), (0, without_the_labels)],
    "linear": [(0, a_tenth_too_large), (1, a_tenth_too_large), (1, last_class_lost)],
}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("subject", SHAPES)
def test_rounding_is_not_wrong_and_what_is_wrong_is_not_timed(subject, dtype):
    loss = LOSSES[subject]
    wrong = {
        f"{change.__name__}, {argument}": with_gradient(
            loss, lambda g, change=change: change(g).astype(g.dtype), argument
        )
        for argument, change in CHANGES[subject]
    }
    wrong["value"] = lambda *args: 1.05 * loss(*args)
    wrong["nan"] = lambda *args: np.nan * loss(*args)
    known = [peer for peer in OURS if (peer, subject) != ("optax", "linear")]
    _, *rows = compare(subject, {"right": loss, **wrong}, shapes=[SHAPES[subject]], dtypes=[dtype],
                       passes=["value_and_grad"], peers=known, rounds=1)  # fmt: skip
    right = len(known) + 1
    assert {row.status for row in rows[:right]} == {"ok"}
    assert [row.peer for row in rows[right:]] == list(wrong)
    for row in rows[right:]:
        assert row.status == "wrong"
        assert (row.seconds, row.ratio, row.floor_fraction) == (None, None, None)
        detail = {"value": "the value is off by", "nan": "the value is not finite"}
        assert row.detail.startswith(detail.get(row.peer, "the gradient is off by"))


def test_the_answers_that_all_are_compared_with():
    case = Case("logits", (70, 50), "float32")
    logits, labels = case.arrays()
    gradient = exact_gradient(logits, labels) / len(labels)
    errors = case.check(jnp.float32(exact_loss(logits, labels).mean()), [jnp.float32(gradient)])
    assert max(errors) < 1e-6

    case = Case("distributions", (70, 50), "float32")
    logits, labels = case.arrays()
    right = exact(logits, labels)
    gradient = jnp.float32(right.by_logits / len(labels))
    errors = case.check(jnp.float32(right.loss.mean()), [gradient])
    assert max(errors) < 1e-6

    case = Case("linear", (70, 8, 50), "float32")
    hidden, kernel, labels = case.arrays()
    logits = wide(hidden) @ wide(kernel)
    gradient = exact_gradient(logits, labels) / len(labels)
    gradients = [gradient @ wide(kernel).T, wide(hidden).T @ gradient]
    value = jnp.float32(exact_loss(logits, labels).mean())
    errors = case.check(value, [jnp.float32(g) for g in gradients])
    assert max(errors) < 1e-6


@pytest.mark.parametrize("subject", SHAPES)
def test_both_dtypes_see_the_same_numbers(subject):
    singles, halves = (Case(subject, SHAPES[subject], dtype).arrays() for dtype in DTYPES)
    for single, half in zip(singles, halves, strict=True):
        if single.dtype != jnp.int32:
            assert (single.dtype, half.dtype) == (jnp.float32, jnp.bfloat16)
        np.testing.assert_array_equal(single, half.astype(single.dtype))


def test_distributions_are_distributions():
    _, labels = Case("distributions", (9, 70), "float32").arrays()
    assert labels.min() > 0
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=2**-8)  # they are rounded


# -- nothing stops it --------------------------------------------------------------------------------


def test_a_peer_that_raises_does_not_end_the_run():
    def broken(logits, labels):
        raise RuntimeError("out of ideas\nand of lines")

    losses = {"broken": broken, "mine": logits_loss}
    rows = compare("logits", losses, shapes=[(8, 10)], dtypes=["float32"], passes=["forward"],
                   peers=["jax_sce"], rounds=1)  # fmt: skip
    assert [(row.peer, row.status) for row in rows] == [
        ("floor", "ok"), ("jax_sce", "ok"), ("broken", "failed"), ("mine", "ok"),
    ]  # fmt: skip
    assert rows[2].detail == "RuntimeError: out of ideas"


def test_a_peer_that_raises_later_loses_its_turns():
    calls = []

    def tires():
        calls.append("tires")
        if len(calls) > 5:
            raise RuntimeError("tired")

    seconds = round_robin({"tires": tires, "goes on": lambda: None}, 4, lambda: None)
    assert isinstance(seconds["tires"], RuntimeError)
    assert len(seconds["goes on"]) == 4


def test_what_needs_more_memory_than_there_is_does_not_run():
    row = compare_one(logits_loss, memory_limit=2**16)
    assert row.status == "failed"
    assert "are available" in row.detail
    assert row.temporary_bytes is not None  # it was compiled
    assert row.seconds is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"subject": "logit"},
            "subject must be among logits, softcap, distributions, linear, got 'logit'",
        ),
        ({"shapes": [(8, 4, 10)]}, "a shape of logits must be NxV"),
        ({"dtypes": ["float64"]}, "dtype must be among float32, bfloat16, got 'float64'"),
        ({"passes": ["backward"]}, "passes of logits must be among .*, got 'backward'"),
        ({"peers": ["numpy"]}, "peers of logits must be among .*, got 'numpy'"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"losses": {"optax": logits_loss}}, "losses must have names that no peer has"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"subject": "logits", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "logit",
            "subjects must be among logits, softcap, distributions, linear, compiled, scaling, small",
        ),
        ("--shapes 1024", "shapes must be like 1024x32000 or 512x64x8192, got '1024'"),
        ("--dtypes float64", "dtypes must be among float32, bfloat16, got 'float64'"),
        ("--passes backward", "got 'backward'"),
        ("--peers numpy", "got 'numpy'"),
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("linear --shapes 8x10", "--shapes: none of these is for linear"),
        ("linear --passes donated_gradient", "--passes: none of these is for linear"),
        ("distributions --shapes 8x4x10", "--shapes: none of these is for distributions"),
        ("small --peers optax", "are for logits, softcap, distributions, linear, compiled"),
        ("--json nowhere/at/all.json", "there is no folder nowhere"),
        ("logits --for h100", "--for and --mesh are for compiled"),
        ("compiled --for a100", "--for must be among h100, h200, b200, v5e, v5p, v6e, got 'a100'"),
        ("compiled --mesh 8", "--mesh must be like 2x4, got '8'"),
        ("compiled --for v6e --mesh 1x3", "v6e"),  # it has no such topology, or is not installed
        ("compiled --shapes 8x4x10 --passes donated_gradient", "none of the subjects of compiled"),
        ("compiled --passes eager_forward", "--passes: eager_forward is not compiled"),
        ("compiled --peers torch", "none of the subjects of compiled"),
        ("compiled --mesh 512x8", "a mesh may have 256 devices at most, got 4096"),
    ],
)
def test_bad_options_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        parse()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_shapes_choose_the_subjects(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--shapes", "8x10,16x20", "--dtypes", "float32"])
    args = parse()
    options = args.options
    assert args.json.parent == args.plot == FOLDER  # nobody said where to
    assert (tmp_path / FOLDER).is_dir()
    assert list(options) == ["logits", "distributions"]
    for asked in options.values():
        assert asked["shapes"] == [(8, 10), (16, 20)]
        assert asked["dtypes"] == ["float32"]


# -- statistics --------------------------------------------------------------------------------------


def test_quartiles():
    assert Quartiles.of([3.0]) == Quartiles(3.0, 3.0, 3.0)
    assert Quartiles.of([9.0, 1.0, 5.0, 3.0, 7.0]) == Quartiles(3.0, 5.0, 7.0)


def test_each_round_begins_with_the_next():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    rounds = []

    def begin_round():
        rounds.append("".join(name for name, _ in groupby(order)))
        order.clear()

    seconds = round_robin(runs, 4, begin_round)
    begin_round()
    assert rounds == ["", "abc", "bca", "cab", "abc"]
    assert {len(samples) for samples in seconds.values()} == {4}


def test_one_slow_reading_does_not_decide_how_many_runs_the_next_ones_take(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow_at_first():
        clock[0] += 2**-13 if calls else 2**-7
        calls.append("run")

    begins = []
    round_robin({"slow at first": slow_at_first}, 3, lambda: begins.append(len(calls)))
    assert [*begins, len(calls)] == [0, 1, 2, 2 + 17]  # two milliseconds are 16.4 of the quick ones


def test_exponents():
    sizes = np.array([1e3, 4e3, 9e3])
    assert fitted_exponent(sizes, 7 * sizes**1.5) == pytest.approx(1.5)
    assert fitted_exponent(sizes, [5, 5, 5]) == pytest.approx(0, abs=1e-12)


def synthetic(peer, ratio, status="ok"):
    return Row("logits", (8, 10), "float32", "forward", peer, status, ratio=ratio)


def test_the_mean_of_ratios_is_geometric_and_ours():
    rows = [synthetic("jax_sce", 0.5), synthetic("jax_sce", 2.0), synthetic("naive", 9.0)]
    assert geometric_means(rows) == {(None, "logits", "float32"): pytest.approx(1)}


def test_only_our_own_faults_are_the_command_s():
    assert is_right([synthetic("naive", None, "wrong"), synthetic("jax_sce", 1.0)])
    assert not is_right([synthetic("jax_sce", None, "wrong")])


# -- the command -------------------------------------------------------------------------------------


PLAN = Plan(features=8, examples=64, classes=128, over_classes=[128, 256], over_examples=[64, 128],
            rounds=1, beyond_features=8, beyond_classes=4096, memory=2**24)  # fmt: skip


@pytest.mark.thorough
def test_scaling_shows_what_naive_cannot_hold():
    rows, fits = scaling(PLAN)
    assert {row.subject for row in rows} == {"scaling"}
    failed = [row for row in rows if row.status != "ok" and row.peer != "floor"]
    assert [(row.peer, row.shape) for row in failed] == [("naive", (768, 8, 4096))]
    assert any((row.peer, row.shape) == ("jax_sce", (768, 8, 4096)) for row in rows)
    assert {(fit.cost, fit.size) for fit in fits if fit.peer == "jax_sce"} == {
        (cost, size) for cost in ("seconds", "temporary_bytes") for size in "VN"
    }


def test_scaling_fits_what_grows_and_goes_beyond_the_memory(monkeypatch):
    """Of costs that are given, here: time N V^2, and memory N."""
    asked = []

    def given(subject, *, shapes, peers, **options):
        asked.append((shapes, options.get("memory_limit")))
        return [
            Row(subject, shape, "float32", "value_and_grad", peer, "ok",
                seconds=Quartiles.of([1e-9 * shape[0] * shape[2] ** 2]), temporary_bytes=shape[0])
            for shape in shapes for peer in ("floor", *peers)
        ]  # fmt: skip

    monkeypatch.setattr(_scaling, "compare", given)
    rows, fits = scaling(PLAN)
    assert asked == [
        ([(64, 8, 128), (64, 8, 256)], None),
        ([(64, 8, 128), (128, 8, 128)], None),
        ([(768, 8, 4096)], 2**24),  # the first multiple of 256 whose logits, twice, exceed it
    ]
    assert {row.subject for row in rows} == {"scaling"}
    ours = {(fit.cost, fit.size): fit.exponent for fit in fits if fit.peer == "jax_sce"}
    assert ours == {
        ("seconds", "V"): pytest.approx(2), ("seconds", "N"): pytest.approx(1),
        ("temporary_bytes", "V"): pytest.approx(0), ("temporary_bytes", "N"): pytest.approx(1),
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_the_peak_counts_the_results():
    case = Case("logits", (2048, 4096), "float32")
    peak = peak_bytes(case, "value_and_grad", "optax")
    gradient = 2048 * 4096 * 4
    assert 0.9 * gradient < peak < 3 * gradient


def valid_report(path):
    """The JSON, as the schema describes it, with a line for each row."""
    report = json.loads(path.read_text())
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)
    assert len(path.read_text().splitlines()) == len(report["rows"]) + len(report) + 1
    return report


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "jax_sce.benchmark", "logits", "small", "--quick",
               "--shapes", "96x200", "--passes", "value_and_grad", "--rounds", "1",
               "--json", tmp_path / "report.json", "--plot", tmp_path / "pictures"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report = valid_report(tmp_path / "report.json")
    assert {row["subject"] for row in report["rows"]} == {"logits", "small"}
    assert {row["status"] for row in report["rows"] if row["peer"] in OURS} == {"ok"}
    assert report["import_seconds"]["median"] > 0

    picture = (tmp_path / "pictures" / "logits.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "logits float32: jax_sce takes" in ended.stdout
    assert "floor, losses on logits: a pass that only negates the logits" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= max(80, len(str(tmp_path)) + 40)
    for packages in report["missing"].values():
        for package in packages:
            assert package in ended.stdout


def made_up(subject, shape, dtype="float32", **more):
    """A row of each of many peers, with figures as wide as they get."""
    return [
        Row(subject, shape, dtype, "value_and_grad", peer, "ok", ratio=12.34, compile_seconds=12.34,
            seconds=Quartiles(1.1111 * i, 1.2222 * i, 1.3333 * i), floor_fraction=3 / i,
            temporary_bytes=2**32 + i * 2**29, peak_bytes=2**33 + i, value_error=1e-7, **more)
        for i, peer in enumerate(("floor", "naive", "jax_sce", "tokamax chunked_xla"), 1)
    ]  # fmt: skip


def test_80_columns_suffice(monkeypatch, capsys):
    cost = Cost(10**12, 10**15, 1234, 12.345, 1.2345, 10**12, 10**12, 123.456)
    rows = [
        *made_up("linear", (32768, 4096, 128256)),
        *made_up("logits", (8192, 128256), machine="h100", cost=cost),
        *made_up("linear", (32768, 4096, 128256), machine="v5p", mesh=(16, 16), cost=cost),
        Row("logits", (8, 10), "float32", "forward", "naive", "wrong", "the value is off"),
    ]
    file = io.StringIO()
    fits = [Fit("jax_sce", "seconds", "V", 1.0)]
    report = Report([], rows, {"linear": ["tokamax", "torch"]}, fits, None, 1.0)
    print_report(Console(file=file, width=80), report)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "time / floor below 1: the pass writes less than the floor does" in text
    assert "8x10, naive: wrong, the value is off" in text

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit):
        parse()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_picture_of_one_size_has_bars_and_of_several_lines(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))

    one = [row for dtype in DTYPES for row in made_up("linear", (512, 64, 8192), dtype)]
    several = [row for n in (64, 128, 256) for row in made_up("logits", (n, 2**14 // n))]
    growing = [row for n in (64, 128) for row in made_up("scaling", (64, 8, n))]
    assert [path.name for path in draw([*one, *several, *growing], tmp_path)] == [
        "logits.png", "linear.png", "scaling.png"
    ]  # fmt: skip
    lines, bars, _ = figures
    peers = {"naive", "jax_sce", "tokamax chunked_xla"}
    time, memory = bars.axes[0], bars.axes[1]
    assert [len(each.patches) for each in (time, memory)] == [3, 3]
    assert {tick.get_text() for tick in time.get_yticklabels()} == peers
    assert [len(line.get_xdata()) for line in time.lines] == [2]  # the floor, across the bars
    for axes in lines.axes:
        assert not axes.patches
        low, high = axes.get_ylim()
        shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
        assert len(shown) > 1
        assert all(len(line.get_xdata()) == 3 for line in axes.lines)
    for figure in figures:
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels[-1].startswith("floor: ")


def test_importing_brings_no_more_than_is_used():
    code = """
import sys
import jax_sce
assert "jax_sce.benchmark" not in sys.modules
import jax_sce.benchmark
print(*{"optax", "rich", "matplotlib", "torch", "tokamax"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "\n"


# -- compiled for machines that are not here -----------------------------------------------------------


@pytest.mark.parametrize(("subject", "mesh"), covering(list(SHAPES), [None, (2, 4)], strength=1))
def test_losses_of_one_s_own_are_compiled(subject, mesh):
    installed(ACCELERATORS["h100"], 8)
    shape = (4096, 64, 8192) if subject == "linear" else (4096, 8192)
    rows = compare(subject, {"mine": LOSSES[subject]}, shapes=[shape], dtypes=["bfloat16"],
                   passes=["forward", "value_and_grad"], peers=["jax_sce"], machines=["h100"],
                   mesh=mesh)  # fmt: skip
    assert [row.peer for row in rows] == ["floor", "jax_sce", "mine"] * 2
    devices = 8 if mesh else 1
    for row, floor in zip(rows, [rows[0]] * 3 + [rows[3]] * 3, strict=True):
        assert (row.status, row.machine, row.mesh, row.seconds) == ("ok", "h100", mesh, None)
        assert row.cost.bytes >= floor.cost.bytes
        assert row.cost.operations >= floor.cost.operations
        assert (row.cost.sent > 0) == (mesh is not None and row is not floor)
        assert row.floor_fraction == pytest.approx(floor.time / row.time)
        if subject == "linear":
            times = 6 if row.pass_name == "value_and_grad" else 2
            work = times * 4096 * 64 * 8192
            assert row.cost.operations == work // devices
            assert row.cost.products == pytest.approx(times / 6)
        else:
            logits = 4096 * 8192 * 2 / devices
            assert row.cost.passes == pytest.approx(row.cost.bytes / logits, rel=1e-6)
    # An argument, the logits' gradient, and what is computed in between.
    assert rows[3].cost.passes == {"linear": None, "distributions": 5}.get(subject, 3)


def test_what_does_not_compile_says_why():
    installed(ACCELERATORS["h100"], 1)

    def broken(logits, labels):
        raise RuntimeError("out of ideas")

    def endless(logits, labels):
        z = jax.lax.while_loop(lambda z: jnp.max(z) > 0, lambda z: jnp.sin(z) - 1, logits)
        return logits_loss(z, labels)

    (_, uneven) = compare("logits", shapes=[(8, 10)], dtypes=["float32"], passes=["forward"],
                          peers=["jax_sce"], machines=["h100"], mesh=(3, 1))  # fmt: skip
    assert "must divide evenly over the mesh, got (8, 10)" in uneven.detail

    rows = compare("logits", {"broken": broken, "endless": endless}, shapes=[(8, 10)],
                   dtypes=["float32"], passes=["forward"], peers=[], machines=["h100"])  # fmt: skip
    assert [(row.peer, row.status, row.detail) for row in rows[1:]] == [
        ("broken", "failed", "RuntimeError: out of ideas"),
        ("endless", "failed", "ValueError: how often one of its loops runs could not be read"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"machines": ["a100"]}, "machines must be among h100, .*, got 'a100'"),
        ({"passes": ["eager_forward"]}, "passes that are compiled cannot be eager_forward"),
        ({"machines": []}, r"machines must be a list of names or None, got \[\]"),
        ({"machines": "h100"}, "machines must be a list of names or None, got 'h100'"),
        ({"machines": None, "mesh": (2, 4)}, "mesh is for machines"),
        ({"mesh": (0, 2)}, "mesh must be two numbers of devices, .* got \\(0, 2\\)"),
    ],
)
def test_bad_arguments_of_what_is_compiled_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare("logits", **{"machines": ["h100"], **arguments})


@pytest.mark.parametrize(("machine", "package"), [("h100", "jax-cuda13-plugin"), ("v5p", "libtpu")])
def test_what_is_not_installed_is_said_with_the_command(machine, package, monkeypatch):
    monkeypatch.setattr(_accelerators, "_has_package", lambda _: False)
    message = f'{machine} needs {package}: python -m pip install -e ".[compiled]"'
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        compare("logits", machines=[machine])


def test_a_bound_is_that_of_the_slower_of_memory_and_products():
    h100 = ACCELERATORS["h100"]
    memory, product = 3.35e12 * 2.0, Product(989e12 * 3.0, "bf16")
    assert h100.seconds([Kernel("a", "fusion", memory, 0)]) == pytest.approx(2)
    assert h100.seconds([Kernel("a", "fusion", memory, 0, (product,))]) == pytest.approx(3)
    twice = Kernel("a", "fusion", 0, memory, times=2)
    assert h100.seconds([twice, Kernel("b", "dot", 0, 0, (product,))]) == pytest.approx(7)
    assert h100.seconds([twice, Kernel("c", "custom-call", 0, 0, opaque=True)]) is None
    exact = Product(918e12, "f32 highest")
    assert ACCELERATORS["v6e"].seconds([Kernel("a", "dot", 0, 0, (exact,))]) == pytest.approx(6)


def test_the_command_compiles(tmp_path):
    installed(ACCELERATORS["h100"], 8)
    command = [sys.executable, "-m", "jax_sce.benchmark", "compiled", "--for", "h100", "--quick",
               "--mesh", "2x4", "--peers", "jax_sce", "--shapes", "4096x8192,4096x64x8192",
               "--json", tmp_path / "report.json", "--plot", tmp_path]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report = valid_report(tmp_path / "report.json")
    assert {(row["subject"], row["machine"]) for row in report["rows"]} == {
        (subject, "h100") for subject in SHAPES
    }
    assert {row["status"] for row in report["rows"]} == {"ok"}
    for name in ("compiled_passes.png", "compiled_head.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "compiled for h100 2x4, each device: linear, bfloat16, value_and_grad" in ended.stdout
