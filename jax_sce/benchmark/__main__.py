"""The command: `python -m jax_sce.benchmark --help`."""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from .._command import (
    Parser,
    check_folder,
    check_known,
    make_console,
    require,
    run,
    showing_progress,
    silence_tokamax,
)
from . import __doc__ as METHOD
from ._accelerators import ACCELERATORS, prepare
from ._cases import DTYPES, PASSES, default_shapes, rank
from ._compare import compare
from ._peers import all_peers, compiled_peers, missing
from ._plot import draw
from ._report import Report, is_right
from ._row import Row
from ._scaling import Fit, full_plan, quick_plan, scaling
from ._small import SHAPES, import_seconds, small
from ._table import print_report

USUAL = ("logits", "distributions", "linear")  # if no subject is named
COMPARED = ("logits", "softcap", "distributions", "linear")  # `compiled` compiles all of them
SUBJECTS = (*COMPARED, "compiled", "scaling", "small")
MACHINES = ("h100", "v5p", "v6e")

ROUNDS, QUICK_ROUNDS = 5, 3
FOLDER = Path("jax_sce-benchmark")  # for the report and the pictures, by default
DESCRIPTION = """\
Measure the losses on this machine, beside those of other libraries. It takes
about five minutes on a CPU, with --quick less than one.

  python -m jax_sce.benchmark
  python -m jax_sce.benchmark linear --shapes 1024x64x32000
  python -m jax_sce.benchmark compiled --for h100

Subjects:
  logits         labels are class ids; logits [N, V]
  distributions  labels are distributions [N, V]
  linear         a fused head: hidden states [N, D] and a kernel [D, V]
  softcap        logits with a soft-cap
  small          small inputs: calls, compilation, import
  scaling        how time and memory of a head grow with N and V
  compiled       nothing is measured: programs are compiled for other machines,
                 and their cost is read from them

The exit status is 1 if a result of jax_sce is wrong or fails."""
QUICK: dict[str, dict[str, Any]] = {
    "logits": {"shapes": [(256, 32000)], "dtypes": ["float32"]},
    "softcap": {"shapes": [(256, 32000)], "dtypes": ["float32"]},
    "distributions": {"shapes": [(256, 32000)], "dtypes": ["float32"]},
    "linear": {"shapes": [(512, 64, 8192)], "dtypes": ["float32"], "passes": ["value_and_grad"]},
}
QUICK_COMPILED: dict[str, Any] = {"dtypes": ["bfloat16"], "passes": ["value_and_grad"]}


def main() -> int:
    require(["optax", "rich", "matplotlib"], "benchmark")
    set_environment()
    args = parse()
    begin = time.perf_counter()
    rows: list[Row] = []
    fits: list[Fit] = []
    import_time = None
    with showing_progress() as show:
        for subject in args.subjects:
            if subject == "compiled":
                found = []
                for each, options in args.compiled.items():
                    found += compare(each, **options, progress=show)
            elif subject == "scaling":
                found, fits = scaling(quick_plan() if args.quick else full_plan(), show)
            elif subject == "small":
                found = small(args.rounds, SHAPES[:1] if args.quick else SHAPES, show)
                show(0, 1, "timing import jax_sce in fresh processes")
                import_time = import_seconds(args.rounds)
            else:
                found = compare(subject, **args.options[subject], progress=show)
            rows += found

    console = make_console()
    report = Report(
        command=sys.argv[1:],
        rows=rows,
        missing=all_missing(args),
        fits=fits,
        import_seconds=import_time,
        wall_seconds=time.perf_counter() - begin,
    )
    print_report(console, report)
    if args.json:
        args.json.write_text(report.to_json())
        console.print(f"Written to {args.json}", markup=False, soft_wrap=True)
    if args.plot:
        for path in draw(rows, args.plot):
            console.print(f"Drawn to {path}", markup=False, soft_wrap=True)
    return 0 if is_right(rows) else 1


def all_missing(args: argparse.Namespace) -> dict[str, list[str]]:
    platform = jax.default_backend()
    absent = {s: missing(all_peers(s, platform)) for s in COMPARED if s in args.subjects}
    if args.compiled:
        pairs = [(s, platform_of(m)) for s in args.compiled for m in args.machines]
        absent["compiled"] = missing([p for s, on in pairs for p in all_peers(s, on) if p.loss])
    return absent


def platform_of(machine: str) -> str:
    return ACCELERATORS[machine].platform


def set_environment() -> None:
    """Must be called before JAX's devices and PyTorch start."""
    # Otherwise idle OpenMP threads of PyTorch would spin on the cores that the next peer needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Otherwise JAX would take most of a GPU's memory, and PyTorch has to run beside it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    silence_tokamax()
    if "compiled" in sys.argv:
        prepare()
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # else XLA logs a line for each operation


# -- the command line --------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m jax_sce.benchmark",
        usage="python -m jax_sce.benchmark [SUBJECT ...] [options]",
        description=DESCRIPTION,
        epilog=METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT",
                        help=f"any of those above; the default is {', '.join(USUAL)}")  # fmt: skip
    parser.add_argument(
        "--shapes", metavar="SHAPES",
        help="measure these shapes: NxV for losses on logits, NxDxV for linear, separated by "
        "commas, for example 1024x32000,512x64x8192",
    )  # fmt: skip
    parser.add_argument("--dtypes", metavar="DTYPES",
                        help=f"measure in these dtypes; the default is {','.join(DTYPES)}")  # fmt: skip
    parser.add_argument(
        "--passes", metavar="PASSES",
        help="measure these passes: forward, the mean loss; value_and_grad, with its gradients; "
        "donated_gradient, the gradient written over the logits; eager_forward, without jax.jit; "
        "the default is all but the last",
    )  # fmt: skip
    parser.add_argument(
        "--peers", metavar="NAMES",
        help="compare only these losses, by the names in the table, separated by commas",
    )  # fmt: skip
    parser.add_argument(
        "--for", dest="machines", metavar="MACHINES",
        help=f"for compiled: the machines, any of {', '.join(ACCELERATORS)}; the default is "
        f"{','.join(MACHINES)}",
    )  # fmt: skip
    parser.add_argument(
        "--mesh", metavar="AxB",
        help="for compiled: A devices split the examples and B the classes; the default is one device",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, metavar="N",
        help=f"time each pass in N rounds; the default is {ROUNDS}, with --quick {QUICK_ROUNDS}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="the same with few small shapes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="FOLDER",
        help="draw pictures into this folder; without --json and --plot the report and the pictures "
        f"go to {FOLDER}/",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        interpret(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def interpret(args: argparse.Namespace) -> None:
    """Replaces the texts of the options by their values.

    Raises:
      ValueError: An option has no such value; the message names it.
    """
    args.shapes = [parse_shape(text) for text in words(args.shapes)]
    args.dtypes = words(args.dtypes)
    check_known("dtypes", args.dtypes, DTYPES)
    args.passes = words(args.passes)
    check_known("passes", args.passes, PASSES["logits"])
    if not args.subjects:
        args.subjects = [s for s in USUAL if not args.shapes or shapes_of(s, args.shapes)]
    check_known("subjects", args.subjects, SUBJECTS)
    is_compiled = "compiled" in args.subjects
    if not is_compiled and (args.machines or args.mesh):
        raise ValueError("--for and --mesh are for compiled")
    if is_compiled and "eager_forward" in args.passes:
        raise ValueError("--passes: eager_forward is not compiled")
    args.machines = words(args.machines) or list(MACHINES)
    check_known("--for", args.machines, ACCELERATORS)
    args.mesh = parse_mesh(args.mesh) if args.mesh else None
    platforms = [jax.default_backend(), *map(platform_of, args.machines if is_compiled else ())]
    names = dict.fromkeys(p.name for s in COMPARED for on in platforms for p in all_peers(s, on))
    args.peers = words(args.peers)
    check_known("peers", args.peers, names)
    if args.rounds is None:
        args.rounds = QUICK_ROUNDS if args.quick else ROUNDS
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    args.options = {s: compare_options(args, s) for s in COMPARED if s in args.subjects}
    args.compiled = compiled_options(args) if is_compiled else {}
    try:
        for machine in args.machines if is_compiled else ():
            ACCELERATORS[machine].devices(math.prod(args.mesh or (1,)))
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from None
    selects = args.shapes or args.dtypes or args.passes or args.peers
    if selects and not args.options and not args.compiled:
        known = ", ".join((*COMPARED, "compiled"))
        raise ValueError(f"--shapes, --dtypes, --passes and --peers are for {known}")
    if not args.json and not args.plot:
        FOLDER.mkdir(exist_ok=True)
        args.json, args.plot = FOLDER / "report.json", FOLDER
    check_folder("--json", args.json)
    if args.plot and args.plot.exists() and not args.plot.is_dir():
        raise ValueError(f"--plot: {args.plot} is not a folder")


def compare_options(args: argparse.Namespace, subject: str) -> dict[str, Any]:
    """The arguments of `compare` for a subject that is measured here."""
    peers = [peer.name for peer in all_peers(subject, jax.default_backend())]
    usual = QUICK[subject] if args.quick else {"peak": True}
    return {**usual, **selected(args, subject, peers), "rounds": args.rounds}


def compiled_options(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The arguments of `compare` for each subject that `compiled` compiles and that has the options."""
    options = {}
    for subject in COMPARED:
        usual: dict[str, Any] = {}
        if args.quick:
            usual = QUICK_COMPILED | {"shapes": default_shapes(subject, "accelerator")[:1]}
        peers = [x for m in args.machines for x in compiled_peers(subject, platform_of(m))]
        try:
            usual |= selected(args, subject, peers)
        except ValueError:
            continue
        options[subject] = usual | {"machines": args.machines, "mesh": args.mesh}
    if not options:
        raise ValueError("--shapes, --passes and --peers: none of the subjects of compiled has all")
    return options


def selected(args: argparse.Namespace, subject: str, peers: Sequence[str]) -> dict[str, Any]:
    """The shapes, passes, peers and dtypes that were asked for and that the subject has."""
    asked = {
        "shapes": (args.shapes, shapes_of(subject, args.shapes)),
        "passes": (args.passes, [p for p in args.passes if p in PASSES[subject]]),
        "peers": (args.peers, [name for name in dict.fromkeys(peers) if name in args.peers]),
    }
    for name, (given, fitting) in asked.items():
        if given and not fitting:
            raise ValueError(f"--{name}: none of these is for {subject}")
    found = {name: fitting for name, (given, fitting) in asked.items() if given}
    return found | ({"dtypes": args.dtypes} if args.dtypes else {})


def shapes_of(subject: str, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shape for shape in shapes if len(shape) == rank(subject)]


def words(text: str | None) -> list[str]:
    return text.split(",") if text else []


def parse_mesh(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)):
        raise ValueError(f"--mesh must be like 2x4, got {text!r}")
    return int(found[1]), int(found[2])


def parse_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", text):
        raise ValueError(f"shapes must be like 1024x32000 or 512x64x8192, got {text!r}")
    return tuple(map(int, text.split("x")))


if __name__ == "__main__":
    run(main)
