"""What a compiled program does, read from its text: its kernels, and what they send between devices.

`jax_sce.benchmark` and `jax_sce.testing` share it; nothing in the library imports it.

    program = jax.jit(f).lower(*shapes).compile()
    for kernel in kernels(program.as_text()): ...

It is arithmetic on the text, by these rules:

- An instruction outside a fusion, or a fusion, is one kernel. It reads each operand from memory once and
  writes each result once. Where it only slices or gathers from an operand it reads that part; where it
  updates a part in place it writes that part.
- Arrays that the compiler places elsewhere than in device memory, such as a TPU's on-chip memory, cost
  nothing.
- Operations are those of matrix products, two for each multiplication with its addition.
- A loop's body counts as often as the loop runs: NaN times if only the running program knows.
- Of a conditional, the dearer branch counts: a byte is as dear as 300 operations.
- A custom call is a product of cuBLAS, or says itself what it costs (Pallas's `cost_estimate` on TPUs),
  or is `opaque`: then its operands and results count, and its operations are not known. Its scratch
  memory costs nothing.

Not in it: what tiles of a product read again, what caches save, elementwise arithmetic, padding of
layouts, the time between kernels, and that of the links between devices.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


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
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.devices - 1) / self.devices


@dataclasses.dataclass(frozen=True)
class Product:
    """`precision` is that of its operands, such as "bf16", or "f32 high" and "f32 highest" where JAX was
    told so."""

    operations: float
    precision: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one run of it costs, and how often it runs."""

    name: str
    kind: str  # its opcode; of a custom call, the target
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
    """Those of a compiled program, in the order of their launch; of conditionals all if asked for."""
    module = _Module(text)
    return list(_visit(module, module.entry, 1, False, every_branch))


# -- instructions --------------------------------------------------------------------------------------

# These read no more of an array than their result holds.
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice", "scatter"}
# The first only give an array another shape. All of them read an element for each that is read of them.
_RENAMING = {"bitcast", "reshape"}
_TRANSPARENT = _RENAMING | {"bitcast-convert", "convert", "copy", "transpose"}
_OPERATIONS_A_BYTE = 300  # an H100's rate over its bandwidth; 170 of a TPU v5p, 560 of a v6e
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
    in_memory: bool  # in the device's memory, and not on the chip

    @property
    def bytes(self) -> float:
        return math.prod(self.sizes) * self.itemsize


def _arrays(type_text: str) -> list[_Array]:
    return [
        _Array(
            found["dtype"],
            tuple(int(n) for n in found["sizes"].split(",") if n),
            int(found["bits"] or 8) / 8,  # a bool has 8
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
    arguments: str  # as they stand between the parentheses
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-#]+)", self.arguments)

    @property
    def target(self) -> str:
        """Of a custom call."""
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
        """Some programs name a tuple's part `name#1` where they use it."""
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
        """The computation that it runs, or applies to pairs of elements."""
        for key in ("calls", "to_apply"):
            if name := i.attribute(key):
                return name
        found = re.search(r"called_computations=\{%?([\w.\-]+)", i.attributes)
        return found[1] if found else ""

    def called(self, i: _Instruction) -> _Computation | None:
        return self.computations.get(self.called_name(i))


def _instruction(found: re.Match[str]) -> _Instruction:
    """`type opcode(arguments), attributes`, where a tuple's type is in parentheses itself."""
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
    """Where the parenthesis at `start` closes."""
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
            turns = _turns(module, computation, i)
            parts = ("body", "condition") if every_branch else ("body",)
            for part in parts:
                inner = i.attribute(part) or ""
                yield from _visit(module, inner, times * turns, True, every_branch)
        elif opcode == "conditional":
            branches = [list(_visit(module, b, times, in_loop, every_branch)) for b in _branches(i)]
            if not every_branch:
                branches = [max(branches, key=_dearness)]
            yield from itertools.chain(*branches)
        elif opcode in ("call", "async") or i.opcode == "custom-call-start":
            yield from _visit(module, module.called_name(i), times, in_loop, every_branch)
        else:
            yield dataclasses.replace(_kernel(module, computation, i, in_loop), times=times)


def _dearness(branch: list[Kernel]) -> float:
    return sum(
        k.times * (k.bytes + sum(p.operations for p in k.products) / _OPERATIONS_A_BYTE)
        for k in branch
    )


def _branches(i: _Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
        return re.findall(r"%?([\w.\-]+)", found[1])
    return [x for key in ("true", "false") if (x := i.attribute(f"{key}_computation"))]


def _turns(module: _Module, outer: _Computation, loop: _Instruction) -> float:
    """How often it runs: as XLA says, or from `while i < n` with n and the first i constants."""
    if known := re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.attribute("condition") or ""]
    initial = outer.named[loop.operands[0]]

    def constant(c: _Computation, name: str) -> tuple[int | None, int | None]:
        """The value that an instruction has at the loop's start, and its place in the loop's state."""
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


# -- what a kernel costs -------------------------------------------------------------------------------


def _kernel(module: _Module, c: _Computation, i: _Instruction, in_loop: bool) -> Kernel:
    kind = i.target or i.opcode
    opcode = i.opcode.removesuffix("-start")
    if opcode in _COLLECTIVES:
        collective = _collective(module, c, i, in_loop)
        given = sum(_bytes(c.type_of(x)) for x in i.operands)
        return Kernel(i.name, opcode, given, _came(i, given, _bytes), collective=collective)
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
    if called is None:  # as if it were the only one of a fusion
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
    """Bytes of that value that its users in the computation read."""
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
    """Is it one of the results of the computation, and read by nothing there?"""
    while not i.is_root:
        users = c.users.get(i.name, [])
        if len(users) != 1 or users[0].opcode not in _RENAMING | {"tuple"}:
            return False
        i = users[0]
    return True


def _elements(type_text: str) -> float:
    return sum(math.prod(array.sizes) for array in _arrays(type_text))


def _written(module: _Module, c: _Computation, i: _Instruction, *, fused: bool) -> float:
    """Bytes that making the value of `i` writes: of an update in place, what is new."""
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
    if i.opcode == "custom-call" and i.type.startswith("("):  # flat bytes are its scratch memory
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
    """Those of an instruction, and of a fusion, those within."""
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
    # Other types are multiplied as they are, whatever JAX was told.
    precision = f"f32 {told[1].lower()}" if told and lhs.dtype == "f32" else lhs.dtype
    yield Product(2.0 * math.prod(out.sizes) * summed, precision)


def _summed_by_convolution(i: _Instruction, lhs: _Array) -> int:
    """Numbers summed for each result: the features, and the window but where it stands for a batch."""
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
    """That of a fusion: on TPUs an all-reduce and the slice of it that a device keeps are one."""
    for i in c.instructions:
        if i.opcode in _COLLECTIVES:
            found = _collective(module, c, i, in_loop)
            is_scattered = any(x.opcode == "dynamic-slice" for x in c.users.get(i.name, ()))
            return found._replace(kind="reduce-scatter") if is_scattered else found
    return None


def _came(i: _Instruction, given: float, size: Callable[[str], float]) -> float:
    """The results: what starts an operation may hold the operands in its type, beside them."""
    came = size(i.type.replace("u32[]", ""))
    return came - given if i.opcode.endswith("-start") and came > given else came


def _larger(c: _Computation, i: _Instruction) -> int:
    """Of what goes in and what comes out: a gather's result, a scattered sum's operand."""
    given = sum(_size(c.type_of(x)) for x in i.operands)
    return int(max(given, _came(i, given, _size)))


def _size(type_text: str) -> float:
    return sum(array.bytes for array in _arrays(type_text))


def _group(module: _Module, i: _Instruction) -> int:
    """How many devices a group has: listed, as the last of the sizes of an iota, or as mesh axes."""
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
