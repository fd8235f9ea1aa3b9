"""`assert_matches_reference` passes right losses and fails the mistakes that others made; the
reproductions, the command and the tables of the conformance suite."""

import code
import functools
import io
import re
import shlex
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from support import BOTH, DENSE, INTEGER, cotangents, covering, one_hot, rng

from jax_sce._command import require, showing_progress
from jax_sce.testing import (
    Report,
    Result,
    __main__ as command,
    assert_matches_reference,
    collectives,
    conformance,
)
from jax_sce.testing.__main__ import cannot_call, parse
from jax_sce.testing._candidate import Candidate
from jax_sce.testing._peers import PEERS, report_of
from jax_sce.testing._promises import PROMISES
from jax_sce.testing._table import markdown, print_report, print_side_by_side

N, V = 6, 5
LOGITS = rng(60).normal(size=(N, V)).astype(np.float32)
IDS = np.array([0, 4, 1, 1, 3, 2], np.int32)
DISTRIBUTIONS = rng(61).random((N, V)).astype(np.float32)
OPTIONS = {
    "plain": {},
    "all": {
        "label_smoothing": 0.1,
        "class_weights": np.linspace(0.5, 2, V).astype(np.float32),
        "z_loss": 0.1,
        "softcap": 3.0,
    },
}


@pytest.mark.parametrize(
    ("kind", "options", "dtype"), covering(list(BOTH), list(OPTIONS), ["float32", "bfloat16"])
)
def test_ours_match(kind, options, dtype):
    options = OPTIONS[options]
    labels = IDS if kind == "integer" else DISTRIBUTIONS
    loss = functools.partial(BOTH[kind], **options)
    assert_matches_reference(loss, jnp.asarray(LOGITS, dtype), labels, **options)


def test_ours_match_in_forward_mode_and_in_float64(x64):
    for kind, labels in (("integer", IDS), ("dense", DISTRIBUTIONS.astype(np.float64))):
        loss = functools.partial(BOTH[kind], forward_mode=True)
        assert_matches_reference(loss, LOGITS.astype(np.float64), labels, rtol=1e-12)


def test_confident_rows_match():
    logits = np.array([[12.0, 0, 1], [17.0, 0, -3], [1e6 + 2, 1e6 - 1, 1e6]], np.float32)
    assert_matches_reference(INTEGER, logits, np.zeros(3, np.int32))
    assert_matches_reference(DENSE, logits, one_hot(np.zeros(3, int), 3))


def test_optax_matches_where_it_does_not_cancel(lax_promotion):
    theirs = optax.softmax_cross_entropy_with_integer_labels
    assert_matches_reference(jax.jit(theirs), LOGITS, IDS)
    assert_matches_reference(jax.jit(optax.softmax_cross_entropy), LOGITS, DISTRIBUTIONS)


# -- mistakes ------------------------------------------------------------------------------------


def rule(forward, backward):
    """A loss of ids whose derivative by the logits is `backward(logits, labels, g)`."""

    @jax.custom_vjp
    def loss(logits, labels):
        return forward(logits, labels)

    loss.defvjp(
        lambda z, y: (forward(z, y), (z, y)), lambda kept, g: (backward(*kept, g[:, None]), None)
    )
    return loss


def normalizer(z):
    return jax.nn.logsumexp(z, axis=-1)


def picked(z, y):
    return jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]


def usual(z, y):
    return normalizer(z) - picked(z, y)


def one_hots(z, y):
    return jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)


def gradient(z, y, g):
    return g * (jax.nn.softmax(z) - one_hots(z, y))


def with_z_loss(z, y):
    return usual(z, y) + 0.1 * normalizer(z) ** 2


def capped(z):
    return 3 * jnp.tanh(z / 3)


def smooth(z, y):
    return 0.9 * usual(z, y) + 0.1 * (normalizer(z) - z.mean(-1))


CONFIDENT = np.array([[17.0, 0, -3], [0.0, 15.0, 3]], np.float32)
IDS2 = np.array([0, 1], np.int32)

MISTAKES = {
    "cotangent ignored": (rule(usual, lambda z, y, g: gradient(z, y, 1 + 0 * g)), {}, None),
    "cotangent averaged": (rule(usual, lambda z, y, g: gradient(z, y, g.mean())), {}, None),
    "cotangent of the z-loss dropped": (rule(with_z_loss, gradient), {"z_loss": 0.1}, None),
    "slope of the soft-cap dropped": (
        rule(lambda z, y: usual(capped(z), y), lambda z, y, g: gradient(capped(z), y, g)),
        {"softcap": 3.0},
        None,
    ),
    "smoothing not in the gradient": (rule(smooth, gradient), {"label_smoothing": 0.1}, None),
    "smoothing over the other classes": (
        lambda z, y: smooth(z, y) * 1.02,
        {"label_smoothing": 0.1},
        None,
    ),
    "value cancels": (rule(usual, gradient), {}, (CONFIDENT, IDS2)),
    "gradient cancels": (
        rule(INTEGER, lambda z, y, g: g * (jax.nn.softmax(z) - one_hots(z, y))),
        {},
        (CONFIDENT, IDS2),
    ),
    "-1 is the last class": (
        rule(lambda z, y: usual(z, y % V), lambda z, y, g: gradient(z, y % V, g)),
        {},
        (LOGITS, np.array([0, -1, 1, 1, 3, 2], np.int32)),
    ),
    "16 bits kept": (
        lambda z, y: usual(z, y),
        {},
        (jnp.asarray(LOGITS, jnp.bfloat16), IDS),
    ),
    "padding counted": (
        lambda z, y: usual(jnp.pad(z, ((0, 0), (0, 3))), y),
        {},
        None,
    ),
    "gradient off by a hundred-thousandth": (
        rule(usual, lambda z, y, g: gradient(z, y, g) * (1 + 1e-5)),
        {},
        None,
    ),
    "wrong shape": (lambda z, y: usual(z, y)[:, None], {}, None),
    "a mean": (lambda z, y: usual(z, y).mean(), {}, None),
}


@pytest.mark.parametrize(("loss", "options", "data"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_fails(loss, options, data, lax_promotion):
    logits, labels = (LOGITS, IDS) if data is None else data
    with pytest.raises((AssertionError, IndexError)):
        assert_matches_reference(jax.jit(loss), logits, labels, **options)


def dense_with(by_logits, by_labels):
    @jax.custom_vjp
    def loss(z, y):
        return optax.softmax_cross_entropy(z, y)

    loss.defvjp(
        lambda z, y: (loss(z, y), (z, y)),
        lambda kept, g: (g[:, None] * by_logits(*kept), g[:, None] * by_labels(*kept)),
    )
    return loss


def minus_log_softmax(z, y):
    del y
    return -jax.nn.log_softmax(z)


@pytest.mark.parametrize(
    ("by_logits", "by_labels"),
    [
        pytest.param(lambda z, y: jax.nn.softmax(z) - y, minus_log_softmax, id="mass forgotten"),
        pytest.param(
            lambda z, y: jax.nn.softmax(z) * y.sum(-1, keepdims=True) - y,
            lambda z, y: jnp.zeros_like(y),
            id="labels' cotangent dropped",
        ),
    ],
)
def test_a_mistake_with_distributions_fails(by_logits, by_labels, lax_promotion):
    with pytest.raises(AssertionError):
        assert_matches_reference(dense_with(by_logits, by_labels), LOGITS, DISTRIBUTIONS)


def test_the_message_says_what_differs_and_in_which_mode():
    with pytest.raises(AssertionError, match=r"loss \(eager\).*relative error of"):
        assert_matches_reference(lambda z, y: INTEGER(z, y) * 1.001, LOGITS, IDS)

    def only_wrong_under_jit(z, y):
        traced = isinstance(z, jax.core.Tracer) and not hasattr(z, "primal")
        return INTEGER(z, y) * (1.5 if traced else 1.0)

    with pytest.raises(AssertionError, match=r"\((jit|vmap)\)"):
        assert_matches_reference(only_wrong_under_jit, LOGITS, IDS)


def test_a_tolerance_can_be_given():
    def off(z, y):
        return INTEGER(z, y) * (1 + 1e-4)

    assert_matches_reference(off, LOGITS, IDS, rtol=1e-3)
    with pytest.raises(AssertionError):
        assert_matches_reference(off, LOGITS, IDS, rtol=1e-5)
    assert np.unique(cotangents(N)).size > 1


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("%b = f32[64]{0} all-gather(%a), dimensions={0}", 256),
        ("%b = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), dimensions={0}", 256),
        ("%b = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a)", 32),
        ("%b = f32[8]{0} all-reduce-start(%a), to_apply=%add", 32),
        ("%b = f32[1]{0} reduce-scatter(%a), to_apply=%add", 32),
        ("%b = f8e4m3fn[64]{0} all-gather(%a)", 64),
        ("%b = f32[8]{0} ragged-all-to-all(%a)", 32),
    ],
)
def test_collectives_counts_all_that_is_sent(line, size):
    class Program:
        def as_text(self):
            return f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n  {line}\n}}"

    (found,) = collectives(Program())
    assert (found.bytes, found.in_loop) == (size, False)


# -- the conformance suite's reproductions -------------------------------------------------------------


USUAL = "jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]"
HEAD = USUAL.replace("logits", "(hidden @ kernel)")
WIDENED = HEAD.replace("hidden @ kernel", "hidden @ kernel.astype(jnp.float32)")

# The kind, the loss, and promises that it breaks.
BROKEN = {
    "each": ("integer", f"lambda logits, labels: {USUAL}",
             ["confident rows", "bad labels", "residuals", "bad input"]),
    "a mean": ("integer", f"lambda logits, labels: jnp.mean({USUAL})",
               ["confident rows", "residuals"]),
    "a scaled mean": ("integer", f"lambda logits, labels: 1.01 * jnp.mean({USUAL})",
                      ["uneven batches"]),
    "a mean with weights": (
        "integer", f"lambda logits, labels, weights=1: jnp.sum({USUAL} * weights) / len(labels)",
        ["weights of zero"],
    ),
    "raises": ("integer", f"lambda logits, labels: {USUAL} if len(labels) == 3 else 1 / 0",
               ["jit", "vmap"]),
    "a head": ("linear", f"lambda hidden, kernel, labels: {HEAD}",
               ["confident rows", "residuals", "memory"]),
    "a head's mean": ("linear", f"lambda hidden, kernel, labels: jnp.mean({HEAD})",
                      ["confident rows", "residuals"]),
    "a widened head": ("linear", f"lambda hidden, kernel, labels: {WIDENED}", ["products"]),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "loss", "promises"), BROKEN.values(), ids=BROKEN)
def test_a_reproduction_pasted_into_python_shows_the_failure(
    kind, loss, promises, capsys, lax_promotion
):
    source = f"loss = jax.jit({loss})"
    names = {"jax": jax, "jnp": jnp}
    exec(source, names)
    report = conformance(names["loss"], kind, promises=promises, source=source)
    assert [result.promise for result in report.broken] == promises
    for result in report.broken:
        lines = result.reproduce.splitlines()
        for line in lines:  # an interactive prompt takes each line as it comes
            assert code.compile_command(line)
        call, _, comment = lines[-1].partition("  # ")
        assert call.startswith("print(")
        if comment.startswith("raises "):
            with pytest.raises(Exception, match=re.escape(comment.partition(": ")[2])):
                exec(result.reproduce, {})
            continue
        exec(result.reproduce, {})
        printed = capsys.readouterr().out.strip()
        if comment.startswith("gives "):
            assert comment.startswith(f"gives {printed}, expected ")
        else:
            assert comment.endswith(": accepted, expected an error")


def test_a_mean_gets_the_mask_of_each_example():
    @jax.jit
    def mean(logits, labels, *, where=None):
        return INTEGER(logits, labels, where=where, reduction="mean")

    assert conformance(mean, promises=["masked rows"]).holds


def test_the_shown_number_is_the_faulty_one():
    report = conformance(
        lambda z, y: INTEGER(z, y) * jnp.where(jnp.arange(len(y)) == 4, 1.5, 1), promises=["values"]
    )
    assert report["values"].detail.startswith("[4] gives ")
    assert "print(loss(logits, labels)[4])  # gives " in report["values"].reproduce


# -- the command ---------------------------------------------------------------------------------------


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["testing", *map(str, arguments)])
    return parse()


@pytest.mark.parametrize(
    ("address", "kind", "hint"),
    [
        ("optax:softmax_cross_entropy", "integer", "It works with --kind dense"),
        ("optax:softmax_cross_entropy_with_integer_labels", "dense", "works with --kind integer"),
        ("jax_sce:linear_softmax_cross_entropy", "integer", "It works with --kind linear"),
        ("{folder}/losses.py:head", "integer", "--kind linear --arguments hidden,labels,kernel.T"),
        ("{folder}/losses.py:nothing_like_it", "integer", None),
    ],
)
def test_a_wrong_kind_is_recognised(address, kind, hint, tmp_path, lax_promotion):
    (tmp_path / "losses.py").write_text(
        "import jax_sce\n"
        "def head(x, labels, embedding):\n"
        "    return jax_sce.linear_softmax_cross_entropy(x, embedding.T, labels)\n"
        "def nothing_like_it(x):\n"
        "    return x\n"
    )
    candidate = Candidate(address.format(folder=tmp_path), kind)
    with pytest.raises((TypeError, ValueError)) as raised:
        report_of(candidate, "loss")
    text = cannot_call(candidate, raised.value)
    assert f"called with kind {kind}, raises {type(raised.value).__name__}" in text
    assert hint in text if hint else "It works" not in text
    kind_alone = hint is not None and "--arguments" not in hint
    assert hasattr(raised.value, "__notes__") == kind_alone


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("losses.py", "the loss must be like module:function or file.py:function, got"),
        ("gone.py:loss", "there is no file"),
        ("losses.py:gone", "does not define 'gone'"),
        ("losses.py:number", "must be callable, got int"),
        ("broken.py:loss", "cannot be imported: out of ideas"),
        ("losses:loss", "there is no file"),
    ],
)
def test_a_file_is_refused_in_one_line(loss, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "losses.py").write_text("number = 3\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('out of ideas\\nand of lines')\n")
    with pytest.raises(SystemExit) as ended:
        parsed(monkeypatch, tmp_path / loss)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_file_with_any_name_is_accepted(tmp_path, monkeypatch):
    file = tmp_path / "my-losses.py"
    file.write_text("from jax_sce import softmax_cross_entropy_with_integer_labels as loss\n")
    candidate = parsed(monkeypatch, f"{file}:loss", "--set", "z_loss=0.5").candidate
    names = {}
    exec(candidate.source, names)
    with jax.numpy_dtype_promotion("standard"):
        assert names["loss"](LOGITS, IDS).tolist() == INTEGER(LOGITS, IDS, z_loss=0.5).tolist()
    assert "weights" in candidate.loaded.options


def test_a_loss_has_the_same_verdict_alone_and_in_the_table(monkeypatch, lax_promotion):
    for peer in PEERS:
        if peer.installed:
            assert (
                parsed(monkeypatch, *shlex.split(peer.candidate.options)).candidate
                == peer.candidate
            )
    (peer,) = (peer for peer in PEERS if peer.name == "optax dense")
    monkeypatch.setattr(command, "PEERS", [peer])
    promises = ["absent classes", "one class"]
    (in_the_table,) = command.known_losses(promises, lambda *step: None)
    alone = parsed(monkeypatch, *shlex.split(peer.candidate.options)).candidate
    assert report_of(alone, peer.name, promises) == in_the_table
    (broken,) = in_the_table.broken
    assert "safe_softmax_cross_entropy" in broken.documented


def test_progress_names_the_compiling():
    steps = []
    conformance(INTEGER, promises=["one class", "jit"], progress=lambda *step: steps.append(step))
    assert steps == [
        (0, 2, "compiling the first call"),
        (0, 2, "compiling and checking: one class"),
        (1, 2, "compiling and checking: jit"),
    ]


def test_progress_is_lines_outside_a_terminal(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with showing_progress() as show:
        for second, text in enumerate(["a", "b", "c", "d", "e", "f", "g"]):
            clock[0] = second
            show(second, 7, text)
    assert capsys.readouterr().err == "[0/7] a\n[5/7] f\n"


def test_a_missing_package_is_said_with_the_command():
    with pytest.raises(SystemExit) as ended:
        require(["jax", "no_such_package"], "testing")
    assert (
        ended.value.code
        == 'no_such_package is not installed: python -m pip install -e ".[testing]"'
    )


def synthetic(name):
    results = [
        Result(p.name, p.says, ["pass", "fail", "fail", "not applicable"][i % 4], 1e-9, 1e-5,
               "gives 1.23456789, expected 2.3456789", p.broken, "print(loss(logits))",
               "its documentation says so" if i % 4 == 2 else "")
        for i, p in enumerate(PROMISES)
    ]  # fmt: skip
    return Report(name, "integer", tuple(results))


def test_80_columns_suffice(monkeypatch, capsys):
    file = io.StringIO()
    console = Console(file=file, width=80)
    print_report(console, synthetic("my_package.losses:softmax_cross_entropy_with_integer_labels"))
    print_side_by_side(console, [synthetic(peer.name) for peer in PEERS])
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "(no)" in text
    for promise in PROMISES:
        assert promise.name in text

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--help")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_table_of_a_page_has_a_row_for_each_broken_promise():
    lines = markdown([synthetic("a"), synthetic("b")]).splitlines()
    assert lines[0] == "| | a | b |"
    assert lines[2:4] == ["| gradients | no | no |", "| cotangents | documented | documented |"]
    assert lines[-1].startswith("Kept wherever they apply: values, ")
