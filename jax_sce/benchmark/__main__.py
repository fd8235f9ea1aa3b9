"""The command: `python -m jax_sce.benchmark --help`."""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from .._command import check_folder, check_known, is_installed, make_console, silence_tokamax
from . import __doc__ as METHOD
from ._cases import DTYPES, PASSES, rank
from ._compare import Row, compare
from ._peers import all_peers, missing
from ._plot import draw
from ._report import Report, is_right
from ._scaling import Fit, full_plan, quick_plan, scaling
from ._small import import_seconds, small
from ._table import print_report

NEEDED = ("optax", "rich", "matplotlib")  # by the command

COMPARED = ("logits", "distributions", "linear")  # the subjects that the options are for
SUBJECTS = (*COMPARED, "scaling", "small")

ROUNDS, QUICK_ROUNDS = 5, 3
FOLDER = Path("jax_sce-benchmark")  # where the report and the pictures go if nobody says
QUICK: dict[str, dict[str, Any]] = {
    "logits": {"shapes": [(256, 32000)], "dtypes": ["float32"]},
    "distributions": {"shapes": [(256, 32000)], "dtypes": ["float32"]},
    "linear": {"shapes": [(512, 64, 8192)], "dtypes": ["float32"], "passes": ["value_and_grad"]},
}


def main() -> int:
    if absent := [name for name in NEEDED if not is_installed(name)]:
        sys.exit(f'{", ".join(absent)} must be installed: pip install "jax_sce[benchmark]"')
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    set_environment()
    args = parse()
    console = make_console()
    begin = time.perf_counter()
    rows: list[Row] = []
    fits: list[Fit] = []
    import_time = None
    columns = [BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, transient=True
    ) as progress:
        task = progress.add_task("starting", total=None)

        def show(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)

        for subject in args.subjects:
            if subject == "scaling":
                found, fits = scaling(quick_plan() if args.quick else full_plan(), show)
            elif subject == "small":
                found = small(args.rounds, show)
                progress.update(task, description="import jax_sce")
                import_time = import_seconds(args.rounds)
            else:
                found = compare(subject, **args.options[subject], progress=show)
            rows += found

    report = Report(
        command=sys.argv[1:],
        rows=rows,
        missing={subject: missing(subject) for subject in COMPARED if subject in args.subjects},
        fits=fits,
        import_seconds=import_time,
        wall_seconds=time.perf_counter() - begin,
    )
    print_report(console, report)
    if args.json:
        args.json.write_text(report.to_json())
        console.print(f"Written to {args.json}")
    if args.plot:
        for path in draw(rows, args.plot):
            console.print(f"Drawn to {path}")
    return 0 if is_right(rows) else 1


def set_environment() -> None:
    """What has to be said before JAX's devices and PyTorch start."""
    # The idle threads of PyTorch's OpenMP would spin, on cores that the next peer is to have.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # JAX would take most of a GPU's memory for itself, and PyTorch has to run beside it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    silence_tokamax()  # lest it speak in the midst of the progress display


# -- the command line --------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jax_sce.benchmark",
        description="Measure the losses on this machine, beside those of other libraries.",
        epilog=METHOD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "subjects", nargs="*", metavar="subject",
        help=f"any of {', '.join(SUBJECTS)}; the first three if none is named",
    )  # fmt: skip
    parser.add_argument("--shapes", help="NxV for logits and distributions, NxDxV for linear: "
                        "1024x32000,512x64x8192")  # fmt: skip
    parser.add_argument("--dtypes", help=", ".join(DTYPES))
    parser.add_argument("--passes", help=", ".join(PASSES["logits"]) + "; all but the last")
    parser.add_argument("--peers", help="their names, as the table shows them")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}, or with --quick {QUICK_ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="all of it, much smaller")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it to this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures into this folder; "
                        f"without --json and --plot both go to {FOLDER}/")  # fmt: skip
    args = parser.parse_args()
    try:
        interpret(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def interpret(args: argparse.Namespace) -> None:
    """Replaces the texts of the options by what they mean.

    Raises:
      ValueError: One of them means nothing; the message says which.
    """
    args.shapes = [parse_shape(text) for text in words(args.shapes)]
    args.dtypes = words(args.dtypes)
    check_known("dtypes", args.dtypes, DTYPES)
    args.passes = words(args.passes)
    check_known("passes", args.passes, PASSES["logits"])
    names = dict.fromkeys(peer.name for subject in COMPARED for peer in all_peers(subject))
    args.peers = words(args.peers)
    check_known("peers", args.peers, names)
    if args.rounds is None:
        args.rounds = QUICK_ROUNDS if args.quick else ROUNDS
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    if not args.subjects:
        args.subjects = [s for s in COMPARED if not args.shapes or shapes_of(s, args.shapes)]
    check_known("subjects", args.subjects, SUBJECTS)
    args.options = {s: compare_options(args, s) for s in COMPARED if s in args.subjects}
    if not args.options and (args.shapes or args.dtypes or args.passes or args.peers):
        raise ValueError(f"--shapes, --dtypes, --passes and --peers are for {', '.join(COMPARED)}")
    if not args.json and not args.plot:
        FOLDER.mkdir(exist_ok=True)
        args.json, args.plot = FOLDER / "report.json", FOLDER
    check_folder("--json", args.json)
    if args.plot and args.plot.exists() and not args.plot.is_dir():
        raise ValueError(f"--plot: {args.plot} is not a folder")


def compare_options(args: argparse.Namespace, subject: str) -> dict[str, Any]:
    """What `compare` is to be told: of what was asked, that which the subject has."""
    asked = {
        "shapes": (args.shapes, shapes_of(subject, args.shapes)),
        "passes": (args.passes, [p for p in args.passes if p in PASSES[subject]]),
        "peers": (args.peers, [p.name for p in all_peers(subject) if p.name in args.peers]),
    }
    for name, (given, fitting) in asked.items():
        if given and not fitting:
            raise ValueError(f"--{name}: none of these is for {subject}")
    asked_for = {name: fitting for name, (given, fitting) in asked.items() if given}
    if args.dtypes:
        asked_for["dtypes"] = args.dtypes
    usual = QUICK[subject] if args.quick else {"peak": True}
    return {**usual, **asked_for, "rounds": args.rounds}


def shapes_of(subject: str, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shape for shape in shapes if len(shape) == rank(subject)]


def words(text: str | None) -> list[str]:
    return text.split(",") if text else []


def parse_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", text):
        raise ValueError(f"shapes must be like 1024x32000 or 512x64x8192, got {text!r}")
    return tuple(map(int, text.split("x")))


if __name__ == "__main__":
    sys.exit(main())
