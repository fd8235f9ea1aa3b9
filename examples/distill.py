"""Teaches a small language model by a larger one, with jax_sce's labels for distillation.

    pip install -e ".[examples]"
    python examples/distill.py

The teacher is the transformer of `train_language_model.py`, trained on the Python standard library
and cached. Three students of an eighth of its size start from the same parameters, see the same
batches and call the same loss, `linear_softmax_cross_entropy`. Only its `labels` differ:

- hard labels: the tokens of the text, from which the teacher learned too;
- teacher: `Teacher(hidden, kernel)`, the teacher's whole distribution, without the logits of
  either model;
- top 16: `Sparse(ids, values)`, the teacher's likeliest tokens, few enough to store.

A table compares how well the students predict held-out text and how far from the teacher they end,
and `distill.png` draws the perplexity by step. A second table compares the memory of the loss and
its gradients with `Teacher` and in plain JAX, which holds the logits of both models. Ctrl-C keeps
the curves so far.

Time: one to two minutes on two free CPU cores. The first run spends half of it on the teacher;
later runs find the teacher in the cache. `--quick` does all of it, much smaller, in half a minute.
"""

from __future__ import annotations

import common  # first, because of Ctrl-C

# isort: split
import dataclasses
import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_language_model as language
from common import BLUE, GREEN, VERMILION
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.table import Table
from train_language_model import Config, Corpus, History, Transformer

from jax_sce import Sparse, Teacher, linear_softmax_cross_entropy

TEACHER = Config(vocabulary=4096, steps=300, evaluations=5)
STUDENT = dataclasses.replace(TEACHER, width=32, depth=1, steps=200, evaluations=10)
QUICK_TEACHER = dataclasses.replace(language.QUICK, steps=100)
QUICK_STUDENT = dataclasses.replace(QUICK_TEACHER, width=32, depth=1, steps=60, evaluations=6)


# --- the teacher ---------------------------------------------------------------------------------


def load_teacher(config: Config, corpus: Corpus, seed: int, console: Console) -> Transformer:
    """The teacher. The first call trains it."""
    # As with the text, the name of the cache depends on all that the teacher depends on.
    text = hashlib.sha256(corpus.training.tobytes()).hexdigest()
    key = hashlib.sha256(repr((config, seed, text)).encode()).hexdigest()
    root = common.cache_folder()
    cache = root / f"teacher-{key[:16]}.npz"

    with console.status("Making the teacher"):
        teacher = Transformer(config, nnx.Rngs(seed))
    if cache.is_file():
        structure = jax.tree.structure(nnx.state(teacher, nnx.Param))
        with np.load(cache) as saved:
            leaves = jax.device_put(list(saved.values()))
        nnx.update(teacher, jax.tree.unflatten(structure, leaves))
        return teacher

    common.check_cache()
    console.print("The teacher learns, in the first run only:")
    history = History([], {}, [])
    language.train(teacher, corpus, language.fused_loss, config, seed, console, history)
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        unfinished = Path(temporary) / "teacher.npz"
        np.savez(unfinished, *jax.tree.leaves(nnx.state(teacher, nnx.Param)))
        unfinished.replace(cache)
    return teacher


# --- the labels ----------------------------------------------------------------------------------
# Windows [B, T + 1] give B x T examples: all tokens but the first are labels.

Labels = Array | Teacher | Sparse
TOP = 16


def hard_labels(teacher: Transformer, windows: Array) -> Labels:
    return windows[:, 1:]


def teacher_labels(teacher: Transformer, windows: Array) -> Labels:
    kernel = teacher.embedding.embedding[...].T
    return Teacher(teacher.hidden(windows[:, :-1]), kernel, divergence=True)


def top_labels(teacher: Transformer, windows: Array) -> Labels:
    """The TOP likeliest tokens; the token of the text gets the rest of the probability.

    Without the rest a student learns that other tokens never occur, and ends at a perplexity of
    625, far behind hard labels (arXiv:2503.16870 explains why). The token of the text may be one of
    the TOP: the values of a class that occurs twice add up.
    """

    def top(hidden: Array) -> tuple[Array, Array]:
        return jax.lax.top_k(jax.nn.softmax(teacher.logits(hidden)), TOP)

    # One sequence at a time, to save memory.
    values, ids = jax.lax.map(top, teacher.hidden(windows[:, :-1]))
    rest = 1 - values.sum(-1, keepdims=True)
    return Sparse(
        jnp.concatenate([ids, windows[:, 1:, None]], -1), jnp.concatenate([values, rest], -1)
    )


LABELS: dict[str, Callable[[Transformer, Array], Labels]] = {
    "hard labels": hard_labels,
    "teacher": teacher_labels,
    f"top {TOP}": top_labels,
}


# --- the students --------------------------------------------------------------------------------


def mean_loss(student: Transformer, windows: Array, labels: Labels) -> Array:
    kernel = student.embedding.embedding[...].T
    hidden = student.hidden(windows[:, :-1])
    return linear_softmax_cross_entropy(hidden, kernel, labels, reduction="mean")


@partial(nnx.jit, static_argnames="name", donate_argnames=("student", "optimizer"))
def train_step(
    student: Transformer,
    optimizer: nnx.Optimizer,
    teacher: Transformer,
    windows: Array,
    name: str,
) -> Array:
    """One update of the student from windows [B, T + 1]; returns the loss before it."""
    labels = LABELS[name](teacher, windows)
    value, gradient = nnx.value_and_grad(mean_loss)(student, windows, labels)
    optimizer.update(student, gradient)
    return value


@nnx.jit
def divergence(student: Transformer, teacher: Transformer, windows: Array) -> Array:
    """The mean divergence from the teacher over windows [batches, B, T + 1]."""

    def mean(batch: Array) -> Array:
        return mean_loss(student, batch, teacher_labels(teacher, batch))

    return jax.lax.map(mean, windows).mean()


Perplexity = dict[int, float]  # of the held-out text, by the number of steps before it


class Student(NamedTuple):
    """Measurements of one student."""

    perplexity: Perplexity
    divergence: float  # from the teacher, at the end
    milliseconds: float  # of a step, including the teacher's part


def teach(
    teacher: Transformer,
    corpus: Corpus,
    held_out: np.ndarray,
    config: Config,
    seed: int,
    console: Console,
    perplexity: dict[str, Perplexity],
) -> dict[str, Student]:
    """Trains the students and fills the perplexities, which the caller has even after Ctrl-C."""
    seconds: dict[str, list[float]] = {name: [] for name in LABELS}
    draws = np.random.default_rng(seed)
    with common.progress_bar(console) as progress:
        task = progress.add_task("making three students", total=config.steps)
        students = {name: Transformer(config, nnx.Rngs(seed)) for name in LABELS}
        optimizers = {name: language.make_optimizer(s, config) for name, s in students.items()}
        for step in range(1, config.steps + 1):
            batch = language.random_windows(corpus.training, draws, config)
            # In turns, so that other work on the machine slows down all of them alike.
            for name, student in students.items():
                if step == 1:
                    progress.update(task, description=f"compiling the step with {name}")
                start = time.perf_counter()
                train_step(student, optimizers[name], teacher, batch, name).block_until_ready()
                seconds[name].append(time.perf_counter() - start)
                if language.is_evaluated(step, config):
                    loss = language.evaluate(student, held_out, language.fused_loss)
                    perplexity[name][step] = math.exp(loss)
            progress.update(task, advance=1)
            if step == 1:
                progress.update(task, description="training")
            if language.is_evaluated(step, config):
                now = ", ".join(f"{p[step]:,.0f}" for p in perplexity.values())
                progress.update(task, description=f"{', '.join(LABELS)}:\nperplexity {now}")
    with console.status("Computing the students' divergences from the teacher"):
        return {
            name: Student(
                perplexity[name],
                float(divergence(student, teacher, held_out)),
                1000 * statistics.median(seconds[name]),
            )
            for name, student in students.items()
        }


# --- the memory ----------------------------------------------------------------------------------


class Head(NamedTuple):
    tokens: int
    student: int  # features
    teacher: int  # features
    classes: int


def fused_divergence(hidden: Array, kernel: Array, of_teacher: Array, its_kernel: Array) -> Array:
    labels = Teacher(of_teacher, its_kernel, divergence=True)
    return linear_softmax_cross_entropy(hidden, kernel, labels, reduction="mean")


def plain_divergence(hidden: Array, kernel: Array, of_teacher: Array, its_kernel: Array) -> Array:
    log_predictions = jax.nn.log_softmax(hidden @ kernel)
    log_targets = jax.nn.log_softmax(of_teacher @ its_kernel)
    return optax.losses.kl_divergence_with_log_targets(log_predictions, log_targets).mean()


def mebibytes(loss: Callable[..., Array], head: Head) -> float:
    """The temporary memory of the compiled loss and the student's gradients. Nothing is run."""
    shapes = [
        (head.tokens, head.student),
        (head.student, head.classes),
        (head.tokens, head.teacher),
        (head.teacher, head.classes),
    ]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def show_memory(heads: list[Head]) -> Table:
    table = Table(title="Temporary memory of the divergence and its gradients")
    for heading in ("tokens", "classes", "features", "teacher's", "plain JAX", "Teacher"):
        table.add_column(heading, justify="right")
    for head in heads:
        table.add_row(
            f"{head.tokens:,}",
            f"{head.classes:,}",
            f"{head.student:,}",
            f"{head.teacher:,}",
            f"{mebibytes(plain_divergence, head):,.0f} MiB",
            f"{mebibytes(fused_divergence, head):,.0f} MiB",
        )
    return table


# --- the report ----------------------------------------------------------------------------------


def show(students: dict[str, Student], teacher: float) -> Table:
    table = Table("labels", title="Three students on held-out text")
    for heading in ("perplexity", "divergence from teacher", "median step"):
        table.add_column(heading, justify="right")
    for name, student in students.items():
        table.add_row(
            name,
            f"{list(student.perplexity.values())[-1]:,.1f}",
            f"{student.divergence:.3f}",
            f"{student.milliseconds:,.0f} ms",
        )
    table.add_section()
    table.add_row("the teacher itself", f"{teacher:,.1f}")
    return table


def draw(path: Path, perplexities: dict[str, Perplexity], teacher: float, config: Config) -> None:
    """Draws the perplexity of each student by step, and the teacher's."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.axhline(teacher, color="0.3", linestyle="--")
    style = dict(textcoords="offset points", va="center")
    axes.annotate(f"the teacher itself: {teacher:,.0f}", (0, teacher), (4, 8), **style)

    styles = dict(zip(perplexities, ((VERMILION, "s"), (BLUE, "o"), (GREEN, "^")), strict=True))
    lowest_label = math.inf
    for name in sorted(perplexities, key=lambda name: -list(perplexities[name].values())[-1]):
        color, marker = styles[name]
        steps, perplexity = zip(*perplexities[name].items(), strict=True)
        axes.plot(steps, perplexity, color=color, marker=marker)
        lowest_label = min(perplexity[-1], 0.94 * lowest_label)  # below the last label, not on it
        label = f"{name}: {perplexity[-1]:,.0f}"
        axes.annotate(
            label, (steps[-1], lowest_label), (9, 0), color=color, weight="bold",
            bbox=dict(color="white", pad=1), **style,
        )  # fmt: skip

    axes.set_xlim(0, 1.25 * config.steps)  # room for the labels
    axes.set_xticks([0, *steps])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_locator(NullLocator())
    common.tidy(axes)
    axes.set(
        title="One student, one text, three kinds of labels",
        xlabel=f"step, of {config.batch * config.context:,} tokens",
        ylabel="perplexity of held-out text, per token",
    )
    figure.savefig(path)


def main() -> None:
    parser = common.make_parser(__doc__, "much smaller models and text, for half a minute")
    parser.add_argument(
        "--seed",
        type=common.seed,
        default=0,
        help="seed of the models and the batches (default: 0)",
    )
    args = parser.parse_args()
    path = common.picture(parser, args, "distill", "quick", "seed")
    console = Console()

    configs = (QUICK_TEACHER, QUICK_STUDENT) if args.quick else (TEACHER, STUDENT)
    with console.status("Reading the standard library; the first run encodes it"):
        corpus = language.load_corpus(configs[0])
    # A short text can be too short for a large vocabulary.
    classes = corpus.tokenizer.get_vocab_size()
    large, small = (dataclasses.replace(config, vocabulary=classes) for config in configs)
    starts = language.held_out_starts(corpus.validation, small)
    held_out = language.windows_at(corpus.validation, starts, small)

    teacher = load_teacher(large, corpus, args.seed, console)
    with console.status("Validating the teacher"):
        itself = math.exp(language.evaluate(teacher, held_out, language.fused_loss))
    console.print("The students learn, in turns:")
    perplexity: dict[str, Perplexity] = {name: {} for name in LABELS}
    try:
        # Another seed, so that the students' batches are not the teacher's.
        students = teach(teacher, corpus, held_out, small, args.seed + 1, console, perplexity)
    except KeyboardInterrupt:
        if not all(perplexity.values()):
            raise
        path = common.of_stopped(path)
        draw(path, perplexity, itself, small)
        raise KeyboardInterrupt(f"Stopped. The curves so far: {path}") from None
    console.print(show(students, itself))
    here = Head(small.batch * small.context, small.width, large.width, classes)
    with console.status("Compiling the divergence, to read its memory"):
        memory = show_memory([here, Head(8192, 1024, 4096, 131072)])
    console.print(memory)
    draw(path, perplexity, itself, small)
    print(f"Drawn to {path}")


if __name__ == "__main__":
    main()
