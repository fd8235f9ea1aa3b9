"""The example on a mesh: the curve of one device, in one process and in two, whatever kills a run."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("tokenizers")
pytest.importorskip("orbax.checkpoint")

import kills
import train_language_model as language
import train_on_a_mesh
from flax import nnx
from jax.sharding import PartitionSpec as P
from rich.console import Console
from train_tiny import SIZES

CONFIG = language.Config(**SIZES)
pytestmark = pytest.mark.usefixtures("lax_promotion")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder for the runs, which read one copy of the text."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(work):
    """What a run prints that is left alone, by its number of processes."""
    return {processes: kills.finish(work, f"--processes={processes}") for processes in (1, 2)}


@pytest.fixture(scope="module")
def one_device(work):
    """The losses of `train_language_model.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(work))
        corpus = language.load_corpus(CONFIG)
    model = language.Transformer(CONFIG, nnx.Rngs(0))
    history = language.History([], {}, [])
    language.train(model, corpus, language.fused_loss, CONFIG, 0, Console(quiet=True), history)
    return history


@pytest.mark.parametrize("processes", [1, 2])
def test_the_curve_is_that_of_one_device(processes, undisturbed, one_device):
    got = [float(loss) for loss in kills.losses(undisturbed[processes]).values()]
    # Sums over devices are taken in another order, and training goes on from there: 2e-7 was seen.
    np.testing.assert_allclose(got, one_device.training, rtol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_as_if_nothing_had_been(processes, work, undisturbed):
    folder, seed = work / f"killed-{processes}", random.randrange(2**32)
    print("seed", seed)  # of the step and the moment
    killed = kills.kill(work, folder, processes, random.Random(seed))
    if processes == 2:
        # A connection broke; or else, as in the midst of a checkpoint, JAX missed its heartbeat.
        assert re.search("or lost another|another task died", killed.survivor)
        assert killed.seconds < 2 * train_on_a_mesh.HEARTBEAT
    resumed = kills.resume(work, folder, processes, killed.output, undisturbed[processes])
    assert resumed.same
    assert resumed.lost <= 3 * kills.EVERY  # one checkpoint may be on its way to the disk


LAUNCHED = """
import os, sys, time
sys.path.insert(0, {folder!r})
import train_on_a_mesh
if "--process-id" not in sys.argv:
    train_on_a_mesh.start_processes(2, resumable=True)
train_on_a_mesh.end_with_launcher()
open(sys.argv[-1] + ".pid", "w").write(str(os.getpid()))
{then}
time.sleep(100)
"""


def launched(folder, then):
    """A launcher whose processes each do that."""
    script = folder / "launched.py"
    examples = str(Path(train_on_a_mesh.__file__).parent)
    script.write_text(LAUNCHED.format(folder=examples, then=then))
    return subprocess.Popen([sys.executable, script], cwd=folder, stderr=subprocess.PIPE, text=True)


def test_a_process_that_is_lost_ends_those_started_with_it(tmp_path):
    then = "if sys.argv[-1] == '1': os.kill(os.getpid(), 9)"
    with launched(tmp_path, then) as launcher:
        _, told = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert told.startswith("Process 1 was ended by SIGKILL, and the others were ended. ")


def test_a_launcher_that_is_lost_ends_those_that_it_started(tmp_path):
    files = [tmp_path / f"{i}.pid" for i in range(2)]
    with launched(tmp_path, "pass") as launcher:
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        launcher.kill()
        wait_until(lambda: not any(is_alive(int(file.read_text())) for file in files))


def wait_until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_device_holds_its_rows_of_the_embedding():
    mesh = train_on_a_mesh.make_mesh({"data": 2, "model": 2})
    config = train_on_a_mesh.pad(CONFIG, CONFIG.vocabulary, mesh)
    assert config.vocabulary == CONFIG.vocabulary + 1
    model, optimizer = train_on_a_mesh.create(config, 0, mesh)
    leaves = dict(nnx.to_flat_state(nnx.state((model, optimizer))))
    split = {path for path, leaf in leaves.items() if leaf[...].sharding.spec == P("model")}
    assert split == {path for path in leaves if "embedding" in path}
    assert len(split) == 3  # the embedding and its two moments


def test_checkpoints_of_other_settings_are_not_taken(tmp_path):
    checkpoints = train_on_a_mesh.open_checkpoints(tmp_path)
    state, draws = {"x": np.zeros(2)}, np.random.default_rng(0)
    history = language.History([], {}, [])
    train_on_a_mesh.save(checkpoints, 3, state, draws, history, {"width": 16, "seed": 0})
    checkpoints.wait_until_finished()
    with pytest.raises(SystemExit, match="holds a run of seed=0, not 1: give another folder"):
        train_on_a_mesh.restore(checkpoints, state, {"width": 16, "seed": 1})
    checkpoints.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh data=2;model=4", "argument --mesh: must be like data=2,model=4, got 'data=2;model=4'"),
        ("--mesh data=2,tensor=4", "argument --mesh: must be like data=2,model=4"),
        ("--mesh data=2,data=4", "argument --mesh: must be like data=2,model=4"),
        ("--mesh data=0", "argument --mesh: must be like data=2,model=4"),
        ("--mesh data=3", "--mesh must divide the 8 sequences of a batch evenly over data, got data=3"),
        ("--mesh model=3 --processes 2", "--mesh must divide evenly over the 2 processes, got 3"),
        ("--processes 0", "argument --processes: must be a whole number of at least 1, got '0'"),
        ("--every 3", "--every needs --checkpoints"),
        (f"--checkpoints {__file__}", f"--checkpoints must be a folder to write into, got {__file__}"),
        ("--process-id 0", "--coordinator and --process-id must be given together"),
        ("--coordinator host:1 --process-id 1", "--process-id must be less than --processes, 1, got 1"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_on_a_mesh.py", *arguments.split()])
    with pytest.raises(SystemExit):
        train_on_a_mesh.parse_arguments()
    assert message in capsys.readouterr().err


def test_a_mesh_of_more_devices_than_there_are():
    with pytest.raises(SystemExit, match="--mesh must have as many devices as there are, 8 of cpu"):
        train_on_a_mesh.make_mesh({"model": 16})
