"""Trains the language model on a mesh of devices, in one process or in many.

    pip install -e ".[examples]"
    python examples/train_on_a_mesh.py --mesh data=2,model=4
    python examples/train_on_a_mesh.py --mesh data=2,model=4 --processes 2

The model, the text and the curves are those of `train_language_model.py`. The mesh axis `data` splits
the examples, and `model` splits the classes, which are the rows of the tied embedding; an axis that
is not given has size 1. The loss is the fused head under `jax_sce.shard`, and all else runs under
plain `jax.jit` with `NamedSharding`. On a machine without accelerators the devices are virtual CPUs.

`--processes 2` tries out several processes: it starts this script twice on this machine, each with
half of the devices. On a cluster, start the script once on every host:

    python examples/train_on_a_mesh.py --mesh data=8,model=8 --processes 16 \\
        --coordinator host0:1234 --process-id 0 --checkpoints /shared/run

Each host gets its own `--process-id`, from 0. The mesh has as many devices as all hosts together,
and every host needs the same Python, because its library is the text.

`--checkpoints FOLDER` saves the state of the training after every `--every` steps, in a folder that
all processes can reach. However a run ended, the same command resumes after its last checkpoint: it
sees the same batches and, on the same mesh and processes, gets the same losses bit for bit. The mesh
may also change, if the padded vocabulary stays the same.

If a process is lost, the others end with a message: with `--processes` alone at once; on a cluster
when a connection to the lost process breaks, or after HEARTBEAT seconds without a sign of life.

Ctrl-C keeps the checkpoints, and in a single process the curve so far. `--quick` does all of it, much
smaller. A terminal shows the progress; other outputs get a line for each step. The picture is
`mesh-data=2,model=4.png`, named by its mesh.
"""

from __future__ import annotations

import common  # first, because of Ctrl-C

# isort: split
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
LAUNCHER = "TRAIN_ON_A_MESH_LAUNCHER"  # an environment variable: the process that started this one
HEARTBEAT = 30  # a process counts as lost after so many seconds without a sign of life
EVERY = 20  # steps between two checkpoints


# --- the loss and the layout ---------------------------------------------------------------------


def pad(config: Config, vocabulary: int, mesh: Mesh) -> Config:
    """Pads the embedding with rows until they divide evenly over `model`."""
    parts = mesh.shape["model"]
    return dataclasses.replace(config, vocabulary=math.ceil(vocabulary / parts) * parts)


def make_loss(mesh: Mesh, vocabulary: int) -> Loss:
    """The fused head on the mesh. The padding of the embedding gets a bias of -inf: these classes
    do not count."""
    head = jax_sce.shard(jax_sce.linear_softmax_cross_entropy, mesh, batch="data", classes="model")

    def loss(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> jax.Array:
        there = jnp.arange(len(embedding)) < vocabulary
        bias = None if len(embedding) == vocabulary else jnp.where(there, 0.0, -jnp.inf)
        return head(hidden, embedding.T, labels, bias=bias, reduction="mean")

    return loss


def layout(state: Any, mesh: Mesh) -> Any:
    """The shardings of a state: the rows of the embedding and of its moments over `model`, all else
    replicated."""

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
    """A new model and its optimizer. Each device makes only its own part."""
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
    """The windows at these starts, [..., B, T + 1], as an array split over `data`. A process reads
    only those of its own devices."""
    spec = P(*[None] * (starts.ndim - 1), "data")
    return jax.make_array_from_callback(
        (*starts.shape, config.context + 1),
        NamedSharding(mesh, spec),
        lambda index: language.windows_at(tokens, starts[index[:-1]], config),
    )


# --- checkpoints ---------------------------------------------------------------------------------


def open_checkpoints(folder: Path) -> ocp.CheckpointManager:
    """Saves in the background. An incomplete checkpoint is never read."""
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
    """From the last checkpoint: the state, sharded like `state`, the state of the draws, and the
    history."""
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
    history: History,
    checkpoints: ocp.CheckpointManager | None,
    every: int,
) -> None:
    """Trains on the mesh, after the last checkpoint if there is one. Fills the history, which the
    caller has even after Ctrl-C."""
    size = corpus.tokenizer.get_vocab_size()
    config, loss = pad(config, size, mesh), make_loss(mesh, size)
    starts = language.held_out_starts(corpus.validation, config)
    held_out = windows_on(mesh, corpus.validation, starts, config)

    with console.status("Compiling the model and the optimizer"):
        model, optimizer = create(config, seed, mesh)
    draws = np.random.default_rng(seed)
    settings = dataclasses.asdict(config) | {"seed": seed}
    if checkpoints and checkpoints.latest_step() is not None:
        with console.status("Reading the last checkpoint"):
            state = nnx.state((model, optimizer))
            state, draws.bit_generator.state, before = restore(checkpoints, state, settings)
            nnx.update((model, optimizer), state)
        history.training.extend(before.training)
        history.validation.update(before.validation)
        history.seconds.extend(before.seconds)
        console.print(f"Resumed after step {checkpoints.latest_step()}")

    with common.progress_bar(console) as progress:
        done = len(history.training)
        task = progress.add_task("compiling the validation", total=config.steps, completed=done)
        if not done:
            history.validation[0] = float(language.evaluate(model, held_out, loss))
        progress.update(task, description="compiling the training step")
        for step in range(done + 1, config.steps + 1):
            # Every process draws the starts of the whole batch, and reads its own part of it.
            starts = language.random_starts(corpus.training, draws, config)
            batch = windows_on(mesh, corpus.training, starts, config)
            start = time.perf_counter()
            # float() waits for the end of the step, as the clock needs it.
            history.training.append(float(train_step(model, optimizer, batch, loss, mesh)))
            history.seconds.append(time.perf_counter() - start)
            if language.is_evaluated(step, config):
                history.validation[step] = float(language.evaluate(model, held_out, loss))
            if checkpoints and (step % every == 0 or step == config.steps):
                state = nnx.state((model, optimizer))
                save(checkpoints, step, state, draws, history, settings)
            progress.update(task, advance=1, description=language.describe(history, config))
            if not console.is_terminal:  # nine digits tell any two float32 apart
                console.print(f"step {step}: loss {history.training[-1]:.9g}")
    if checkpoints:
        checkpoints.close()  # waits until the last one is saved


# --- processes -----------------------------------------------------------------------------------


def start_processes(count: int, resumable: bool) -> None:
    """Runs this script in several processes on this machine. If one is lost, ends the others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process-id"]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, LAUNCHER: str(os.getpid())}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    # A terminal sends Ctrl-C to all processes. Only this one answers: the others inherit that they
    # ignore it.
    answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes: list[subprocess.Popen] = []
    codes: list[int | None] = [None]
    try:
        for i in range(count):
            # The others would only print messages of Gloo.
            stdout = subprocess.DEVNULL if i else None
            processes.append(subprocess.Popen([*command, str(i)], env=environment, stdout=stdout))
        signal.signal(signal.SIGINT, answer)
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped. {advice(resumable)}") from None
    finally:
        for process in processes:  # all before waiting, so that none reports that it lost another
            process.kill()
        for process in processes:
            process.wait()
    if any(codes):
        # The code of a signal is negative and comes first. Processes that fail after it exit with 1.
        code, i = min((code, i) for i, code in enumerate(codes) if code)
        how = f"exited with {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        raise SystemExit(f"Process {i} {how}, and the others were ended. {advice(resumable)}")


def end_with_launcher() -> None:
    """Ends this process when the one that started it has ended for any reason."""
    if launcher := os.environ.get(LAUNCHER):

        def watch() -> None:
            while os.getppid() == int(launcher):
                time.sleep(0.5)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def advice(resumable: bool) -> str:
    if resumable:
        return "The same command resumes after the last checkpoint."
    return "The state is lost: --checkpoints would keep it."


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
        raise argparse.ArgumentTypeError(f"must be like data=2,model=4, got {text!r}")
    return sizes


def parse_arguments() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "a much smaller model and text")
    parser.add_argument(
        "--mesh", type=parse_mesh, default="data=2,model=4", metavar="AXIS=SIZE,...",
        help="devices for the examples (data) and for the classes (model) (default: data=2,model=4)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=common.whole_number(1), default=1, metavar="COUNT",
        help="processes: all are started here, unless --coordinator is given (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT",
        help="where process 0 of a cluster runs (default: none; needs --process-id)",
    )  # fmt: skip
    parser.add_argument(
        "--process-id", type=common.whole_number(0), metavar="NUMBER",
        help="which process of the cluster this is, from 0 (default: none; needs --coordinator)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER",
        help="where to save the training, and resume it if the folder has a checkpoint "
        "(default: none is saved)",
    )  # fmt: skip
    parser.add_argument(
        "--every", type=common.whole_number(1), metavar="STEPS",
        help=f"steps between two checkpoints (default: {EVERY}; needs --checkpoints)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=common.whole_number(1),
        help=f"steps of the training (default: {Config.steps}, or {language.QUICK.steps} with "
        "--quick)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=common.seed, default=0, help="seed of the model and the batches (default: 0)"
    )
    args = parser.parse_args()

    if (args.coordinator is None) != (args.process_id is None):
        parser.error("--coordinator and --process-id must be given together")
    if args.process_id is not None and args.process_id >= args.processes:
        parser.error(
            f"--process-id must be less than --processes, {args.processes}, got {args.process_id}"
        )
    if args.every is not None and args.checkpoints is None:
        parser.error("--every needs --checkpoints")
    args.every = args.every or EVERY
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
    if args.checkpoints is not None:
        common.check_folder("--checkpoints", args.checkpoints)
    axes = ",".join(f"{axis}={size}" for axis, size in args.mesh.items())
    settings = ("processes", "quick", "steps", "seed")
    args.picture = common.picture(parser, args, f"mesh-{axes}", *settings)
    return args


def main() -> None:
    args = parse_arguments()
    resumable = args.checkpoints is not None
    if args.processes > 1 and args.coordinator is None:
        return start_processes(args.processes, resumable)

    end_with_launcher()
    # Before the backend starts. It only applies to CPUs.
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
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    title = f"A transformer learns Python on a mesh ({shape})"
    config, history, checkpoints = args.config, History([], {}, []), None

    try:
        with console.status("Reading the standard library; the first run encodes it"):
            corpus = language.load_corpus(config)
        config = dataclasses.replace(config, vocabulary=corpus.tokenizer.get_vocab_size())
        if resumable:
            checkpoints = open_checkpoints(args.checkpoints)
        train(corpus, config, mesh, args.seed, console, history, checkpoints, args.every)
    except KeyboardInterrupt:
        if args.processes > 1:
            print(f"Stopped. {advice(resumable)}", file=sys.stderr, flush=True)
            os._exit(130)  # An orderly exit would wait for the other processes.
        if checkpoints:
            checkpoints.close()  # waits until the last one is saved
        language.stopped(args.picture, history, config, title, f" {advice(resumable)}")
    except Exception:
        if args.processes == 1:
            raise
        traceback.print_exc()
        lost = f"Process {args.process_id} failed, or lost another: see above."
        print(lost, advice(resumable), file=sys.stderr, flush=True)
        os._exit(1)  # An orderly exit would wait for the other processes.
    if args.coordinator is not None:
        jax.distributed.shutdown()  # all processes together, before process 0 draws
    if console.quiet:
        return

    language.draw(args.picture, history, config, title)
    language.show_figures({
        "mesh": f"{shape}, in {args.processes} process{'es' * (args.processes > 1)}",
        **language.figures(history, config, time.perf_counter() - began),
        "curves": str(args.picture),
    })  # fmt: skip


if __name__ == "__main__":
    main()
