"""What a loss moves through memory on a GPU, read from the program that XLA compiles for an H100.

No GPU is needed, but `pip install -e ".[compiled]"`: without it these tests are skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from support import DENSE, INTEGER, installed, sparse

from jax_sce import linear_softmax_cross_entropy, shard
from jax_sce._hlo import kernels
from jax_sce.benchmark._accelerators import ACCELERATORS
from jax_sce.testing import collectives

H100 = ACCELERATORS["h100"]
N, V = 1024, 32000


@functools.cache
def devices():
    """Eight H100."""
    return installed(H100, 8)


def shape(dims, dtype, mesh=None, spec=None):
    mesh = Mesh(devices()[:1], ("x",)) if mesh is None else mesh
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec or P()))


def compiled(fn, *args):
    return jax.jit(fn, compiler_options=H100.compiler_options).lower(*args).compile()


def moved(program):
    return sum(kernel.times * kernel.bytes for kernel in kernels(program.as_text()))


def entropy(z, y, **options):
    loss, aux = INTEGER(z, y, return_aux=True, **options)
    return loss + jnp.sum(aux.entropy)


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
    "several classes": (sparse, [((N, 64), jnp.int32), ((N, 64), jnp.float32)], 1.3, 3.4),
    "temperature": (lambda z, y, t, **k: INTEGER(z, y, temperature=t, **k),
                    [LABELS, ((N,), jnp.float32)], 1.15, 3.2),
    "entropy": (entropy, [LABELS], 2.2, 4.3),
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
        assert moved(program) <= limit * nbytes
        # What several classes take is some numbers for each: 64 of 32000 here.
        kept = 0.1 if case == "several classes" else 0.05
        assert program.memory_analysis().temp_size_in_bytes <= kept * nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_classes_on_another_axis_are_not_transposed(dtype):
    z, y = shape((4, 150, 128, 128), dtype), shape((4, 128, 128), jnp.int32)
    mean = functools.partial(INTEGER, axis=1, reduction="mean")
    for fn, limit in ((mean, 1.3), (jax.value_and_grad(mean), 3.4)):
        assert moved(compiled(fn, z, y)) <= limit * z.size * z.dtype.itemsize


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
            jax.value_and_grad(mean, (0, 1)),
            out_shardings=layout,
            compiler_options=H100.compiler_options,
        )
        found = collectives(step.lower(x, w, shape((n,), jnp.int32, mesh, hidden)).compile())
        assert all(c.bytes <= 5 * chunk * 4 for c in found if c.in_loop)  # five numbers a row
        sent.append(sum(c.sent for c in found))
    assert sent[0] <= 1.2 * sent[1]


def test_a_wide_kernel_is_gathered_narrow_and_its_gradient_summed_wide():
    mesh, n, d = Mesh(np.reshape(devices(), (2, 4)), ("data", "model")), 4096, 256
    x = shape((n, d), jnp.bfloat16, mesh, P("data"))
    w = shape((d, V), jnp.float32, mesh, P("data", None))
    y = shape((n,), jnp.int32, mesh, P("data"))
    mean = functools.partial(linear_softmax_cross_entropy, reduction="mean", dtype=jnp.bfloat16)
    step = jax.jit(
        jax.grad(mean, 1), out_shardings=w.sharding, compiler_options=H100.compiler_options
    )
    found = collectives(step.lower(x, w, y).compile())
    assert max(c.bytes for c in found if c.kind == "all-gather") == 2 * d * V
    assert max(c.bytes for c in found if c.kind != "all-gather") == 4 * d * V


@pytest.mark.parametrize("kernel", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_head_holds_a_chunk_and_multiplies_16_bit_numbers(softcap, kernel):
    """Three products a chunk, each of bfloat16 operands; the logits of a chunk, their cotangent and the
    sum of the kernel's gradient are all that is large, and a float32 kernel rounded once."""
    n, d = 8192, 256
    args = shape((n, d), jnp.bfloat16), shape((d, V), kernel), shape((n,), jnp.int32)
    loss = functools.partial(
        linear_softmax_cross_entropy, softcap=softcap, reduction="mean", dtype=jnp.bfloat16
    )
    program = compiled(jax.value_and_grad(loss, (0, 1)), *args)
    products = [p for kernel in kernels(program.as_text()) for p in kernel.products]
    assert [p.precision for p in products] == ["bf16"] * 3
    chunk = 4096  # 2**27 logits
    held = chunk * V * (4 + 2) + d * V * (4 + 2)
    assert program.memory_analysis().temp_size_in_bytes <= 1.2 * held
