"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import Any, NamedTuple

_OPERATION = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|"
    r"collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_OPERANDS = re.compile(r"%([\w.-]+)")
_RESULT = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shapes>.*?) [\w-]+\(")
_SHAPE = re.compile(r"(?P<dtype>[a-z]+(?P<bits>[0-9]+)[a-z0-9]*|pred)\[(?P<sizes>[0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*body=%?([\w.-]+)")


class Collective(NamedTuple):
    """One of a program's operations between devices."""

    kind: str
    bytes: int  # on each device: of all that is summed or gathered
    in_loop: bool
    devices: int  # that take part in one of them

    @property
    def sent(self) -> float:
        """Bytes that each device sends when they go around a ring: of a sum, twice."""
        if self.kind.startswith("collective-"):
            return self.bytes
        return (
            self.bytes * (self.devices - 1) / self.devices * (2 if self.kind == "all-reduce" else 1)
        )


def collectives(compiled: Any) -> list[Collective]:
    """What crosses the devices in a program, `jax.jit(f).lower(...).compile()`; of a loop, in one turn.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_sce.testing import collectives
      >>> collectives(jax.jit(jnp.sum).lower(jnp.ones(8)).compile())
      []
    """
    computations: dict[str, list[str]] = {}
    text = compiled.as_text()
    for line in text.splitlines():
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
        Collective(found["kind"], _larger(found, line, lines), name in inside, _group(line, text))
        for name, lines in computations.items()
        for line in lines
        if (found := _OPERATION.search(line))
    ]


def _group(line: str, text: str) -> int:
    """How many devices a group has: listed, as the last of the sizes of an iota, or as mesh axes."""
    if found := re.search(r"replica_groups=\{\{([0-9,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[[0-9]+,([0-9]+)\]<=", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=([0-9]+)", found[1])}
        parts = re.findall(r"'(\w+)'(?::\([0-9]+\)([0-9]+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    everyone = re.search(r"num_partitions=([0-9]+)", text)
    return int(everyone[1]) if everyone else 1


def _larger(found: re.Match[str], line: str, lines: list[str]) -> int:
    """Of what goes in and what comes out: a gather's result, a scattered sum's operand."""
    operands = set(_OPERANDS.findall(line[found.end() :].split(")")[0]))
    results = (_RESULT.match(x) for x in lines)
    given = sum(_bytes(x["shapes"]) for x in results if x and x["name"] in operands)
    came = _bytes(found["shapes"].replace("u32[]", "") if found["start"] else found["shapes"])
    # What starts an operation has its operands in its result, or nothing else than its result.
    return max(given, came - given if found["start"] else came)


def _bytes(shapes: str) -> int:
    total = 0
    for found in _SHAPE.finditer(shapes):
        bits = int(found["bits"] or 8)  # of a bool 8
        total += math.prod(int(n) for n in found["sizes"].split(",") if n) * bits // 8
    return total
