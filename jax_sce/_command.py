"""What `python -m jax_sce.benchmark` and `python -m jax_sce.testing` share. Nothing else imports it."""

import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LEAST_WIDTH = 120  # of a table; a pipe has none of its own


def make_console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_LEAST_WIDTH, highlight=False)


def silence_tokamax() -> None:
    """It tells of every tuning that it has no file for."""
    logging.getLogger("absl").setLevel(logging.ERROR)


def is_installed(package: str) -> bool:
    """By the name that pip has for it."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = tuple(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{what} must be among {', '.join(known)}, got {name!r}")


def check_folder(option: str, file: Path | None) -> None:
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {file.parent}")
