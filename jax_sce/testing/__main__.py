"""The command: `python -m jax_sce.testing --help`."""

import argparse
import ast
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax

from .._command import (
    Parser,
    Progress,
    check_folder,
    make_console,
    require,
    run,
    showing_progress,
    silence_tokamax,
)
from ._candidate import Candidate, check_arguments, ways_to_call
from ._conformance import Report, by_name, to_json
from ._peers import PEERS, report_of
from ._promises import PROMISES
from ._table import markdown, print_report, print_side_by_side
from ._trial import KINDS, what_raised

DESCRIPTION = """\
Test a softmax cross-entropy, promise by promise, in about a minute. Each
broken promise is printed with lines of Python that show it.

  python -m jax_sce.testing optax:softmax_cross_entropy_with_integer_labels
  python -m jax_sce.testing my_losses.py:dense_loss --kind dense
  python -m jax_sce.testing my_package.losses:fused_loss --kind linear \\
      --arguments hidden,labels,kernel.T --set reduction=none

Without a loss it tests ours and all known ones that are installed, and
prints a table: as Markdown if the output is not a terminal.

The exit status is 0 if all promises that apply are kept, 1 if one is broken,
2 if the loss cannot be called. Without a loss it covers jax_sce's own only."""


def main() -> int:
    require(["rich"], "testing")
    # The promise about shard_map needs two devices. JAX counts them when it is first used, which
    # importing the loss may do.
    jax.config.update("jax_num_cpu_devices", 2)
    silence_tokamax()
    args = parse()
    failure = None
    with showing_progress() as progress:
        try:
            reports = (
                known_losses(args.promises, progress)
                if args.candidate is None
                else [report_of(args.candidate, args.loss, args.promises, progress)]
            )
        except Exception as error:
            failure = cannot_call(args.candidate, error)
    if failure is not None:
        print(failure, file=sys.stderr)
        return 2
    console = make_console()
    if args.candidate is not None:
        print_report(console, reports[0])
    elif console.is_terminal:
        print_side_by_side(console, reports)
    else:
        print(markdown(reports))
    if args.candidate is None:
        console.print("\nTo test one of them alone: python -m jax_sce.testing with", style="dim")
        for peer in PEERS:
            if peer.installed:
                line = f"{peer.name} ({peer.package} {peer.version}): {peer.candidate.options}"
                console.print(line, style="dim", markup=False, soft_wrap=True)
    if args.json:
        document = [to_json(report) for report in reports]
        args.json.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        console.print(f"Written to {args.json}", markup=False, soft_wrap=True)
    asked = [r for r in reports if args.candidate is not None or r.name.startswith("jax_sce")]
    return 0 if all(report.holds for report in asked) else 1


def known_losses(promises: list[str] | None, progress: Progress) -> list[Report]:
    """The reports of the known losses that are installed."""
    reports = []
    for i, peer in enumerate(PEERS):
        if not peer.installed:
            how = "pip install " + peer.package
            print(f"{peer.name}: {peer.package} is not installed: {how}", file=sys.stderr)
            continue

        def show(done: int, total: int, text: str, i: int = i, name: str = peer.name) -> None:
            progress(i * total + done, len(PEERS) * total, f"{name}: {text}")

        try:
            reports.append(report_of(peer.candidate, peer.name, promises, show))
        except Exception as error:  # a loss that cannot even be called does not end the table
            print(f"{peer.name}: {what_raised(error)}", file=sys.stderr)
            continue
        broken = [result.promise for result in reports[-1].broken]
        print(f"{peer.name}: {', '.join(broken) or 'all kept'}", file=sys.stderr)
    return reports


def cannot_call(candidate: Candidate, error: Exception) -> str:
    """Why the loss cannot be called, and the options with which it can."""
    text = f"{candidate.address}, called with kind {candidate.kind}, {what_raised(error)}"
    theirs = functools.partial(candidate.loaded.theirs, **candidate.keywords)
    for kind, names in ways_to_call(theirs):
        arguments = f" --arguments {','.join(names)}" if names else ""
        return f"{text}\nIt works with --kind {kind}{arguments}"
    return text


def parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m jax_sce.testing",
        usage="python -m jax_sce.testing [LOSS] [options]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("loss", nargs="?", metavar="LOSS",
                        help="the loss to test, as module:function or file.py:function")  # fmt: skip
    parser.add_argument(
        "--kind", choices=KINDS, default="integer", metavar="KIND",
        help="integer: loss(logits [N, V], labels [N]); dense: loss(logits [N, V], labels [N, V]); "
        "linear: loss(hidden [N, D], kernel [D, V], labels [N]); the default is integer",
    )  # fmt: skip
    parser.add_argument(
        "--arguments", metavar="NAMES",
        help="the arguments in the order in which the loss takes them, if it differs, for example "
        "hidden,labels,kernel.T; .T passes the transposed array",
    )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a keyword to call the loss with; may be repeated")  # fmt: skip
    parser.add_argument(
        "--promises", metavar="NAMES",
        help="check only these promises, separated by commas; all of them are: "
        + ", ".join(promise.name for promise in PROMISES),
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="also write the results to this file")  # fmt: skip
    args = parser.parse_args()
    try:
        if args.promises is not None:
            args.promises = [name.strip() for name in args.promises.split(",")]
            by_name(args.promises)
        arguments = () if args.arguments is None else tuple(args.arguments.split(","))
        if arguments:
            check_arguments(arguments, args.kind)
        keywords = dict(map(keyword, args.set))
        if args.loss is None and (arguments or keywords or args.kind != "integer"):
            raise ValueError("--kind, --arguments and --set need a loss")
        args.candidate = None
        if args.loss is not None:
            args.candidate = Candidate(args.loss, args.kind, arguments, keywords)
            _ = args.candidate.loaded  # reports a mistake before anything is compiled
        check_folder("--json", args.json)
    except ValueError as error:
        parser.error(str(error))
    return args


def keyword(text: str) -> tuple[str, Any]:
    match = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", text)
    if match is None:
        raise ValueError(f"--set must be like name=value, got {text!r}")
    try:
        return match[1], ast.literal_eval(match[2])
    except (ValueError, SyntaxError):
        return match[1], match[2]  # a string without its quotes


if __name__ == "__main__":
    run(main)
