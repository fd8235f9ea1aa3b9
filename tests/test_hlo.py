"""The reader of compiled programs, against arithmetic: bytes, operations, turns of loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from support import installed

from jax_sce._hlo import kernels
from jax_sce.benchmark._accelerators import ACCELERATORS

N, V, D = 16384, 16384, 512  # more than fits on a chip
ONE = N * V * 4  # bytes of an array


@functools.cache
def here(machine):
    devices = jax.devices()[:1] if machine == "cpu" else installed(ACCELERATORS[machine], 1)
    return NamedSharding(Mesh(devices, ("x",)), P())


@pytest.fixture(params=["cpu", "h100", "v6e"])
def read(request):
    """The kernels of a function of arrays of those shapes, compiled for a machine."""
    machine = request.param

    def kernels_of(fn, *shapes, dtype=jnp.float32, **options):
        args = [jax.ShapeDtypeStruct(s, dtype, sharding=here(machine)) for s in shapes]
        if machine != "cpu":
            options["compiler_options"] = ACCELERATORS[machine].compiler_options
        return kernels(jax.jit(fn, **options).lower(*args).compile().as_text())

    return kernels_of


def moved(found):
    return sum(k.times * k.bytes for k in found)


def operations(found):
    return sum(k.times * p.operations for k in found for p in k.products)


@pytest.mark.parametrize(
    ("fn", "passes"),
    [
        (lambda x: -x, 2),
        (lambda x: jnp.sum(x, -1), 1),
        (lambda x: jnp.tanh(x) + jnp.sum(x), 3),
        (lambda x: x.T.copy(), 2),
        (lambda x: lax.slice_in_dim(x, 0, N // 4, axis=0) * 2, 0.5),
        (lambda x: jnp.sum(x[N // 2 :], -1), 0.5),
        (lambda x: jnp.take(x, jnp.arange(0, N, 8), axis=0, mode="clip"), 0.25),
    ],
    ids=["elementwise", "sum", "sum first", "transpose", "slice", "sum of a slice", "gather"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("read", ["h100", "v6e"], indirect=True)
def test_passes(read, fn, passes, dtype):
    got = moved(read(fn, (N, V), dtype=dtype)) / (N * V * jnp.dtype(dtype).itemsize)
    assert passes <= got < passes + 0.05


def test_an_update_of_a_part_in_place_writes_the_part(read):
    def fn(x, update):
        return lax.dynamic_update_slice(x, 2 * update, (64, 0))

    got = moved(read(fn, (N, V), (N // 8, V), donate_argnums=0))
    assert 0.25 * ONE <= got < 0.26 * ONE


@pytest.mark.parametrize("read", ["h100"], indirect=True)
def test_an_update_that_is_only_read_is_not_in_place(read):
    """As where a loss masks the classes that pad its vocabulary."""

    def masked(x, update):
        return jnp.sum(lax.dynamic_update_slice(x, update, (3, 5)) * 2, -1)

    assert ONE <= moved(read(masked, (N, V), (8, 8))) < 1.05 * ONE

    def part(x, update, at):
        return lax.dynamic_slice_in_dim(lax.dynamic_update_slice(x, update, (at, 5)), at, N // 4)

    got = moved(read(lambda x, u: part(x, u, jnp.int32(u[0, 0])), (N, V), (8, 8)))
    assert 0.5 * ONE <= got < 0.55 * ONE
    exponentials = read(lambda x: jnp.exp(x.at[:, 0].set(-jnp.inf)), (N, V))
    assert 2 * ONE <= moved(exponentials) < 2.05 * ONE

    def widened(x, update):
        wide = lax.dynamic_update_slice(x.astype(jnp.float32), update.astype(jnp.float32), (3, 5))
        return wide.astype(x.dtype)

    found = read(widened, (N, V), (8, 8), dtype=jnp.bfloat16)
    assert ONE <= moved(found) < 1.05 * ONE


@pytest.mark.parametrize("read", ["h100"], indirect=True)
def test_the_scratch_memory_of_a_product_costs_nothing(read):
    found = read(jnp.dot, (256, 256), (256, 256), dtype=jnp.bfloat16)
    assert moved(found) <= 6 * 256 * 256 * 2  # widened or copied before, at the most


def test_a_donated_update_is_two_passes(read):
    got = moved(read(lambda x: x * 0.5 + 1, (N, V), donate_argnums=0))
    assert 2 * ONE <= got < 2.01 * ONE


@pytest.mark.parametrize("spec", ["nd,dv->nv", "nd,vd->nv", "dn,dv->nv"])
def test_operations_of_a_product(read, spec):
    sizes = {"n": N, "d": D, "v": V}
    shapes = [tuple(sizes[x] for x in operand) for operand in (spec[:2], spec[3:5])]
    found = read(functools.partial(jnp.einsum, spec), *shapes, dtype=jnp.bfloat16)
    assert operations(found) == 2 * N * D * V
    assert {p.precision for k in found for p in k.products} <= {"bf16", "f32"}


def test_operations_of_a_batch_of_products(read):
    found = read(functools.partial(jnp.einsum, "bnd,bdv->bnv"), (8, 256, 128), (8, 128, 512))
    assert operations(found) == 8 * 2 * 256 * 128 * 512


def test_a_product_of_the_highest_precision_says_so(read):
    found = read(functools.partial(jnp.dot, precision="highest"), (N, D), (D, V))
    assert [p.precision for k in found for p in k.products] == ["f32 highest"]


@pytest.mark.parametrize("loop", ["scan", "fori_loop", "nested"])
def test_a_loop_counts_as_often_as_it_runs(read, loop):
    length = 6

    def body(x, w):
        return jnp.tanh(x @ w)

    def fn(x, w):
        if loop == "scan":
            return lax.scan(lambda x, _: (body(x, w), None), x, length=length)[0]
        if loop == "fori_loop":
            return lax.fori_loop(2, 2 + length, lambda _, x: body(x, w), x)
        inner = functools.partial(lax.fori_loop, 0, 3, lambda _, x: body(x, w))
        return lax.fori_loop(0, 2, lambda _, x: inner(x), x)

    found = read(fn, (512, D), (D, D))
    assert operations(found) == length * 2 * 512 * D * D
    once = read(body, (512, D), (D, D))
    assert operations(once) == 2 * 512 * D * D


@pytest.mark.parametrize("read", ["h100", "v6e"], indirect=True)
def test_a_scan_reads_its_slices(read):
    def fn(xs):
        return lax.scan(lambda total, x: (total + jnp.sum(x, -1), None), jnp.zeros(256), xs)[0]

    got = moved(read(fn, (64, 256, V)))
    assert 1 <= got / (64 * 256 * V * 4) < 1.05


def test_a_loop_until_the_data_is_done_runs_an_unknown_number_of_times(read):
    def fn(x):
        return lax.while_loop(lambda x: jnp.max(x) > 0, lambda x: jnp.sin(x) - 1, x)

    assert math.isnan(moved(read(fn, (N, V))))


def test_of_a_conditional_the_dearer_branch_counts(read):
    def fn(x):
        return lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ x), lambda x: jnp.sin(x) + 1, x)

    assert operations(read(fn, (1024, 1024))) == 2 * 1024**3


# -- what these compilers rarely show, as text --------------------------------------------------------


def program(*lines):
    return "\n".join(["ENTRY %main (a: f32[8]) -> f32[8] {", *(f"  {x}" for x in lines), "}"])


A = "%a = f32[8]{0} parameter(0)"


def test_what_lies_on_the_chip_costs_nothing():
    (found,) = kernels(program(A, "ROOT %b = f32[8]{0:T(128)S(1)} copy(%a)"))
    assert (found.read, found.written) == (32, 0)
    (found,) = kernels(program(A, "%b = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%a)"))
    assert (found.read, found.written) == (32, 0)
    (found,) = kernels(
        program(
            A, "%b = ((f32[8]{0}), f32[2]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2]}"
        )
    )
    assert (found.kind, found.read, found.written) == ("slice", 8, 0)


def test_a_kernel_says_itself_what_it_costs():
    config = '{"cost_estimate":{"flops":"12","transcendentals":"5","bytes_accessed":"777"}}'
    call = 'ROOT %b = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"'
    (told,) = kernels(program(A, f"{call}, backend_config={config}"))
    assert (told.bytes, told.products[0].operations, told.opaque) == (777, 12, False)
    (untold,) = kernels(program(A, call))
    assert (untold.bytes, untold.kind, untold.opaque) == (64, "tpu_custom_call", True)


def test_every_branch_if_asked():
    text = "\n".join(
        [
            "%one (x: f32[8]) -> f32[8] {",
            "  %x = f32[8]{0} parameter(0)",
            "  ROOT %y = f32[8]{0} negate(%x)",
            "}",
            "%two (x.1: f32[8]) -> f32[2] {",
            "  %x.1 = f32[8]{0} parameter(0)",
            "  ROOT %y.1 = f32[2]{0} slice(%x.1), slice={[0:2]}",
            "}",
            program(
                A,
                "%c = pred[] parameter(1)",
                "ROOT %b = f32[8]{0} conditional(%c, %a, %a), true_computation=%one, "
                "false_computation=%two",
            ),
        ]
    )
    assert [k.name for k in kernels(text)] == ["y"]
    assert [k.name for k in kernels(text, every_branch=True)] == ["y", "y.1"]


def test_the_parts_of_a_tuple_by_their_places():
    text = program(
        "%t = (f32[8]{0}, bf16[4]{0}) parameter(0)", "ROOT %b = f32[8]{0} add(%t#0, %t#1)"
    )
    (found,) = kernels(text)
    assert found.read == 32 + 8


def test_a_sum_that_a_tpu_scatters_at_once():
    mesh = Mesh(np.reshape(installed(ACCELERATORS["v6e"], 8), (2, 4)), ("data", "model"))
    split = NamedSharding(mesh, P("data", "model"))
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=NamedSharding(mesh, P("model")))
    found = kernels(jax.jit(jnp.dot, out_shardings=split).lower(x, w).compile().as_text())
    (crossing,) = [k.collective for k in found if k.collective]
    assert (crossing.kind, crossing.devices) == ("reduce-scatter", 4)
    assert crossing.bytes == 2048 * 4096 * 4


def test_what_a_loop_asks_other_devices_before_each_turn():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P("data")))

    def halve(x):
        return lax.while_loop(lambda x: jnp.max(x) > 0.1, lambda x: x / 2, x)

    text = jax.jit(halve).lower(x).compile().as_text()
    found = [k.collective for k in kernels(text, every_branch=True) if k.collective]
    assert [(c.kind, c.in_loop) for c in found] == [("all-reduce", True)]


def test_devices_of_a_group():
    groups = {
        "replica_groups={{0,1,2},{3,4,5}}": 3,
        "replica_groups=[2,4]<=[8]": 4,
        "replica_groups=mesh['data'=2,'model'=4] {'model'}": 4,
    }
    for attribute, devices in groups.items():
        text = program(A, f"ROOT %b = f32[8]{{0}} all-reduce(%a), {attribute}, to_apply=%add")
        (found,) = kernels(text)
        assert found.collective.devices == devices
        assert np.isclose(found.collective.sent, 2 * 32 * (devices - 1) / devices)
