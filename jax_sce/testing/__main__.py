"""The command: `python -m jax_sce.testing --help`."""

import argparse
import ast
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from .._command import check_folder, is_installed, make_console, silence_tokamax
from ._conformance import Report, by_name, conformance, to_json
from ._peers import PEERS
from ._promises import PROMISES
from ._table import markdown, print_report
from ._trial import KINDS, TAKES

DESCRIPTION = """Put a softmax cross-entropy to the test, promise by promise. The exit status is 0 if all
promises that apply are kept, 1 if one is broken, 2 if the loss cannot be called.

  python -m jax_sce.testing optax:softmax_cross_entropy_with_integer_labels
  python -m jax_sce.testing my_package.losses:fused_loss --kind linear \\
      --arguments hidden,labels,kernel.T --set reduction=none

Without a loss, all that are known and installed are set side by side, in Markdown; the status is then
that of jax_sce's own."""


def main() -> int:
    if not is_installed("rich"):
        sys.exit('rich must be installed: pip install "jax_sce[testing]"')
    # For the promise about shard_map; before the loss's module is imported and may ask for a device.
    jax.config.update("jax_num_cpu_devices", 2)
    silence_tokamax()
    args = parse()
    console = make_console()
    if args.loss is None:
        reports = known_losses(args.promises)
        print(markdown(reports))
        for name, version in {p.package: p.version for p in PEERS if p.installed}.items():
            print(f"{name} {version}")
        asked = [report for report in reports if report.name.startswith("jax_sce")]
    else:
        try:
            reports = asked = [conformance(args.adapted, args.kind, promises=args.promises,
                                           name=args.loss, source=args.source)]  # fmt: skip
        except Exception as error:
            print(f"{args.loss}: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
        print_report(console, reports[0])
    if args.json:
        document = [to_json(report) for report in reports]
        args.json.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        console.print(f"Written to {args.json}")
    return 0 if all(report.holds for report in asked) else 1


def known_losses(promises: list[str] | None) -> list[Report]:
    reports = []
    for peer in PEERS:
        if not peer.installed:
            print(f"{peer.name}: {peer.package} is not installed", file=sys.stderr)
            continue
        try:
            reports.append(peer.report(promises))
        except Exception as error:  # one that cannot even be called does not end the table
            print(f"{peer.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        broken = [result.promise for result in reports[-1].broken]
        print(f"{peer.name}: {', '.join(broken) or 'all kept'}", file=sys.stderr)
    return reports


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jax_sce.testing",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("loss", nargs="?", metavar="module:function")
    parser.add_argument("--kind", choices=KINDS, default="integer")
    parser.add_argument("--arguments", metavar="NAMES",
                        help="those that it takes by position, of logits, labels; or of hidden, "
                             "kernel, labels; .T transposes")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a keyword that it is always given")  # fmt: skip
    parser.add_argument("--promises", help=", ".join(promise.name for promise in PROMISES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it to this file")
    args = parser.parse_args()
    try:
        if args.promises is not None:
            args.promises = [name.strip() for name in args.promises.split(",")]
            by_name(args.promises)
        order, keywords = order_of(args.arguments, args.kind), dict(map(keyword, args.set))
        if args.loss is not None:
            function = load(args.loss)
            args.adapted = adapted(function, args.kind, order, keywords)
            args.source = source_of(args.loss, args.kind, order, keywords)
        check_folder("--json", args.json)
    except ValueError as error:
        parser.error(str(error))
    return args


def load(text: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    if not module or not name:
        raise ValueError(f"the loss must be like module:function, got {text!r}")
    try:
        fn = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{text} cannot be imported: {error}") from error
    if not callable(fn):
        raise ValueError(f"{text} must be callable, got {type(fn).__name__}")
    return fn


def order_of(text: str | None, kind: str) -> list[str]:
    names = list(TAKES[kind]) if text is None else text.split(",")
    if sorted(name.removesuffix(".T") for name in names) != sorted(TAKES[kind]):
        raise ValueError(f"--arguments must name {', '.join(TAKES[kind])} once each, got {text!r}")
    return names


def keyword(text: str) -> tuple[str, Any]:
    match = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", text)
    if match is None:
        raise ValueError(f"--set must be like name=value, got {text!r}")
    try:
        return match[1], ast.literal_eval(match[2])
    except (ValueError, SyntaxError):
        return match[1], match[2]  # a string without its quotes


def adapted(
    function: Callable[..., Any], kind: str, order: list[str], keywords: dict[str, Any]
) -> Callable[..., Any]:
    """The loss with our order of arguments. What is given already can be given anew."""

    @functools.wraps(function)
    def loss(*arrays: Any, **options: Any) -> Any:
        named = dict(zip(TAKES[kind], arrays, strict=True))
        given = [
            named[name.removesuffix(".T")].T if name.endswith(".T") else named[name]
            for name in order
        ]
        return function(*given, **(keywords | options))

    return loss


def source_of(loss: str, kind: str, order: list[str], keywords: dict[str, Any]) -> str:
    """Lines of Python that define it."""
    module, _, name = loss.partition(":")
    lines = [f"import {module}", f"loss = {module}.{name}"]
    if order != list(TAKES[kind]) or keywords:
        given = ", ".join(order)
        lines[1] = (
            f"loss = lambda {', '.join(TAKES[kind])}, **options: "
            f"{module}.{name}({given}, **({keywords!r} | options))"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
