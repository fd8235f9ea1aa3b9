"""Train the language model over a mesh of devices, in one process or in many.

    pip install -e ".[examples]"
    python examples/train_on_a_mesh.py --mesh data=2,model=4
    python examples/train_on_a_mesh.py --mesh data=2,model=4 --processes 2

The model, the text and the curves are those of `train_language_model.py`; what changes is the mesh.
Its axis `data` splits the examples, `model` the classes, which are the rows of the tied embedding;
an axis that is left out is 1. The loss is the fused head under `jax_sce.shard`, and the rest runs
under plain `jax.jit` with `NamedSharding`. Where there are only CPUs, each device is a virtual one.

`--processes 2` starts two processes of this script on this machine, each with half of the devices,
which talk over loopback: to try it out. On a cluster, start it once on every host,

    python examples/train_on_a_mesh.py --mesh data=8,model=8 --processes 16 \\
        --coordinator host0:1234 --process-id 0 --checkpoints /shared/run

where each host has its own `--process-id`, from 0, the mesh has as many devices as all of them
together, and every host has the same Python, whose library is the text.

`--checkpoints FOLDER` keeps the state of the training there, on a file system that all processes
see, after every `--every` steps. The same command starts again where the last checkpoint stands,
whatever ended the run before: the same batches follow, and on the same mesh and processes the same
losses, bit by bit. It may be another mesh, too, if the vocabulary divides evenly over both.

A process that is lost ends the others with a message: those of `--processes` alone at once; on a
cluster as soon as a connection to it breaks, or else when nothing was heard of it for HEARTBEAT
seconds.

`--quick` runs all of it, much smaller. Progress is shown live on a terminal, else as a line for
each step; the picture is `mesh.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import train_language_model as language
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from rich.console import Console
from train_language_model import Config, Corpus, History, Loss, Transformer

import jax_sce

AXES = ("data", "model")
LAUNCHER = "TRAIN_ON_A_MESH_LAUNCHER"  # its process, for those that it starts
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost


# --- the loss and the layout ---------------------------------------------------------------------


def pad(config: Config, vocabulary: int, mesh: Mesh) -> Config:
    """Gives the embedding so many rows that they divide evenly over `model`."""
    parts = mesh.shape["model"]
    return dataclasses.replace(config, vocabulary=math.ceil(vocabulary / parts) * parts)


def make_loss(mesh: Mesh, vocabulary: int) -> Loss:
    """The fused head on the mesh. Rows of the embedding beyond the vocabulary are absent classes:
    their bias is -inf."""
    head = jax_sce.shard(jax_sce.linear_softmax_cross_entropy, mesh, batch="data", classes="model")

    def loss(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> jax.Array:
        there = jnp.arange(len(embedding)) < vocabulary
        bias = None if len(embedding) == vocabulary else jnp.where(there, 0.0, -jnp.inf)
        return head(hidden, embedding.T, labels, bias=bias, reduction="mean")

    return loss


def layout(state: Any, mesh: Mesh) -> Any:
    """Where the arrays of a state live: the rows of the embedding and of its moments over `model`,
    all else whole on every device."""

    def place(path: Any, _: jax.Array) -> NamedSharding:
        split = "embedding" in jax.tree_util.keystr(path)
        return NamedSharding(mesh, P("model") if split else P())

    return jax.tree.map_with_path(place, state)


def keep_layout(model: Transformer, optimizer: nnx.Optimizer, mesh: Mesh) -> None:
    state = nnx.state((model, optimizer))
    state = jax.lax.with_sharding_constraint(state, layout(state, mesh))
    nnx.update((model, optimizer), state)


@partial(nnx.jit, static_argnums=(0, 1, 2))
def create(config: Config, seed: int, mesh: Mesh) -> tuple[Transformer, nnx.Optimizer]:
    """A new model and its optimizer. Each device makes its own part: none holds the whole."""
    model = Transformer(config, nnx.Rngs(seed))
    optimizer = language.make_optimizer(model, config)
    keep_layout(model, optimizer, mesh)
    return model, optimizer


@partial(nnx.jit, static_argnames=("loss", "mesh"), donate_argnames=("model", "optimizer"))
def train_step(
    model: Transformer, optimizer: nnx.Optimizer, windows: jax.Array, loss: Loss, mesh: Mesh
) -> jax.Array:
    value = language.train_step(model, optimizer, windows, loss)
    keep_layout(model, optimizer, mesh)
    return value


def windows_on(mesh: Mesh, tokens: np.ndarray, starts: np.ndarray, config: Config) -> jax.Array:
    """The windows that start there, [..., B, T + 1], as an array split over `data`. A process reads
    those of its own devices only."""
    spec = P(*[None] * (starts.ndim - 1), "data")
    return jax.make_array_from_callback(
        (*starts.shape, config.context + 1),
        NamedSharding(mesh, spec),
        lambda index: language.windows_at(tokens, starts[index[:-1]], config),
    )


# --- checkpoints ---------------------------------------------------------------------------------


def open_checkpoints(folder: Path) -> ocp.CheckpointManager:
    """Saves in the background, and a checkpoint is there when it is complete, or not at all."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    state: nnx.State,
    draws: np.random.Generator,
    history: History,
    settings: dict[str, Any],
) -> None:
    run = {
        "settings": settings,
        "draws": draws.bit_generator.state,  # the position in the data
        "history": history._asdict(),
    }
    items = {"state": ocp.args.StandardSave(state), "run": ocp.args.JsonSave(run)}
    checkpoints.save(step, args=ocp.args.Composite(**items))


def restore(
    checkpoints: ocp.CheckpointManager, state: nnx.State, settings: dict[str, Any]
) -> tuple[nnx.State, dict[str, Any], History]:
    """The last checkpoint's state, laid out as `state` is, the state of its draws and its history."""
    step = checkpoints.latest_step()
    read = partial(checkpoints.restore, step)
    run = read(args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    for name, value in settings.items():
        if run["settings"][name] != value:
            raise SystemExit(
                f"--checkpoints {checkpoints.directory} holds a run of "
                f"{name}={run['settings'][name]}, not {value}: give another folder"
            )
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, state)
    state = read(args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
    history = History(**run["history"])
    validation = {int(step): loss for step, loss in history.validation.items()}
    return state, run["draws"], history._replace(validation=validation)


# --- training ------------------------------------------------------------------------------------


def train(
    corpus: Corpus,
    config: Config,
    mesh: Mesh,
    seed: int,
    console: Console,
    folder: Path | None = None,
    every: int = 0,
) -> History:
    """Trains on the mesh, after the last checkpoint in the folder if there is one."""
    size = corpus.tokenizer.get_vocab_size()
    config, loss = pad(config, size, mesh), make_loss(mesh, size)
    starts = language.held_out_starts(corpus.validation, config)
    held_out = windows_on(mesh, corpus.validation, starts, config)

    model, optimizer = create(config, seed, mesh)
    draws = np.random.default_rng(seed)
    settings = dataclasses.asdict(config) | {"seed": seed}
    checkpoints = open_checkpoints(folder) if folder else None
    if checkpoints and checkpoints.latest_step() is not None:
        state = nnx.state((model, optimizer))
        state, draws.bit_generator.state, history = restore(checkpoints, state, settings)
        nnx.update((model, optimizer), state)
        console.print(f"Resumed after step {checkpoints.latest_step()}")
    else:
        history = History([], {0: float(language.evaluate(model, held_out, loss))}, [])

    with language.progress_bar(console) as progress:
        done = len(history.training)
        task = progress.add_task("compiling", total=config.steps, completed=done)
        for step in range(done + 1, config.steps + 1):
            # Every process draws all of the batch, as one alone would, and reads its own part.
            starts = language.random_starts(corpus.training, draws, config)
            batch = windows_on(mesh, corpus.training, starts, config)
            start = time.perf_counter()
            # Reading the loss waits for the step to end, as the clock must.
            history.training.append(float(train_step(model, optimizer, batch, loss, mesh)))
            history.seconds.append(time.perf_counter() - start)
            if language.is_evaluated(step, config):
                history.validation[step] = float(language.evaluate(model, held_out, loss))
            if checkpoints and (step % every == 0 or step == config.steps):
                state = nnx.state((model, optimizer))
                save(checkpoints, step, state, draws, history, settings)
            progress.update(task, advance=1, description=language.describe(history, config))
            if not console.is_terminal:  # nine digits tell every float32 from every other
                console.print(f"step {step}: loss {history.training[-1]:.9g}")
    if checkpoints:
        checkpoints.close()  # waits for what is being saved
    return history


# --- processes -----------------------------------------------------------------------------------


def start_processes(count: int, resumable: bool) -> None:
    """Runs this script in so many processes on this machine; where one is lost, ends the others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process-id"]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, LAUNCHER: str(os.getpid())}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    processes: list[subprocess.Popen] = []
    codes: list[int | None] = [None]
    try:
        for i in range(count):
            # The others have nothing to tell but how Gloo fares.
            stdout = subprocess.DEVNULL if i else None
            processes.append(subprocess.Popen([*command, str(i)], env=environment, stdout=stdout))
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        # A signal, which is negative, comes first: who fails upon it exits with 1.
        code, i = min((code, i) for i, code in enumerate(codes) if code)
        how = f"exited with {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        raise SystemExit(f"Process {i} {how}, and the others were ended. {advice(resumable)}")


def end_with_launcher() -> None:
    """Ends this process when the one that started it is gone, however that ended."""
    if launcher := os.environ.get(LAUNCHER):

        def watch() -> None:
            while os.getppid() == int(launcher):
                time.sleep(0.5)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def advice(resumable: bool) -> str:
    if resumable:
        return "The same command goes on after the last checkpoint."
    return "Nothing is left of the run: --checkpoints would keep its state."


def make_mesh(sizes: dict[str, int]) -> Mesh:
    count, devices = math.prod(sizes.values()), jax.devices()
    if count != len(devices) and (count > len(devices) or jax.process_count() > 1):
        raise SystemExit(
            f"--mesh must have as many devices as there are, {len(devices)} of "
            f"{devices[0].platform}, got {count}"
        )
    axes = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(axes, AXES, axis_types=(AxisType.Auto,) * 2)


def parse_mesh(text: str) -> dict[str, int]:
    try:
        pairs = [(axis, int(size)) for axis, size in (part.split("=") for part in text.split(","))]
    except ValueError:
        pairs = []
    sizes = dict(pairs)
    if not pairs or len(sizes) < len(pairs) or set(sizes) - set(AXES) or min(sizes.values()) < 1:
        raise argparse.ArgumentTypeError(f"must be as data=2,model=4, got {text!r}")
    return sizes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--mesh", type=parse_mesh, default="data=2,model=4", metavar="AXIS=SIZE,..."
    )
    parser.add_argument("--processes", type=int, default=1, help="on this machine, or in all")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs")
    parser.add_argument("--process-id", type=int, help="of this process, from 0")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="kept and resumed there")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--quick", action="store_true", help="all of it, much smaller")
    parser.add_argument("--steps", type=int, help="updates of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()

    for name in ("processes", "every", "steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if (args.coordinator is None) != (args.process_id is None):
        parser.error("--coordinator and --process-id must be given together")
    if args.process_id is not None and not 0 <= args.process_id < args.processes:
        parser.error(
            f"--process-id must be less than --processes, {args.processes}, got {args.process_id}"
        )
    args.devices = math.prod(args.mesh.values())
    if args.devices % args.processes:
        parser.error(
            f"--mesh must divide evenly over the {args.processes} processes, got {args.devices}"
        )
    args.config = language.QUICK if args.quick else Config()
    if args.steps is not None:
        args.config = dataclasses.replace(args.config, steps=args.steps)
    if args.config.batch % args.mesh.get("data", 1):
        parser.error(
            f"--mesh must divide the {args.config.batch} sequences of a batch evenly over data, "
            f"got data={args.mesh['data']}"
        )
    return args


def main() -> None:
    args = parse_arguments()
    resumable = args.checkpoints is not None
    if args.processes > 1 and args.coordinator is None:
        return start_processes(args.processes, resumable)

    end_with_launcher()
    # Before the backend starts. Of other platforms the devices are what they are.
    jax.config.update("jax_num_cpu_devices", args.devices // args.processes)
    if args.coordinator is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    mesh = make_mesh(args.mesh)
    console = Console(quiet=jax.process_index() > 0)
    began = time.perf_counter()

    try:
        with console.status("Reading the standard library"):
            corpus = language.load_corpus(args.config)
        run = (args.seed, console, args.checkpoints, args.every)
        history = train(corpus, args.config, mesh, *run)
    except Exception:
        if args.processes == 1:
            raise
        traceback.print_exc()
        lost = f"Process {args.process_id} failed, or lost another: see above."
        print(lost, advice(resumable), file=sys.stderr, flush=True)
        os._exit(1)  # An orderly exit would wait for the others.
    if args.coordinator is not None:
        jax.distributed.shutdown()  # all together, while process 0 has yet to draw
    if console.quiet:
        return

    path = args.out / "mesh.png"
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    title = f"A transformer learns Python on a mesh ({shape})"
    config = dataclasses.replace(args.config, vocabulary=corpus.tokenizer.get_vocab_size())
    language.draw(path, history, config, title)
    language.show_figures({
        "mesh": f"{shape}, in {args.processes} process{'es' * (args.processes > 1)}",
        **language.figures(history, config, time.perf_counter() - began),
        "curves": str(path),
    })  # fmt: skip


if __name__ == "__main__":
    main()
