"""Losses compiled for machines that are not here: the cost of each pass, read from its program.

The floors are arithmetic. A loss of logits reads them once, and with its gradient once more and writes
it: 1 and 3 passes; distributions, as large as the logits, are read as often: 2 and 5. A head multiplies
2NDV, and 6NDV with its gradients, and reads and writes its arguments and gradients once.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from .._command import Progress, Steps, check_known
from .._hlo import Kernel, Product, kernels
from ._accelerators import ACCELERATORS, Accelerator, prepare
from ._cases import Case, shape_text
from ._peers import BASELINE, Peer, choose, compiled_peers, import_packages
from ._programs import Loss, pass_of
from ._row import FLOOR, Cost, Row, failed, related

_AXES = ("data", "model")
_SPECS = {  # of a case's arguments, which are also those of the gradients
    "logits": (P(*_AXES), P("data")),
    "softcap": (P(*_AXES), P("data")),
    "distributions": (P(*_AXES), P(*_AXES)),
    "linear": (P("data", None), P(None, "model"), P("data")),
}


def compile_all(
    cases: Sequence[Case],
    passes: Sequence[str],
    peers: Sequence[str] | None,
    losses: Mapping[str, Loss],
    machines: Sequence[str],
    mesh: tuple[int, int] | None,
    progress: Progress | None,
) -> list[Row]:
    """A row for each machine, case, pass and peer, the floor first."""
    if "eager_forward" in passes:
        raise ValueError("passes that are compiled cannot be eager_forward")
    if mesh is not None and (len(mesh) != 2 or min(mesh) < 1):
        raise ValueError(f"mesh must be two numbers of devices, examples and classes, got {mesh}")
    if not cases:
        return []
    prepare()
    subject = cases[0].subject
    on = {name: compiled_peers(subject, ACCELERATORS[name].platform) for name in machines}
    check_known(f"peers of {subject}", peers or (), [p for known in on.values() for p in known])
    work: list[tuple[Accelerator, Mesh, Case, str, list[Peer]]] = []
    for name in machines:
        machine = ACCELERATORS[name]
        devices = np.reshape(machine.devices(int(np.prod(mesh or 1))), mesh or (1, 1))
        names = [x for x in on[name] if peers is None or x in peers]
        chosen = choose(subject, machine.platform, names, losses)
        import_packages(chosen, Steps(0, progress))
        work += [
            (machine, Mesh(devices, _AXES), case, p, [x for x in chosen if x.fits(case, p)])
            for case in cases
            for p in passes
        ]
    step = Steps(sum(len(fitting) for *_, fitting in work), progress)
    rows = []
    for machine, of_devices, case, pass_name, fitting in work:
        group = [_floor(machine, mesh, case, pass_name)]
        for peer in fitting:
            shape = shape_text(case.shape)
            what = f"{case.subject} {shape} {case.dtype} {pass_name}"
            step(f"compiling {peer.name} for {machine.name}: {what}")
            row = _row(machine, mesh, case, pass_name, peer.name)
            try:
                group.append(_compile(row, machine, of_devices, case, peer))
            except Exception as error:
                group.append(failed(row, error))
        rows += related(group, BASELINE[case.subject])
    return rows


def _row(
    machine: Accelerator, mesh: tuple[int, int] | None, case: Case, pass_name: str, peer: str
) -> Row:
    of = case.subject, case.shape, case.dtype, pass_name, peer
    return Row(*of, status="failed", machine=machine.name, mesh=mesh)


def _compile(row: Row, machine: Accelerator, mesh: Mesh, case: Case, peer: Peer) -> Row:
    assert peer.loss is not None
    sizes = case.shape[0], case.shape[-1]
    if any(size % n for size, n in zip(sizes, mesh.devices.shape, strict=True)):
        raise ValueError(f"examples and classes must divide evenly over the mesh, got {sizes}")
    placed = [NamedSharding(mesh, spec) for spec in _SPECS[case.subject]]
    whole = NamedSharding(mesh, P())
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        for x, s in zip(case.arguments(), placed, strict=True)
    ]
    has_gradients = "grad" in row.pass_name
    begin = time.perf_counter()
    jitted = jax.jit(
        pass_of(peer.loss, case, row.pass_name),
        donate_argnums=(0,) if row.pass_name == "donated_gradient" else (),
        out_shardings=(whole, tuple(placed[:-1]) if has_gradients else ()),
        compiler_options=machine.compiler_options,
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it for the device
        program = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None
    assert memory is not None
    found = kernels(text)
    opaque = sorted({kernel.kind for kernel in found if kernel.opaque})
    return dataclasses.replace(
        row,
        status="ok",
        detail=f"has kernels that hide what they compute: {', '.join(opaque)}" if opaque else "",
        compile_seconds=seconds,
        temporary_bytes=memory.temp_size_in_bytes,
        cost=cost_of(found, machine, case, mesh.size),
    )


def cost_of(found: Sequence[Kernel], machine: Accelerator, case: Case, devices: int = 1) -> Cost:
    """The cost of these kernels on one of the devices.

    Raises:
      ValueError: How often a loop runs could not be read.
    """
    moved = sum(k.times * k.bytes for k in found)
    if moved != moved:
        raise ValueError("how often one of its loops runs could not be read")
    operations = None
    if not any(k.opaque for k in found):
        operations = round(sum(k.times * p.operations for k in found for p in k.products))
    first, *_ = case.arguments()
    n, *features, v = case.shape
    passes = products = None
    if not features:
        passes = moved * devices / (n * v * first.dtype.itemsize)
    elif operations is not None:
        products = operations * devices / (6 * n * features[0] * v)
    sent = [(k.times * k.collective.sent, k.collective.in_loop) for k in found if k.collective]
    return Cost(
        bytes=round(moved),
        operations=operations,
        kernels=round(sum(k.times for k in found)),
        passes=passes,
        products=products,
        sent=round(sum(x for x, _ in sent)),
        sent_in_loop=round(sum(x for x, in_loop in sent if in_loop)),
        seconds=machine.seconds(found),
    )


def _floor(machine: Accelerator, mesh: tuple[int, int] | None, case: Case, pass_name: str) -> Row:
    """The least that any loss moves and multiplies, as one kernel, shared evenly by the devices."""
    *floats, labels = case.arguments()
    has_gradients = "grad" in pass_name
    by_examples, by_classes = mesh or (1, 1)
    devices = by_examples * by_classes
    n, *features, v = case.shape
    if features:
        hidden, kernel = (x.size * x.dtype.itemsize for x in floats)
        once = hidden / by_examples + kernel / by_classes
        moved = once * (2 if has_gradients else 1)
        products = (6 if has_gradients else 2) * n * features[0] * v / devices
    else:
        logits = floats[0].size * floats[0].dtype.itemsize / devices
        reads = 2 if labels.ndim == 2 else 1
        moved = logits * (2 * reads + 1 if has_gradients else reads)
        products = 0.0
    precision = {"float32": "f32", "bfloat16": "bf16"}[case.dtype]
    kernel = Kernel(FLOOR, FLOOR, moved, 0, (Product(products, precision),))
    cost = dataclasses.replace(cost_of([kernel], machine, case, devices), kernels=None)
    row = _row(machine, mesh, case, pass_name, FLOOR)
    return dataclasses.replace(row, status="ok", temporary_bytes=0, cost=cost)
