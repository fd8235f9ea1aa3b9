"""What a loss moves through memory on a GPU, read from the program that XLA compiles for an H100.

No GPU is needed: `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt` in the version of jax, and
ptxas, for one from `nvidia-cuda-nvcc`. Without them these tests are skipped."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from support import DENSE, INTEGER

from jax_sce import linear_softmax_cross_entropy, shard
from jax_sce.testing import collectives

# What XLA asks of an H100 to choose its kernels by, as NVIDIA's data sheets give it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
# Autotuning runs kernels, for which a device is needed.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
N, V = 1024, 32000


@functools.cache
def devices():
    """Eight H100."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    topology = functools.partial(topologies.get_topology_desc, platform="cuda", target_config=H100)
    return topology(topology="1x1x8").devices


@functools.cache
def can_compile():
    try:
        jax.jit(jnp.negative, compiler_options=OPTIONS).lower(shape((8,), "float32")).compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if devices() and can_compile():
        pytest.skip(f"no ptxas: {can_compile()[:200]}")


def shape(dims, dtype, mesh=None, spec=None):
    mesh = Mesh(devices()[:1], ("x",)) if mesh is None else mesh
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec or P()))


def compiled(fn, *args):
    return jax.jit(fn, compiler_options=OPTIONS).lower(*args).compile()


def size(type_text):
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", type_text)
    return sum(SIZES.get(t, 4) * math.prod(map(int, filter(None, d.split(",")))) for t, d in arrays)


def instructions(text):
    """(name, type, opcode, operands, the rest of the line) of each line of a computation."""
    line = r"^\s+(?:ROOT )?%?([\w.\-#]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$"
    found = re.findall(line, text, re.M)
    return [(a, b, c, re.findall(r"%([\w.\-]+(?:#\d+)?)", d), e) for a, b, c, d, e in found]


def moved(text):
    """Bytes through memory: every kernel reads its operands and writes its results once. Of an array
    from which a kernel only gathers, it reads what it gathers."""
    computations = dict(re.findall(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    entry = instructions(text[text.index("\nENTRY ") :])
    sizes, total = {}, 0
    for name, type_text, *_ in entry:
        sizes[name] = size(type_text)
        if type_text.startswith("("):  # the parts of a tuple, as its readers name them
            parts = re.findall(r"\b[a-z]+\d*\[[\d,]*\]", type_text)
            sizes |= {f"{name}#{i}": size(part) for i, part in enumerate(parts)}
    for name, _, opcode, operands, rest in entry:
        if opcode in FREE:
            continue
        reads = [sizes.get(x, 0) for x in operands]
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        body = instructions(computations[called[1]]) if called else []
        for parameter, _, kind, _, _ in body:
            users = [(op, t) for _, t, op, args, _ in body if parameter in args]
            if kind == "parameter" and users and all(op == "gather" for op, _ in users):
                place = int(re.search(rf"%{re.escape(parameter)} = .* parameter\((\d+)\)", text)[1])
                reads[place] = sum(size(t) for _, t in users)
        total += sizes[name] + sum(reads)
    return total


def test_the_reader_counts_what_arithmetic_says():
    x = shape((N, V), "bfloat16")
    for fn, passes in ((lambda x: -x, 2), (lambda x: jnp.sum(x.astype(jnp.float32), -1), 1)):
        got = moved(compiled(fn, x).as_text()) / (N * V * 2)
        assert passes <= got < passes + 0.05


LABELS, CLASSES = ((N,), jnp.int32), ((N, V), None)
CASES = {  # the loss, further arguments, and the passes that are allowed: forward, and with the gradient
    "labels": (INTEGER, [LABELS], 1.15, 3.2),
    "smoothing": (functools.partial(INTEGER, label_smoothing=0.1), [LABELS], 1.15, 3.2),
    "z-loss": (functools.partial(INTEGER, z_loss=1e-4, ignore_index=-100), [LABELS], 1.15, 3.2),
    "weights": (lambda z, y, w, c, **k: INTEGER(z, y, weights=w, class_weights=c, **k),
                [LABELS, ((N,), jnp.float32), ((V,), jnp.float32)], 1.15, 3.2),
    "soft-cap": (functools.partial(INTEGER, softcap=30.0), [LABELS], 1.15, 3.2),
    "forward mode": (functools.partial(INTEGER, forward_mode=True), [LABELS], 1.15, 3.2),
    "mask of all": (lambda z, y, m, **k: INTEGER(z, y, where=m, **k), [LABELS, ((1, V), bool)],
                    1.15, 3.2),
    "mask of each": (lambda z, y, m, **k: INTEGER(z, y, where=m, **k), [LABELS, ((N, V), bool)],
                     1.7, 4.3),
    "distributions": (DENSE, [CLASSES], 2.2, 5.3),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_read_once_and_nothing_of_their_size_is_kept(case, dtype):
    loss, more, forward, both = CASES[case]
    z = shape((N, V), dtype)
    args = [shape(dims, dtype if kind is None else kind) for dims, kind in more]
    mean = functools.partial(loss, reduction="mean")
    for fn, limit in ((mean, forward), (jax.value_and_grad(mean), both)):
        program = compiled(fn, z, *args)
        nbytes = z.size * z.dtype.itemsize
        assert moved(program.as_text()) <= limit * nbytes
        assert program.memory_analysis().temp_size_in_bytes <= 0.05 * nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_classes_on_another_axis_are_not_transposed(dtype):
    z, y = shape((4, 150, 128, 128), dtype), shape((4, 128, 128), jnp.int32)
    mean = functools.partial(INTEGER, axis=1, reduction="mean")
    for fn, limit in ((mean, 1.3), (jax.value_and_grad(mean), 3.4)):
        assert moved(compiled(fn, z, y).as_text()) <= limit * z.size * z.dtype.itemsize


@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P(None, "model")], ids=str)
@pytest.mark.parametrize("kind", ["integer", "dense"])
def test_plain_jit_on_eight_gathers_row_statistics_alone(kind, spec):
    mesh = Mesh(np.reshape(devices(), (2, 4)), ("data", "model"))
    z = shape((N, V), jnp.bfloat16, mesh, spec)
    y = shape((N,), jnp.int32, mesh, P(spec[0])) if kind == "integer" else z
    loss = functools.partial(INTEGER if kind == "integer" else DENSE, reduction="mean")
    for c in collectives(compiled(jax.value_and_grad(loss), z, y)):
        assert c.bytes <= 4 * 4 * N * 4  # from each of four devices, four numbers a row


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("hidden", [P("data"), P(("data", "model"))], ids=str)
@pytest.mark.parametrize(
    "kernel",
    [P(None, "model"), P("data", "model"), P(None, ("data", "model")), P("data", None)],
    ids=str,
)
def test_plain_jit_on_eight_splits_a_head_as_shard_does(kernel, hidden, reduction):
    mesh, n, d, chunk = Mesh(np.reshape(devices(), (2, 4)), ("data", "model")), 4096, 256, 512
    x, w = shape((n, d), jnp.bfloat16, mesh, hidden), shape((d, V), jnp.bfloat16, mesh, kernel)
    classes = (kernel[1],) if isinstance(kernel[1], str) else kernel[1] or ()
    split = (hidden[0],) if isinstance(hidden[0], str) else hidden[0]
    batch = tuple(axis for axis in split if axis not in classes)
    of_shard = shard(
        linear_softmax_cross_entropy, mesh, batch=batch or None, classes=classes or None
    )
    sent = []
    for loss in (linear_softmax_cross_entropy, of_shard):

        def mean(x, w, y, loss=loss):
            return jnp.mean(loss(x, w, y, reduction=reduction, chunk_size=chunk))

        layout = None, (x.sharding, w.sharding)
        step = jax.jit(
            jax.value_and_grad(mean, (0, 1)), out_shardings=layout, compiler_options=OPTIONS
        )
        found = collectives(step.lower(x, w, shape((n,), jnp.int32, mesh, hidden)).compile())
        assert all(c.bytes <= 5 * chunk * 4 for c in found if c.in_loop)  # five numbers a row
        sent.append(sum(c.sent for c in found))
    assert sent[0] <= 1.2 * sent[1]


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_head_holds_a_chunk_and_multiplies_16_bit_numbers(softcap):
    """Three products a chunk, each of bfloat16 operands; the logits of a chunk, their cotangent and the
    sum of the kernel's gradient are all that is large."""
    n, d = 8192, 256
    args = shape((n, d), jnp.bfloat16), shape((d, V), jnp.bfloat16), shape((n,), jnp.int32)
    loss = functools.partial(linear_softmax_cross_entropy, softcap=softcap, reduction="mean")
    program = compiled(jax.value_and_grad(loss, (0, 1)), *args)
    text = program.as_text()
    types = {name: type_text for name, type_text, *_ in instructions(text)}
    products = [args for _, _, _, args, rest in instructions(text) if '"__cublas' in rest]
    assert len(products) == 3
    for args in products:
        assert [types[x].split("[")[0] for x in args[:2]] == ["bf16", "bf16"]
    chunk = 4096  # 2**27 logits
    held = chunk * V * (4 + 2) + d * V * (4 + 2)
    assert program.memory_analysis().temp_size_in_bytes <= 1.2 * held
