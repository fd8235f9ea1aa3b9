"""Parse the HLO text of a compiled program: its kernels, and the bytes that devices send to each other.

`jax_sce.benchmark` and `jax_sce.testing` use it; the losses do not.

    program = jax.jit(f).lower(*shapes).compile()
    for kernel in kernels(program.as_text()): ...

The costs are computed from the text, by these rules:

- A fusion, or an instruction outside a fusion, is one kernel. It reads each operand from memory once and
  writes each result once. If it only slices or gathers from an operand, it reads only that part; if it
  updates a part in place, it writes only that part.
- Arrays that are not in device memory, e.g. in a TPU's on-chip memory, cost nothing.
- Operations are those of matrix products: two for each multiplication and addition.
- A loop's body counts as often as the loop runs, or NaN times if that is known only at run time.
- Only the most expensive branch of a conditional counts. A byte costs as much as 300 operations.
- A custom call is a cuBLAS product, or states its own cost (Pallas's `cost_estimate` on TPUs), or is
  `opaque`. If it is opaque, its operands and results count, and its operations are unknown. Its scratch
  memory costs nothing.

Not counted: repeated reads by the tiles of a product, savings by caches, elementwise arithmetic, padding
of layouts, the time between kernels, and the time of the links between devices.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Collective(NamedTuple):
    """An operation between devices."""

    kind: str
    bytes: int  # on each device, of the arrays that are summed or gathered
    in_loop: bool
    devices: int  # in one group

    @property
    def sent(self) -> float:
        """The bytes that each device sends if they go around a ring; a sum goes around twice."""
        if self.kind.startswith("collective-"):
            return self.bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.devices - 1) / self.devices


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product. `precision` is the dtype of its operands, e.g. "bf16", or "f32 high" or
    "f32 highest" if JAX was given that precision."""

    operations: float
    precision: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel: the cost of one run, and how often it runs."""

    name: str
    kind: str  # its opcode, or the target of a custom call
    read: float  # bytes of device memory
    written: float
    products: tuple[Product, ...] = ()
    collective: Collective | None = None
    opaque: bool = False
    times: float = 1

    @property
    def bytes(self) -> float:
        return self.read + self.written


def kernels(text: str, *, every_branch: bool = False) -> list[Kernel]:
    """The kernels of a compiled program, in the order of their launch. With `every_branch`, those of all
    branches of conditionals."""
    module = _Module(text)
    return list(_visit(module, module.entry, 1, False, every_branch))


# -- instructions --------------------------------------------------------------------------------------

# These read only as much of an array as their result holds.
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice", "scatter"}
# `_RENAMING` only reshapes. All of `_TRANSPARENT` read one element for each element read of their
# result.
_RENAMING = {"bitcast", "reshape"}
_TRANSPARENT = _RENAMING | {"bitcast-convert", "convert", "copy", "transpose"}
_OPERATIONS_A_BYTE = 300  # rate / bandwidth of an H100; 170 for a TPU v5p, 560 for a v6e
_FREE = {
    "after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter",
    "partition-id", "replica-id", "tuple",
}  # fmt: skip
_FREE_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "PinToDevice", "Sharding",
}  # fmt: skip
_COLLECTIVES = {
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
}  # fmt: skip

_HEADING = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(
    r"\b(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sizes>[\d,]*)\](?P<layout>\{[^{}]*\})?"
)


class _Array(NamedTuple):
    dtype: str
    sizes: tuple[int, ...]
    itemsize: float
    in_memory: bool  # in device memory, not on the chip

    @property
    def bytes(self) -> float:
        return math.prod(self.sizes) * self.itemsize


def _arrays(type_text: str) -> list[_Array]:
    return [
        _Array(
            found["dtype"],
            tuple(int(n) for n in found["sizes"].split(",") if n),
            int(found["bits"] or 8) / 8,  # 8 for a bool
            not re.search(r"S\([1-9]", found["layout"] or ""),
        )
        for found in _ARRAY.finditer(type_text)
    ]


def _bytes(type_text: str) -> float:
    return sum(array.bytes for array in _arrays(type_text) if array.in_memory)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    arguments: str  # the text between the parentheses
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-#]+)", self.arguments)

    @property
    def target(self) -> str:
        """The target of a custom call."""
        return self.attribute("custom_call_target") or ""

    def attribute(self, key: str) -> str | None:
        found = re.search(rf'\b{key}="?%?([\w.\-$]+)', self.attributes)
        return found[1] if found else None


class _Computation:
    def __init__(self, instructions: list[_Instruction]) -> None:
        self.instructions = instructions
        self.named = {i.name: i for i in instructions}
        self.users: dict[str, list[_Instruction]] = {}
        for i in instructions:
            for operand in i.operands:
                self.users.setdefault(operand, []).append(i)

    @property
    def root(self) -> _Instruction:
        return next(i for i in self.instructions if i.is_root)

    def parameter(self, number: int) -> _Instruction:
        return next(
            i for i in self.instructions if i.opcode == "parameter" and i.arguments == str(number)
        )

    def type_of(self, operand: str) -> str:
        """The type of an operand. Some programs write `name#1` for a part of a tuple."""
        name, _, part = operand.partition("#")
        if name not in self.named:
            return ""
        type_text = self.named[name].type
        return [x[0] for x in _ARRAY.finditer(type_text)][int(part)] if part else type_text


class _Module:
    def __init__(self, text: str) -> None:
        lines: dict[str, list[_Instruction]] = {}
        self.entry, self.text, name = "", text, ""
        for line in text.splitlines():
            if heading := _HEADING.match(line):
                name = heading[2]
                lines[name] = []
                self.entry = name if heading[1] else self.entry
            elif name and (found := _LINE.match(line)):
                lines[name].append(_instruction(found))
        self.computations = {name: _Computation(x) for name, x in lines.items()}

    def called_name(self, i: _Instruction) -> str:
        """The name of the computation that an instruction runs, or applies to pairs of elements."""
        for key in ("calls", "to_apply"):
            if name := i.attribute(key):
                return name
        found = re.search(r"called_computations=\{%?([\w.\-]+)", i.attributes)
        return found[1] if found else ""

    def called(self, i: _Instruction) -> _Computation | None:
        return self.computations.get(self.called_name(i))


def _instruction(found: re.Match[str]) -> _Instruction:
    """Parse `type opcode(arguments), attributes`. A tuple's type is itself in parentheses."""
    rest = found[3]
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
        type_text, rest = rest[:end], rest[end:].lstrip()
    else:
        type_text, _, rest = rest.partition(" ")
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    return _Instruction(
        found[2], type_text, opcode, rest[len(opcode) + 1 : end], rest[end + 1 :], bool(found[1])
    )


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    return len(text)


# -- the walk through the program ----------------------------------------------------------------------


def _visit(
    module: _Module, name: str, times: float, in_loop: bool, every_branch: bool
) -> Iterator[Kernel]:
    computation = module.computations[name]
    for i in computation.instructions:
        opcode = i.opcode.removesuffix("-start")
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or i.target in _FREE_CALLS:
            continue
        if opcode == "while":
            trips = _trip_count(module, computation, i)
            parts = ("body", "condition") if every_branch else ("body",)
            for part in parts:
                inner = i.attribute(part) or ""
                yield from _visit(module, inner, times * trips, True, every_branch)
        elif opcode == "conditional":
            branches = [list(_visit(module, b, times, in_loop, every_branch)) for b in _branches(i)]
            if not every_branch:
                branches = [max(branches, key=_cost)]
            yield from itertools.chain(*branches)
        elif opcode in ("call", "async") or i.opcode == "custom-call-start":
            yield from _visit(module, module.called_name(i), times, in_loop, every_branch)
        else:
            yield dataclasses.replace(_kernel(module, computation, i, in_loop), times=times)


def _cost(branch: list[Kernel]) -> float:
    return sum(
        k.times * (k.bytes + sum(p.operations for p in k.products) / _OPERATIONS_A_BYTE)
        for k in branch
    )


def _branches(i: _Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
        return re.findall(r"%?([\w.\-]+)", found[1])
    return [x for key in ("true", "false") if (x := i.attribute(f"{key}_computation"))]


def _trip_count(module: _Module, outer: _Computation, loop: _Instruction) -> float:
    """How often a loop runs: XLA's trip count, or that of `while i < n` if n and the first i are
    constant. NaN if neither is known."""
    if known := re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.attribute("condition") or ""]
    initial = outer.named[loop.operands[0]]

    def constant(c: _Computation, name: str) -> tuple[int | None, int | None]:
        """The value of an instruction at the loop's start, and its index in the loop's state."""
        i, place = c.named[name], None
        while i.opcode in ("copy", "bitcast", "get-tuple-element"):
            if i.opcode == "get-tuple-element" and c is condition:
                place = int(i.attribute("index") or 0)
                c, i = outer, outer.named[initial.operands[place]]
            elif i.operands[0] in c.named and i.opcode != "get-tuple-element":
                i = c.named[i.operands[0]]
            else:
                return None, place
        is_number = i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments)
        return (int(i.arguments) if is_number else None), place

    test = condition.root
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return math.nan
    (first, counter), (last, _) = (constant(condition, x) for x in test.operands)
    if first is None or last is None or counter is None:
        return math.nan
    body = module.computations[loop.attribute("body") or ""]
    step = body.named[body.root.operands[counter]]
    steps = [
        x for name in step.operands if (x := body.named[name]).opcode == "constant"
    ] if step.opcode == "add" else []  # fmt: skip
    return max(last - first, 0) if [x.arguments for x in steps] == ["1"] else math.nan


# -- the cost of a kernel ------------------------------------------------------------------------------


def _kernel(module: _Module, c: _Computation, i: _Instruction, in_loop: bool) -> Kernel:
    kind = i.target or i.opcode
    opcode = i.opcode.removesuffix("-start")
    if opcode in _COLLECTIVES:
        collective = _collective(module, c, i, in_loop)
        given = sum(_bytes(c.type_of(x)) for x in i.operands)
        return Kernel(
            i.name, opcode, given, _bytes_of_results(i, given, _bytes), collective=collective
        )
    if i.opcode == "copy-start":  # its result holds the copy and the original
        copy = _arrays(i.type)[0]
        written = copy.bytes if copy.in_memory else 0
        return Kernel(i.name, "copy", _bytes(c.type_of(i.operands[0])), written)
    if i.opcode.endswith("-start"):  # its result is ((operands), result, context)
        result = [x[0] for x in _ARRAY.finditer(i.type)][len(i.operands)]
        i, kind = dataclasses.replace(i, opcode=opcode, type=result), opcode
    if found := re.search(r'"cost_estimate":\{([^}]*)\}', i.attributes):
        told = dict(re.findall(r'"(\w+)":"?(\d+)', found[1]))
        operand = _arrays(c.type_of(i.operands[0]))[0]
        product = Product(float(told.get("flops", 0)), operand.dtype)
        return Kernel(i.name, kind, float(told.get("bytes_accessed", 0)), 0, (product,))

    called = module.called(i) if i.opcode == "fusion" else None
    if called is None:  # treat it like a fusion with one instruction
        alone = _alone(c, i)
        read = sum(_read(module, alone, x) for x in dict.fromkeys(i.operands))
        written = _written(module, alone, i, fused=False)
    else:
        numbers = range(len(i.operands))
        read = sum(_read(module, called, called.parameter(n).name) for n in numbers)
        written = _written(module, called, called.root, fused=True)
    products = tuple(_products(module, c, i))
    opaque = i.opcode == "custom-call" and not products
    within = None if called is None else _collective_within(module, called, in_loop)
    return Kernel(i.name, kind, read, written, products, within, opaque)


def _alone(c: _Computation, i: _Instruction) -> _Computation:
    operands = [c.named[x.partition("#")[0]] for x in i.operands if x.partition("#")[0] in c.named]
    alone = _Computation([dataclasses.replace(i, is_root=True)])
    alone.named |= {x.name: x for x in operands}
    return alone


def _read(module: _Module, c: _Computation, name: str) -> float:
    """How many bytes of a value its users in the computation read."""
    arrays = _arrays(c.type_of(name))
    whole = sum(x.bytes for x in arrays if x.in_memory)
    if not whole or len(arrays) != 1:
        return whole
    return min(arrays[0].itemsize * _elements_read(module, c, name), whole)


def _elements_read(module: _Module, c: _Computation, name: str) -> float:
    total = 0.0
    for user in c.users.get(name, ()):
        is_first = user.operands[0] == name
        if user.opcode in _SLICES and is_first:
            total += _elements(user.type)
        elif user.opcode in _UPDATES and is_first and _is_result(c, user):
            total += _elements(c.type_of(user.operands[-1])) if user.opcode == "scatter" else 0
        elif not user.is_root and (
            user.opcode in _TRANSPARENT or (user.opcode in _UPDATES and is_first)
        ):
            total += _elements_read(module, c, user.name)
        elif user.opcode == "fusion" and (called := module.called(user)):
            for number, operand in enumerate(user.operands):
                if operand == name:
                    total += _elements_read(module, called, called.parameter(number).name)
        else:
            return math.inf
    return total


def _is_result(c: _Computation, i: _Instruction) -> bool:
    """Is the instruction a result of the computation, and not read inside it?"""
    while not i.is_root:
        users = c.users.get(i.name, [])
        if len(users) != 1 or users[0].opcode not in _RENAMING | {"tuple"}:
            return False
        i = users[0]
    return True


def _elements(type_text: str) -> float:
    return sum(math.prod(array.sizes) for array in _arrays(type_text))


def _written(module: _Module, c: _Computation, i: _Instruction, *, fused: bool) -> float:
    """How many bytes computing `i` writes. An update in place writes only the new part."""
    if i.opcode == "tuple":
        return sum(_written(module, c, c.named[x], fused=fused) for x in i.operands)
    if not _bytes(i.type):
        return 0
    source = i
    while source.opcode in _RENAMING and fused and source.operands[0] in c.named:
        source = c.named[source.operands[0]]
    if source.opcode == "fusion" and fused and (called := module.called(source)):
        return _written(module, called, called.root, fused=True)
    if source.opcode in _UPDATES and (not fused or _is_parameter(c, source.operands[0])):
        update = source.operands[1 if source.opcode == "dynamic-update-slice" else -1]
        itemsize = _arrays(i.type)[0].itemsize
        return itemsize * _elements(c.type_of(update))
    if i.opcode == "custom-call" and i.type.startswith("("):  # a flat result of bytes is scratch
        results = [x for x in _arrays(i.type) if x.itemsize > 1 or len(x.sizes) > 1]
        return sum(x.bytes for x in results if x.in_memory)
    return _bytes(i.type)


def _is_parameter(c: _Computation, name: str) -> bool:
    i = c.named[name]
    while i.opcode in _RENAMING:
        i = c.named[i.operands[0]]
    return i.opcode == "parameter"


# -- products ------------------------------------------------------------------------------------------


def _products(module: _Module, c: _Computation, i: _Instruction) -> Iterator[Product]:
    """The products of an instruction, or inside a fusion."""
    if i.opcode == "fusion" and (called := module.called(i)):
        for inner in called.instructions:
            yield from _products(module, called, inner)
    is_product = i.opcode in ("dot", "convolution") or re.search("gemm|cublas", i.target)
    if not is_product:
        return
    lhs, out = _arrays(c.type_of(i.operands[0]))[0], _arrays(i.type)[0]
    if i.opcode == "convolution":
        summed = _summed_by_convolution(i, lhs)
    else:
        found = re.search(
            r'lhs_contracting_dim(?:ension)?s"?[:=]\s*[\[{]([^\]}]*)[\]}]', i.attributes
        )
        summed = math.prod(lhs.sizes[int(n)] for n in re.findall(r"\d+", found[1] if found else ""))
    told = re.search(r"operand_precision[^\]}]*?\b(highest|high)\b", i.attributes, re.IGNORECASE)
    # JAX's precision applies only to float32.
    precision = f"f32 {told[1].lower()}" if told and lhs.dtype == "f32" else lhs.dtype
    yield Product(2.0 * math.prod(out.sizes) * summed, precision)


def _summed_by_convolution(i: _Instruction, lhs: _Array) -> int:
    """How many products are summed for each result: features times window, without batch dimensions."""
    labels = (i.attribute("dim_labels") or "").partition("_")[0]
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    sizes, dilations = (
        found[1].split("x")
        if window and (found := re.search(rf"{key}=([\dx]+)", window[1]))
        else []
        for key in ("size", "lhs_dilate")
    )
    dilations = dilations or ["1"] * len(sizes)
    spatial = [int(n) for n, by in zip(sizes, dilations, strict=True) if n != by or n == "1"]
    return lhs.sizes[labels.index("f")] * math.prod(spatial)


# -- collectives ---------------------------------------------------------------------------------------


def _collective(module: _Module, c: _Computation, i: _Instruction, in_loop: bool) -> Collective:
    opcode = i.opcode.removesuffix("-start")
    return Collective(opcode, _larger(c, i), in_loop, _group(module, i))


def _collective_within(module: _Module, c: _Computation, in_loop: bool) -> Collective | None:
    """The collective in a fusion: TPUs fuse an all-reduce with the slice of it that a device keeps."""
    for i in c.instructions:
        if i.opcode in _COLLECTIVES:
            found = _collective(module, c, i, in_loop)
            is_scattered = any(x.opcode == "dynamic-slice" for x in c.users.get(i.name, ()))
            return found._replace(kind="reduce-scatter") if is_scattered else found
    return None


def _bytes_of_results(i: _Instruction, given: float, size: Callable[[str], float]) -> float:
    """The size of the results. The type of a start operation may also include the operands."""
    size_of_type = size(i.type.replace("u32[]", ""))
    has_operands = i.opcode.endswith("-start") and size_of_type > given
    return size_of_type - given if has_operands else size_of_type


def _larger(c: _Computation, i: _Instruction) -> int:
    """The larger of operands and results: a gather's result, a reduce-scatter's operand."""
    given = sum(_size(c.type_of(x)) for x in i.operands)
    return int(max(given, _bytes_of_results(i, given, _size)))


def _size(type_text: str) -> float:
    return sum(array.bytes for array in _arrays(type_text))


def _group(module: _Module, i: _Instruction) -> int:
    """The number of devices in a group. The text gives groups as a list, an iota, or mesh axes."""
    if found := re.search(r"replica_groups=\{\{([0-9,]+)\}", i.attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[[0-9]+,([0-9]+)\]<=", i.attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", i.attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=([0-9]+)", found[1])}
        parts = re.findall(r"'(\w+)'(?::\([0-9]+\)([0-9]+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    everyone = re.search(r"num_partitions=([0-9]+)", module.text)
    return int(everyone[1]) if everyone else 1
