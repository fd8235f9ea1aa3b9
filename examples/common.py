"""What the examples share: Ctrl-C, the command line, the progress bar and the look of the pictures.

Every example imports this file first: from then on Ctrl-C, or a package that is missing, ends it in one
line, without a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.progress import Progress

# Okabe and Ito's colours: colour-blind readers can tell them apart.
BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"


# --- Ctrl-C, missing packages ---------------------------------------------------------------------


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python calls it with an exception that nobody caught; after Ctrl-C the exit status is 130."""
    if issubclass(kind, KeyboardInterrupt):
        print(str(error) or "Stopped.", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError):
        print(f'{error}; install it by python -m pip install -e ".[examples]"', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = report


# --- the command line ----------------------------------------------------------------------------


def make_parser(doc: str, quick: str) -> argparse.ArgumentParser:
    """A parser with `--quick` and `--out`; its description is the first line of the docstring."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "output", metavar="FOLDER",
        help="where to put pictures (default: examples/output)",
    )  # fmt: skip
    return parser


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option."""

    def parse(text: str) -> int:
        try:
            value = int(text)
            if value < least or (most is not None and value > most):
                raise ValueError
        except ValueError:
            limits = f"of at least {least}" if most is None else f"from {least} to {most}"
            error = f"must be a whole number {limits}, got {text!r}"
            raise argparse.ArgumentTypeError(error) from None
        return value

    return parse


seed = whole_number(0, 2**31 - 1)


def check_folder(name: str, folder: Path) -> None:
    """Makes the folder if there is none. Ends the script if nobody can write into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(
            f"{name} must be a folder to write into, got {folder}: {error.strerror}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def picture(
    parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, *settings: str
) -> Path:
    """A file in `--out`, which is checked. Settings other than the default are in its name, as in
    `language_model-quick-seed=3.png`, so that no run overwrites the picture of another."""
    check_folder("--out", args.out)
    for setting in settings:
        value = getattr(args, setting)
        if value != parser.get_default(setting):
            name += f"-{setting}" if value is True else f"-{setting}={value}"
    return args.out / f"{name}.png"


def of_stopped(picture: Path) -> Path:
    """Where a run that Ctrl-C stopped draws: it keeps the picture of a whole one."""
    return picture.with_stem(f"{picture.stem}-stopped")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_sce"


def check_cache() -> None:
    check_folder("the cache (see XDG_CACHE_HOME)", cache_folder())


# --- progress and pictures -----------------------------------------------------------------------


def progress_bar(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = [BarColumn(20), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn()]
    return Progress(*columns, TextColumn("{task.description}"), console=console)


def tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
