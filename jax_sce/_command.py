"""Code that `python -m jax_sce.benchmark` and `python -m jax_sce.testing` share."""

import argparse
import contextlib
import dataclasses
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

# -- progress ----------------------------------------------------------------------------------------

Progress = Callable[[int, int, str], None]  # steps done, steps in all, and the step that begins

_SECONDS_BETWEEN_LINES = 5.0


@dataclasses.dataclass
class Steps:
    """Counts the steps, and reports each one as it begins."""

    total: int
    progress: Progress | None
    done: int = 0

    def __call__(self, text: str) -> None:
        """A step begins."""
        self.detail(text)
        self.done += 1

    def detail(self, text: str) -> None:
        """Reports other work, which is not counted, before the next step."""
        if self.progress is not None:
            self.progress(self.done, self.total, text)


@contextlib.contextmanager
def showing_progress() -> Iterator[Progress]:
    """Progress on stderr: one line that is redrawn in a terminal, elsewhere a line every few seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _line_by_line()
        return
    text = TextColumn("{task.description}", markup=False,
                      table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))  # fmt: skip
    columns = (BarColumn(10), MofNCompleteColumn(), TimeElapsedColumn(), text)
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, text: bar.update(
            task, completed=done, total=total, description=text
        )


def _line_by_line() -> Progress:
    last = -_SECONDS_BETWEEN_LINES

    def show(done: int, total: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

    return show


# -- the command line --------------------------------------------------------------------------------


def run(main: Callable[[], int]) -> NoReturn:
    """Runs the command. Ctrl-C ends it in one line."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def make_console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def silence_tokamax() -> None:
    """It logs every kernel for which it has no tuning."""
    logging.getLogger("absl").setLevel(logging.ERROR)


def is_installed(package: str) -> bool:
    """`package` is the name that pip uses."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def how_to_install(extra: str) -> str:
    """The command for a checkout; jax_sce is on no package index."""
    return f'python -m pip install -e ".[{extra}]"'


def require(packages: Iterable[str], extra: str) -> None:
    """Ends the program in one line if a package that it needs is not installed."""
    if absent := [package for package in packages if not is_installed(package)]:
        verb = "is" if len(absent) == 1 else "are"
        sys.exit(f"{', '.join(absent)} {verb} not installed: {how_to_install(extra)}")


def check_known(argument: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = tuple(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{argument} must be among {', '.join(known)}, got {name!r}")


def check_folder(option: str, file: Path | None) -> None:
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {file.parent}")
