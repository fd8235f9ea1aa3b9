"""The peak of resident memory, of one run in a fresh process.

In a process that has done other work the peak would be that of the other work, and memory that was freed
and kept would hide what is used again. So a child compiles one pass of one peer, runs it for a few
examples, which loads what code and libraries it needs, sets the peak back (Linux only), and runs it
once. What counts is the peak less what was resident before: temporaries and results, not the arguments.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax

from ._cases import Case
from ._machine import proc_field
from ._peers import choose

_RESET = Path("/proc/self/clear_refs")  # writing "5" sets VmHWM to VmRSS
_STATUS = "/proc/self/status"


def peak_bytes(case: Case, pass_name: str, peer: str) -> int | None:
    """None where the system does not tell, or the child fails."""
    if not _RESET.exists():
        return None
    job = json.dumps([case.subject, case.shape, case.dtype, pass_name, peer])
    command = [sys.executable, "-c", f"from {__name__} import main; main()", job]
    # Blocks of this size and more go back to the system as soon as they are freed, so that what was
    # resident before is the arguments, and no heap that the run could take for nothing.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return int(ended.stdout.split()[-1]) if ended.returncode == 0 else None


def _resident(field: str) -> int:
    kibibytes = proc_field(_STATUS, field)
    assert kibibytes is not None
    return int(kibibytes.split()[0]) * 1024


def _settled() -> int:
    """What is resident once other threads have freed what making the arguments took."""
    before, now = -1, _resident("VmRSS")
    while now != before:
        time.sleep(0.1)
        before, now = now, _resident("VmRSS")
    return now


def main() -> None:
    subject, shape, dtype, pass_name, name = json.loads(sys.argv[1])
    (peer,) = choose(subject, jax.default_backend(), [name], {})
    small = Case(subject, (8, *shape[1:-1], min(shape[-1], 1024)), dtype)
    peer.program(small, pass_name).start(small.arrays())()

    case = Case(subject, tuple(shape), dtype)
    run = peer.program(case, pass_name).start(case.arrays())
    before = _settled()
    _RESET.write_text("5")
    run()
    print(_resident("VmHWM") - before)
