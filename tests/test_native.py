"""The native CPU kernels: what they give, where they are used, and that nothing else changes."""

import ctypes
import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from support import targets_of

from jax_sce import (
    _cpu,
    _divergence,
    _native,
    _rows,
    linear_softmax_cross_entropy,
    native,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels as integer_loss,
)
from jax_sce._rows import Rows
from jax_sce.testing import collectives

needs_kernels = pytest.mark.skipif(
    not native.status().available, reason=f"no kernels: {native.status().detail}"
)
U = 2.0**-24

LEVELS = (b"baseline", b"x86_64_v3", b"x86_64_v4")


def compiled(functions, name, *args):
    """Of the arrays that an operation gives, without arguments."""
    return jax.jit(lambda: jax.tree.leaves(functions[name](*args))).lower().compile()


FORMS = {
    "spread": _rows.spread,
    "divergence_sums": _divergence.divergence_sums,
} | _cpu.FORMS


def run_plain(name, *args):
    """In plain JAX, by the form of it whose sums are in blocks on CPU, as the bounds are for."""
    return compiled(FORMS, name, *args)()


def rows(z, mask=None):
    return Rows(z, (-1,), mask)


@pytest.fixture
def run():
    """A kernel's results, by every instruction set that there are kernels for here."""
    library = ctypes.CDLL(str(native._find()))
    library.jax_sce_use.restype = ctypes.c_char_p
    levels = [name for name in LEVELS if library.jax_sce_use(name)]

    def run(name, *args):
        kernel = compiled(_cpu.KERNELS, name, *args)
        for level in levels:
            library.jax_sce_use(level)
            yield jax.block_until_ready(kernel())

    yield run
    library.jax_sce_use(native.status().detail.encode())


# -- what they give -----------------------------------------------------------------------------------


@needs_kernels
def test_the_exponential_is_within_its_bound_everywhere(run):
    """Of every 64th float from -2^-149 to -104, of those about 0, and at the end of the range."""
    bits = np.arange(0x80000001, 0xC2D00000, 64, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), np.float32([-0.0, 0.0, -87.336544, -88.0, -np.inf])])
    want = np.exp(x.astype(np.float64))
    normal = want >= 2.0**-126
    one, none = jnp.ones((1, 1)), jnp.full((1, 1), -1, jnp.int32)
    for (got,) in run("label_cotangent", rows(jnp.asarray(x)[None]), none, 0 * one, one, one, None):
        got = np.asarray(got)[0].astype(np.float64)
        error = np.abs(got - want)
        assert np.max(error[normal] / want[normal]) <= 2 * U
        assert np.max(error[~normal]) <= 2.0**-126
        assert np.all(got[x == 0] == 1)
        assert np.all(got[x < -88.1] == 0)


def problem(num_rows, num_classes, dtype, mask, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    z = (4 * jax.random.normal(next(keys), (num_rows, num_classes))).astype(dtype)
    z = z.at[0, -1].set(90)  # confident
    labels = jax.random.randint(next(keys), (num_rows,), -1, num_classes)
    where = {
        "none": None,
        "shared": jax.random.bernoulli(next(keys), 0.7, (1, num_classes)).at[0, 0].set(True),
        "own": jax.random.bernoulli(next(keys), 0.7, z.shape).at[:, 0].set(True),
    }[mask]
    targets = jax.nn.softmax(jax.random.normal(next(keys), z.shape)).astype(dtype)
    factors = jax.random.normal(next(keys), (2, num_rows, 1)).at[:, 1].set(0)
    return z, labels, where, targets, *factors


def assert_close(got, want, rtol, atol):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def of_labels(statistics, labels):
    """With the label's distance from the maximum in place of its logit, as the loss has it. That is
    anything where the label is no class, and then the row is NaN, as it is where the tail is."""
    highest, tail, at_label, *kept = statistics
    is_lost = (labels < 0) | jnp.isnan(tail)
    return highest, tail, jnp.where(is_lost, jnp.nan, at_label - highest), *kept


def of_targets(statistics):
    """With NaN for the sum of `y (z - max)` where that of `y` is NaN, for then the row is."""
    highest, tail, mass, dot, *kept = statistics
    return highest, tail, mass, jnp.where(jnp.isnan(mass), jnp.nan, dot), *kept


def rounding(dtype):
    """Two roundings to a dtype that may fall apart: relative, and below its normal numbers absolute."""
    info = jnp.finfo(dtype)
    return (0, 0) if info.bits == 32 else (float(info.eps), float(info.smallest_subnormal))


@needs_kernels
@pytest.mark.parametrize(
    ("num_classes", "dtype", "mask"),
    [
        (1, "float32", "none"),
        (10, "bfloat16", "shared"),
        (100, "float32", "own"),
        (113, "float32", "none"),
        (1025, "float32", "none"),
        (1025, "bfloat16", "shared"),
        (1025, "float16", "own"),
        (4097, "bfloat16", "none"),
    ],
)
def test_they_are_what_plain_jax_is(num_classes, dtype, mask, run):
    """To the bounds of `_rows.py`, twice: 16u for sums, (6 + distance) 2^-22 for cotangents, where no
    distance is above 120. Of each class, what is below the smallest normal number may be lost."""
    z, labels, where, targets, g, h = problem(40, num_classes, dtype, mask)
    view, ids = rows(z, where), labels[:, None]
    lost = num_classes * 2.0**-125
    want = run_plain("label_statistics", view, ids)
    for got in run("label_statistics", view, ids):
        assert_close(of_labels(got, ids), of_labels(want, ids), 32 * U, lost)

    of_dtype, subnormal = rounding(dtype)
    rtol, highest = of_dtype + 2 * 126 * 2.0**-22, want[0]
    args = view, ids, highest, g, h, None
    want = run_plain("label_cotangent", *args)
    for got in run("label_cotangent", *args):
        assert_close(got, want, rtol, lost + subnormal)
        assert np.all(np.asarray(got[0][1], np.float32) == 0)

    (sums,) = run_plain("spread", view, highest)
    for (got,) in run("spread", view, highest):
        # What may be lost of a term is multiplied by its distance.
        np.testing.assert_allclose(got, sums, rtol=16 * U, atol=128 * lost)
    slope = jnp.flip(g).at[1].set(0)
    args = view, ids, highest, g, h, slope
    sloped = run_plain("label_cotangent", *args)
    for got in run("label_cotangent", *args):  # relative to the terms of what may cancel
        assert_close(got, sloped, rtol, lost + subnormal + 40 * 2.0**-22 + 4 * of_dtype)
        assert np.all(np.asarray(got[0][1], np.float32) == 0)

    uniform, smoothing = jnp.full((1, 1), 1 / num_classes), jnp.full((1, 1), 0.25)
    weights = jnp.linspace(0, 2, num_classes)[None]
    for options in ((None, uniform, None), (smoothing, uniform, weights)):
        for y in (targets, ids):
            args = view, targets_of(y, *options)
            want = run_plain("target_statistics", *args)
            for got in run("target_statistics", *args):
                assert_close(of_targets(got), of_targets(want), 32 * U, lost)
            # Relative to the terms of the difference: g, h and the targets are at most some 4.
            args = *args, *want[:3], g, h, None
            want = run_plain("target_cotangent", *args)
            for got in run("target_cotangent", *args):
                assert_close(got, want, rtol, 40 * 2.0**-22 + 4 * of_dtype)


@needs_kernels
@pytest.mark.parametrize("num_classes", [1, 10, 113, 1025])
@pytest.mark.parametrize("apart", [1e-3, 3.0])
def test_divergences_are_what_they_are_in_plain_jax(num_classes, apart, run):
    z, *_, g, h = problem(40, num_classes, "float32", "none")
    noise = jax.random.normal(jax.random.key(5), z.shape)
    of_teacher = z + apart * noise
    if num_classes > 2:
        z, of_teacher = z.at[3, 1].set(-jnp.inf), of_teacher.at[3:5, 1].set(-jnp.inf)
    stats = []
    for x in (z, of_teacher):
        highest = jnp.max(x, axis=-1, keepdims=True)
        stats += [highest, jnp.sum(jnp.exp(x - highest), axis=-1, keepdims=True) - 1]
    shift = jnp.log1p(stats[3]) - jnp.log1p(stats[1])
    args = rows(z), rows(of_teacher), *stats, shift
    want = run_plain("divergence_sums", *args)
    for got in run("divergence_sums", *args):
        # The second sum cancels: relative to its terms, which are of the size of `apart` at most.
        np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=1e-30)
        np.testing.assert_allclose(got[1], want[1], rtol=0, atol=32 * U * min(apart, 2))
    args = *args, g, h, None
    want = run_plain("divergence_cotangent", *args)
    for got in run("divergence_cotangent", *args):
        assert_close(got, want, 2e-6, 32 * U)
        assert np.all(np.asarray(got[0][1]) == 0)


@needs_kernels
def test_special_rows_are_as_in_plain_jax(run):
    inf, nan = jnp.inf, jnp.nan
    for num_classes in (3, 70, 1100):
        z = jnp.zeros((7, num_classes)).at[:, 1].set(2.0)
        z = z.at[0].set(-inf).at[1, 0].set(inf).at[2, 2].set(nan).at[3].set(nan)
        z = z.at[4].set(-inf).at[4, 2].set(5.0).at[5, 0].set(-inf).at[6].set(1e8)
        args = rows(z), jnp.zeros((7, 1), jnp.int32)
        want = of_labels(run_plain("label_statistics", *args), args[1])
        for got in run("label_statistics", *args):
            assert_close(of_labels(got, args[1])[1:], want[1:], 16 * U, 0)
            highest = np.array([-inf, inf, nan, nan, 5, 2, 1e8], np.float32)
            np.testing.assert_array_equal(got[0][:, 0], highest)


@needs_kernels
def test_infinite_cotangents_are_as_in_plain_jax(run):
    for num_classes in (3, 300):
        z, _, where, targets, *_ = problem(2, num_classes, "float32", "none")
        g = jnp.array([[jnp.inf], [-jnp.inf]])
        args = rows(z, where), targets_of(targets, None, jnp.full((1, 1), 1 / num_classes), None)
        largest, tail, mass, _ = run_plain("target_statistics", *args)
        args = *args, largest, tail, mass, g, jnp.zeros((2, 1)), None
        want = run_plain("target_cotangent", *args)
        assert np.all(np.isinf(want))
        for got in run("target_cotangent", *args):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["ids", "smoothed", "dense", "weighted"])
def test_a_cotangent_of_0_hides_no_nan(kind):
    """As in plain JAX, where it is 0 times NaN; but for a weight of 0, which leaves the row out."""
    z = jnp.zeros((3, 5)).at[1, 2].set(jnp.nan).at[2, 0].set(jnp.inf)
    ids, targets = jnp.zeros(3, jnp.int32), jnp.full((3, 5), 0.2)
    loss = {
        "ids": lambda z: integer_loss(z, ids),
        "smoothed": lambda z: integer_loss(z, ids, label_smoothing=0.1),
        "dense": lambda z: softmax_cross_entropy(z, targets),
        "weighted": lambda z: softmax_cross_entropy(z, targets, weights=jnp.zeros(3)),
    }[kind]
    (got,) = jax.vjp(loss, z)[1](jnp.zeros(3))
    want = jnp.zeros((3, 5)) if kind == "weighted" else jnp.zeros((3, 5)).at[1:].set(jnp.nan)
    np.testing.assert_array_equal(got, want)


@needs_kernels
@pytest.mark.parametrize("num_classes", [7, 300, 5000])
def test_a_row_does_not_hang_on_the_others(num_classes):
    z, labels, *_ = problem(100, num_classes, "float32", "none")
    grad = jax.jit(jax.value_and_grad(lambda z, y: jnp.sum(integer_loss(z, y, weights=y >= 0))))
    part = slice(32, 64)
    np.testing.assert_array_equal(grad(z, labels)[1][part], grad(z[part], labels[part])[1])


SCRIPT = """
import hashlib
import jax, numpy as np
from jax_sce import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels as loss, native
assert native.status().available
digest = hashlib.sha256()
draws = np.random.default_rng(0)  # and not JAX's, which may hang on the threads
for n, v in ((5000, 10), (300, 1000), (9, 40000)):
    z = 3 * draws.standard_normal((n, v), np.float32)
    y, p = draws.integers(0, v, n), draws.random((n, v), np.float32)
    for f in (lambda z: loss(z, y), lambda z: softmax_cross_entropy(z, p)):
        out, pull = jax.vjp(jax.jit(f), z)
        digest.update(out.tobytes() + pull(out)[0].tobytes())
print(digest.hexdigest())
"""


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    def digest(threads):
        env = {**os.environ, "NPROC": str(threads), "XLA_FLAGS": ""}
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        return out.stdout

    assert len({digest(threads) for threads in (1, 5)}) == 1


# -- where they are used ------------------------------------------------------------------------------


def compiled_text(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gradient_is_two_calls_and_writes_nothing_of_the_logits_size(dtype):
    z, ids = jnp.zeros((64, 4096), dtype), jnp.zeros(64, jnp.int32)
    for loss, labels in ((integer_loss, ids), (softmax_cross_entropy, z)):
        step = jax.jit(
            jax.grad(lambda z, y, loss=loss: loss(z, y, reduction="mean")), donate_argnums=0
        )
        compiled = step.lower(z, labels).compile()
        assert compiled.as_text().count('custom_call_target="jax_sce') == 2
        assert compiled.memory_analysis().temp_size_in_bytes < z.nbytes / 50


@needs_kernels
def test_logits_that_were_reshaped_are_not_copied():
    """As those of a model are: XLA multiplies [batch * time, D] by [D, V], and reshapes that."""
    z, y = jnp.zeros((64, 4096)), jnp.zeros((8, 8), jnp.int32)

    def loss(z):
        return integer_loss(z.reshape(8, 8, 4096), y, reduction="mean")

    compiled = jax.jit(jax.grad(loss), donate_argnums=0).lower(z).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < z.nbytes / 50


@needs_kernels
def test_what_they_do_not_compute_is_left_to_xla():
    z, y = jnp.zeros((4, 300)), jnp.zeros(4, jnp.int32)
    assert "jax_sce" in compiled_text(lambda z: integer_loss(z, y), z)
    assert "jax_sce." not in compiled_text(lambda z: integer_loss(z, y, softcap=3.0), z)
    with jax.enable_x64(True):
        wide = jnp.zeros((4, 300), jnp.float64)
        assert "jax_sce." not in compiled_text(lambda z: integer_loss(z, y), wide)


@needs_kernels
def test_an_exported_program_does_without_them():
    z, y = jnp.zeros((4, 300)), jnp.zeros(4, jnp.int32)
    program = jax.jit(jax.grad(lambda z: integer_loss(z, y, reduction="mean")))
    for platforms in (["cpu"], ["cpu", "cuda", "tpu"]):
        exported = export.export(program, platforms=platforms)(z)
        assert "jax_sce." not in exported.mlir_module()
        np.testing.assert_allclose(exported.call(z), program(z), rtol=1e-6)


@needs_kernels
def test_vmap_over_anything():
    """Over what each row has of its own it is one call; class weights of each example are plain JAX."""
    keys = jax.random.split(jax.random.key(0), 4)
    z = jax.random.normal(keys[0], (3, 5, 70))
    y = jax.random.randint(keys[1], (3, 5), 0, 70)
    w = jax.random.uniform(keys[2], (3, 70))

    def one(z, y, w):
        return integer_loss(z, y, class_weights=w, label_smoothing=0.1)

    for axes in (
        (0, 0, 0),
        (0, 0, None),
        (1, 1, None),
        (0, None, None),
        (None, 0, None),
        (None, None, 0),
    ):
        z_in, y_in, w_in = (
            x if axis is not None else x[0] for x, axis in zip((z, y, w), axes, strict=True)
        )
        if axes[0] == 1:
            z_in, y_in = z.swapaxes(0, 1), y.swapaxes(0, 1)
        got = jax.jit(jax.vmap(one, axes))(z_in, y_in, w_in)
        want = [
            one(
                *(
                    x[i] if axis is not None else x[0]
                    for x, axis in zip((z, y, w), axes, strict=True)
                )
            )
            for i in range(3)
        ]
        np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-6)
    text = compiled_text(jax.vmap(one, (0, 0, None)), z, y, w[0])
    assert text.count('custom_call_target="jax_sce') == 1


@needs_kernels
@pytest.mark.parametrize("kind", ["ids", "dense", "head", "smoothed head"])
def test_second_derivatives_and_forward_mode(kind):
    """In float32, by every order of the modes: JAX 0.10 forgets some rules in reverse over reverse mode.
    No entry is above 4, and each sums some ten terms with an error of 8u."""
    draw = np.random.default_rng(5)
    z, hidden = draw.normal(size=(2, 5)), draw.normal(size=(3, 2))
    ids, y = np.array([1, 4, 0]), draw.dirichlet(np.ones(5), 3)

    def loss(z, **options):
        if kind == "ids":
            return integer_loss(hidden @ z, ids, reduction="sum", **options)
        if kind == "dense":
            return softmax_cross_entropy(hidden @ z, y, reduction="sum", **options)
        smoothing = 0.1 * (kind == "smoothed head")
        return linear_softmax_cross_entropy(
            hidden, z, ids, label_smoothing=smoothing, reduction="sum", chunk_size=2, **options
        )

    def reference(z):
        hot = jax.nn.one_hot(ids, 5, dtype=z.dtype)
        hot = {"dense": y, "smoothed head": 0.9 * hot + 0.02}.get(kind, hot)
        return -jnp.sum(hot * jax.nn.log_softmax(hidden @ z))

    with jax.enable_x64(True):
        want = jax.hessian(reference)(z)
    z, hidden, y = (jnp.asarray(x, jnp.float32) for x in (z, hidden, y))
    forward = functools.partial(loss, forward_mode=True)
    for got in (
        jax.jacrev(jax.grad(loss)),
        jax.jacfwd(jax.grad(loss)),
        jax.jacrev(jax.jacfwd(forward)),
        jax.hessian(forward),
    ):
        np.testing.assert_allclose(jax.jit(got)(z), want, rtol=0, atol=4 * 80 * U)


@needs_kernels
def test_without_jit():
    z, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([0])
    with jax.disable_jit():
        got = jax.value_and_grad(lambda z: integer_loss(z, y, reduction="sum"))(z)
    want = jax.value_and_grad(lambda z: integer_loss(z, y, reduction="sum"))(z)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


@needs_kernels
@pytest.mark.parametrize("kind", ["masked", "smoothed", "dense"])
@pytest.mark.parametrize(
    "spec", [P("data", "model"), P("data", None, "model")], ids=["examples", "classes"]
)
def test_plain_jit_splits_them_and_gathers_nothing(spec, kind):
    """Each device does its own rows; where the classes are split, a maximum and a sum cross."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(0), 3)
    z = 3 * jax.random.normal(keys[0], (16, 4, 512))
    y = jax.random.randint(keys[1], (16, 4), 0, 512)
    dense = jax.nn.softmax(jax.random.normal(keys[2], z.shape))
    where = jnp.arange(512)[None, None] % 5 > 0

    def loss(z, y):
        if kind == "dense":
            return softmax_cross_entropy(z, dense, reduction="mean")
        options = {
            "masked": {"where": where},
            "smoothed": {"label_smoothing": 0.1, "class_weights": jnp.linspace(0, 2, 512)},
        }[kind]
        return integer_loss(z, jnp.where(y % 5 == 0, 1, y), reduction="mean", **options)

    step = jax.jit(jax.value_and_grad(loss))
    placed = (
        jax.device_put(z, NamedSharding(mesh, spec)),
        jax.device_put(y, NamedSharding(mesh, P(*spec[:2]))),
    )
    compiled = step.lower(*placed).compile()
    # Of each row at most a maximum and four sums; and XLA makes the class weights in parts.
    assert max(c.bytes for c in collectives(compiled)) <= max(4 * 64, 512) * 4
    splits_classes = len(spec) == 3
    assert compiled.as_text().count('custom_call_target="jax_sce') == (0 if splits_classes else 2)
    got, want = compiled(*placed), step(z, y)
    assert got[1].sharding.is_equivalent_to(placed[0].sharding, 3)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-9)


@needs_kernels
@pytest.mark.parametrize(
    ("z_spec", "y_spec", "out_spec"),
    [
        (P(), P("data"), P()),
        (P("data"), P("model"), P("data")),
        (P("data"), P(), P("data")),
        (P(), P(), P("data")),
        (P("data"), P("data", "model"), P("data")),
    ],
)
@pytest.mark.parametrize("kind", ["ids", "masked", "dense"])
def test_plain_jit_splits_what_was_split_otherwise(kind, z_spec, y_spec, out_spec):
    """The labels, the mask and the gradient follow the logits, however they were given or are wanted."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    z, ids, _, targets, *_ = problem(16, 40, "float32", "none")
    ids = jnp.maximum(ids, 0)
    other = {"ids": ids, "masked": jnp.ones(z.shape, bool).at[:, 3:9].set(False), "dense": targets}[
        kind
    ]
    if kind == "ids":
        y_spec = P(*y_spec[:1])

    def loss(z, other):
        if kind == "dense":
            return jnp.sum(softmax_cross_entropy(z, other))
        if kind == "masked":
            return jnp.sum(integer_loss(z, jnp.zeros_like(ids), where=other, label_smoothing=0.1))
        return jnp.sum(integer_loss(z, other))

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    step = jax.jit(
        jax.value_and_grad(loss),
        out_shardings=(NamedSharding(mesh, P()), NamedSharding(mesh, out_spec)),
    )
    got, want = step(put(z, z_spec), put(other, y_spec)), jax.value_and_grad(loss)(z, other)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-8)


@needs_kernels
def test_inside_shard_map_each_device_calls_them():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    z, y, *_ = problem(64, 300, "float32", "none")

    def gradient(z, y):
        return jax.grad(lambda z: jnp.sum(integer_loss(z, y)))(z)

    spec = P(("data", "model"))
    split = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec))
    assert compiled_text(split, z, y).count('custom_call_target="jax_sce') == 2
    np.testing.assert_array_equal(split(z, y), jax.jit(gradient)(z, y))


# -- what there is to tell ----------------------------------------------------------------------------


ON_ANY_DEVICES = """
import jax, numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from jax_sce import softmax_cross_entropy_with_integer_labels as loss

def step(z, y):
    return jax.value_and_grad(loss)(z, y, reduction="mean")

def sharding(kind, sizes, names, *spec):
    return NamedSharding(kind(sizes, names, axis_types=(AxisType.Auto,) * len(sizes)), P(*spec))

def check(compiled, *args):
    got, want = compiled(*args), jax.jit(step)(z, y)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-9)
    print(compiled.as_text().count('custom_call_target="jax_sce'))

draws, devices = np.random.default_rng(0), jax.devices()
z = draws.normal(size=(16, 600)).astype(np.float32)
y = draws.integers(0, 600, 16, dtype=np.int32)
n, half = len(devices), max(len(devices) // 2, 1)
one = sharding(jax.make_mesh, (n,), ("a",), "a")

# Several meshes in one program.
other = sharding(jax.make_mesh, (half, n // half), ("b", "c"), ("b", "c"))
placed = jax.device_put(z, one), jax.device_put(y, other)
check(jax.jit(step).lower(*placed).compile(), *placed)

# One that is abstract, beside one that is not.
abstract = sharding(AbstractMesh, (half, n // half), ("d", "e"), ("d", "e"))
fn = jax.jit(lambda z, y: step(jax.lax.with_sharding_constraint(z, abstract), y))
placed = jax.device_put(z, one), jax.device_put(y, one)
check(fn.lower(*placed).compile(), *placed)

# An abstract one alone, which is told its devices when it is compiled; and one that has too many.
shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=abstract) for x in (z, y)]
lowered = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cpu",))
placed = [jax.device_put(x, sharding(jax.make_mesh, (half, n // half), ("d", "e"), ("d", "e")))
          for x in (z, y)]
check(lowered.compile(device_assignment=tuple(devices)), *placed)
many = sharding(AbstractMesh, (64,), ("a",), "a")
shapes = [jax.ShapeDtypeStruct((128, *x.shape[1:]), x.dtype, sharding=many) for x in (z, y)]
for platforms in (("tpu",), ("cpu",), ("cpu", "tpu")):
    jax.jit(step).trace(*shapes).lower(lowering_platforms=platforms)
"""


@needs_kernels
@pytest.mark.parametrize("devices", [1, 8])
def test_a_program_may_name_any_meshes(devices):
    """Several, and abstract ones: only who splits has to know the devices. Every device calls the
    kernels, that of the statistics and that of the cotangent, for its own rows."""
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    out = subprocess.run(
        [sys.executable, "-c", ON_ANY_DEVICES], env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["2", "2", "2"]


@needs_kernels
def test_inside_shard_map_a_program_may_be_for_more_devices_than_there_are():
    """Nothing is to be split there."""
    mesh = AbstractMesh((64,), ("a",), axis_types=(AxisType.Auto,))
    z, y = jnp.zeros((64, 600)), jnp.zeros(64, jnp.int32)
    split = jax.shard_map(integer_loss, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    export.export(jax.jit(split), platforms=["cpu", "tpu"])(
        *(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("a")))
            for x in (z, y)
        )
    )


def status_with(choice):
    return subprocess.run(
        [sys.executable, "-c", "from jax_sce import native; print(native.status())"],
        env={**os.environ, "JAX_SCE_NATIVE": choice},
        capture_output=True,
        text=True,
    )


def test_it_can_be_switched_off():
    assert status_with("0").stdout == "no native kernel: JAX_SCE_NATIVE=0 switches it off\n"


@needs_kernels
def test_the_instruction_set_can_be_chosen_and_must_exist():
    assert status_with("baseline").stdout == "native kernel: baseline\n"
    assert "JAX_SCE_NATIVE must be 0, 1, or an instruction set" in status_with("sse9").stderr


def test_what_was_built_for_a_newer_xla_is_not_used():
    """XLA would refuse it only when its first program runs, and say no more than that it cannot."""
    library = SimpleNamespace(jax_sce_ffi_major=lambda: 0, jax_sce_ffi_minor=lambda: 999)
    status = native._load(library, "1")
    assert not status.available
    assert "built for version 0.999 of XLA's FFI, and the installed jaxlib has 0." in status.detail


def test_what_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(_native, "__path__", [])
    monkeypatch.setenv("JAX_SCE_NATIVE", "1")
    status = native.status.__wrapped__()
    assert not status.available
    assert str(status).startswith("no native kernel: it was not built")


def test_nothing_said_is_as_if_not_set():
    assert status_with("").stdout == status_with("1").stdout


def test_what_cannot_be_loaded_is_told(monkeypatch, tmp_path):
    (tmp_path / "libjax_sce_rows.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native, "__path__", [str(tmp_path)])
    monkeypatch.setenv("JAX_SCE_NATIVE", "1")
    assert "libjax_sce_rows.so" in native.status.__wrapped__().detail
