"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

_OPERATION = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_SHAPE = re.compile(r"(?P<dtype>[a-z]+[0-9]+|pred)\[(?P<sizes>[0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*body=%?([\w.-]+)")


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its result on each device
    in_loop: bool


def collectives(compiled) -> list[Collective]:
    """Of `jax.jit(f).lower(...).compile()`."""
    computations: dict[str, list[str]] = {}
    for line in compiled.as_text().splitlines():
        if found := _COMPUTATION.match(line):
            computations[found["name"]] = lines = []
        elif computations:
            lines.append(line)
    loops = {b for lines in computations.values() for x in lines for b in _LOOP.findall(x)}
    inside: set[str] = set()
    while loops:
        name = loops.pop()
        inside.add(name)
        for line in computations.get(name, ()):
            called = [*_CALLED.findall(line)]
            for names in _BRANCHES.findall(line):
                called += [n.strip().lstrip("%") for n in names.split(",")]
            loops |= set(called) - inside
    return [
        Collective(found["kind"], _bytes(found["shapes"]), name in inside)
        for name, lines in computations.items()
        for line in lines
        if (found := _OPERATION.search(line))
    ]


def _bytes(shapes: str) -> int:
    total = 0
    for found in _SHAPE.finditer(shapes):
        bits = 8 if found["dtype"] == "pred" else int(re.sub("[a-z]+", "", found["dtype"]))
        total += math.prod(int(n) for n in found["sizes"].split(",") if n) * bits // 8
    return total
