"""Kills runs of `examples/train_on_a_mesh.py` and starts them again: `python tests/kills.py`.

It prints how many runs of one process and of two resumed bit for bit: one process gets SIGKILL at a
random moment, and the losses of all steps still equal those of an undisturbed run. Steps after the last
checkpoint count as lost and are done again. If there is a second process, it ends by itself, as on a
cluster. It takes some five minutes.
"""

import contextlib
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from train_tiny import SIZES

MESH, EVERY, STEPS = "data=2,model=2", 6, SIZES["steps"]
TIMEOUT = 120  # seconds, after which a run is ended


@contextlib.contextmanager
def running(work: Path, *options: str) -> Iterator[subprocess.Popen]:
    """A run whose output is one stream. In the end all its processes are killed."""
    script = Path(__file__).with_name("train_tiny.py")
    usual = ("--quick", f"--mesh={MESH}", f"--out={work}")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    # Compilation takes most of the time.
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), *usual, *options],
        env=environment | {"XDG_CACHE_HOME": str(work)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(TIMEOUT, end)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        end()
        process.wait()
        process.stdout.close()


def finish(work: Path, *options: str) -> str:
    """The output of an undisturbed run."""
    with running(work, *options) as process:
        output = process.stdout.read()
        if process.wait():
            raise RuntimeError(f"The run exited with {process.returncode}:\n{output}")
    return output


def losses(output: str) -> dict[int, str]:
    found = re.findall(r"^step (\d+): loss (\S+)$", output, re.MULTILINE)
    return {int(step): loss for step, loss in found}


class Killed(NamedTuple):
    output: str  # of process 0
    survivor: str  # the output of the process that was not killed, if there is one
    seconds: float  # from the kill until all processes had ended


def kill(work: Path, folder: Path, processes: int, draws: random.Random) -> Killed:
    """Kills one of the processes of a run, soon after a random step."""
    options = [f"--checkpoints={folder}", f"--every={EVERY}", f"--processes={processes}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{free.getsockname()[1]}"
    step, victim = draws.randrange(1, STEPS // 2), draws.randrange(processes)
    with contextlib.ExitStack() as stack:
        runs = []
        for i in range(processes):
            role = [coordinator, f"--process-id={i}"] if processes > 1 else []
            runs.append(stack.enter_context(running(work, *options, *role)))
        output = ""
        for line in runs[0].stdout:
            output += line
            if line.startswith(f"step {step}:"):
                break
        time.sleep(draws.uniform(0, 0.02))  # anywhere in a step, or in a checkpoint
        runs[victim].send_signal(signal.SIGKILL)
        start = time.perf_counter()
        outputs = [output + runs[0].stdout.read(), *(run.stdout.read() for run in runs[1:])]
        codes = [run.wait() for run in runs]
        seconds = time.perf_counter() - start
    if codes[victim] != -signal.SIGKILL or 0 in codes:
        raise RuntimeError(f"The processes exited with {codes}:\n{''.join(outputs)}")
    return Killed(outputs[0], "".join(outputs[1 - victim : 2 - victim]), seconds)


class Resumed(NamedTuple):
    same: bool  # all losses, before the kill and after it, equal those of an undisturbed run
    lost: int  # the number of steps after the last checkpoint


def resume(work: Path, folder: Path, processes: int, killed: str, undisturbed: str) -> Resumed:
    options = [f"--checkpoints={folder}", f"--every={EVERY}", f"--processes={processes}"]
    output = finish(work, *options)
    found = re.search(r"Resumed after step (\d+)", output)
    resumed = int(found[1]) if found else 0
    before, after, want = losses(killed), losses(output), losses(undisturbed)
    same = (
        sorted(after) == list(range(resumed + 1, STEPS + 1))
        and max(before) >= resumed
        and before == {step: want[step] for step in before}
        and after == {step: want[step] for step in after}
        and summary(output) == summary(undisturbed)
    )
    return Resumed(same, max(before) - resumed)


def summary(output: str) -> list[str]:
    """The figures of the whole history, whose first part a resumed run reads from the checkpoint."""
    return re.findall(r"^ *(?:training|validation) loss .*$", output, re.MULTILINE)


def main() -> None:
    draws = random.Random()
    print(
        "| processes | kills | resumed bit for bit | steps lost, mean | most "
        "| seconds until all had ended, most |"
    )
    print("|--:|--:|--:|--:|--:|--:|")
    for processes, count in ((1, 10), (2, 5)):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            undisturbed = finish(work, f"--processes={processes}")
            killed, resumed = [], []
            for i in range(count):
                killed.append(kill(work, work / str(i), processes, draws))
                arguments = (work, work / str(i), processes, killed[-1].output, undisturbed)
                resumed.append(resume(*arguments))
        lost = [r.lost for r in resumed]
        print(
            f"| {processes} | {count} | {sum(r.same for r in resumed)} | {statistics.fmean(lost):.1f} | "
            f"{max(lost)} | {max(k.seconds for k in killed):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
