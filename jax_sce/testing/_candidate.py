"""A loss by its address, `module:function` or `file.py:function`, and how it is called.

The command line and the table of known losses name their losses in this way, so that a loss has the same
verdict in both.
"""

import dataclasses
import functools
import itertools
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._trial import KINDS, TAKES, Loss, first_case, keywords_of, run


@dataclasses.dataclass(frozen=True)
class Candidate:
    address: str
    kind: str = "integer"
    arguments: Sequence[str] = ()  # in the order that the function takes; () is our order
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # always passed

    @property
    def source(self) -> str:
        """Lines of Python that define `loss`, called as we call it, and perhaps `theirs`, as it is."""
        where, _, name = self.address.rpartition(":")
        if is_file(where):
            first, *rest = name.split(".")
            imports = "import runpy"
            function = ".".join([f"runpy.run_path({where!r})[{first!r}]", *rest])
        else:
            imports, function = f"import {where}", f"{where}.{name}"
        takes = list(TAKES[self.kind])
        if not self.keywords and list(self.arguments or takes) == takes:
            return f"{imports}\nloss = {function}"
        keywords = f"{dict(self.keywords)!r} | options" if self.keywords else "options"
        return (
            f"{imports}\ntheirs = {function}\n"
            f"loss = lambda {', '.join(takes)}, **options: "
            f"theirs({', '.join(self.arguments or takes)}, **({keywords}))"
        )

    @functools.cached_property
    def loaded(self) -> "Loaded":
        """Runs the source, once.

        Raises:
          ValueError: There is no such function; the message says why, in one line.
        """
        where, _, name = self.address.rpartition(":")
        if not where or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(
                f"the loss must be like module:function or file.py:function, got {self.address!r}"
            )
        if is_file(where) and not Path(where).is_file():
            raise ValueError(f"{self.address}: there is no file {where}")
        if not is_file(where) and not all(part.isidentifier() for part in where.split(".")):
            raise ValueError(f"{self.address}: {where!r} is neither a module nor a .py file")
        try:
            names = run(self.source)
        except KeyError as error:
            raise ValueError(f"{self.address}: {where} does not define {error}") from error
        except Exception as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{self.address} cannot be imported: {why[0]}") from error
        theirs = names.get("theirs", names["loss"])
        if not callable(theirs):
            raise ValueError(f"{self.address} must be callable, got {type(theirs).__name__}")
        return Loaded(names["loss"], theirs, keywords_of(theirs, self.kind))

    @property
    def options(self) -> str:
        """How it is named on the command line."""
        shown = [self.address]
        if self.kind != "integer":
            shown += ["--kind", self.kind]
        if self.arguments:
            shown += ["--arguments", ",".join(self.arguments)]
        for keyword, value in self.keywords.items():
            shown += ["--set", shlex.quote(f"{keyword}={value}")]
        return " ".join(shown)


@dataclasses.dataclass(frozen=True)
class Loaded:
    loss: Callable[..., Any]  # takes our arguments
    theirs: Callable[..., Any]  # takes its own
    options: frozenset[str]  # the keywords that it takes


def is_file(where: str) -> bool:
    return where.endswith(".py") or os.sep in where


def check_arguments(names: Sequence[str], kind: str) -> None:
    if sorted(name.removesuffix(".T") for name in names) != sorted(TAKES[kind]):
        raise ValueError(
            f"--arguments must name {', '.join(TAKES[kind])} once each, got {','.join(names)!r}"
        )


def ways_to_call(theirs: Callable[..., Any]) -> Iterator[tuple[str, Sequence[str]]]:
    """The kinds, and the orders of arguments, in which the function gives the right losses.

    For a function that cannot be called in the way that was asked for.
    """
    for kind in KINDS:
        for order in itertools.permutations(TAKES[kind]):
            transposed = [x if x != "kernel" else "kernel.T" for x in order]
            for names in [order, transposed] if kind == "linear" else [order]:
                if _is_right(theirs, kind, names):
                    yield kind, () if tuple(names) == TAKES[kind] else names


def _is_right(theirs: Callable[..., Any], kind: str, names: Sequence[str]) -> bool:
    case = first_case()

    def loss(*arrays: Any) -> Any:
        named = dict(zip(TAKES[kind], arrays, strict=True))
        return theirs(*(
            named[x.removesuffix(".T")].T if x.endswith(".T") else named[x] for x in names
        ))  # fmt: skip

    try:
        trial = Loss.of(loss, kind, (), "")
        losses = trial.each(*trial.arrays(case))
    except Exception:
        return False
    return bool(np.allclose(np.asarray(losses), case.exact.loss, rtol=1e-3))
