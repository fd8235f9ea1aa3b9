"""The native CPU kernels: what they give, where they are used, and that nothing else changes."""

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from support import one_hot, targets_of

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


FORMS = {
    "spread": _rows.spread,
    "divergence_sums": _divergence.divergence_sums,
} | _cpu.FORMS


def compiled(functions, calls):
    """Of what the operations give, each a name and its arguments: one program."""
    names, args = [name for name, *_ in calls], [args for _, *args in calls]

    def results(args):
        return [jax.tree.leaves(functions[name](*x)) for name, x in zip(names, args, strict=True)]

    return functools.partial(jax.jit(results).lower(args).compile(), args)


def run_plain(*calls):
    """In plain JAX, by the form of it whose sums are in blocks on CPU, as the bounds are for."""
    return jax.tree.map(np.asarray, compiled(FORMS, calls)())


def rows(z, mask=None):
    return Rows(z, (-1,), mask)


@pytest.fixture
def run():
    """A kernel's results, by every instruction set that there are kernels for here."""
    library = ctypes.CDLL(str(native._find()))
    library.jax_sce_use.restype = ctypes.c_char_p
    levels = [name for name in LEVELS if library.jax_sce_use(name)]

    def run(*calls):
        kernels = compiled(_cpu.KERNELS, calls)
        for level in levels:
            library.jax_sce_use(level)
            yield jax.tree.map(np.asarray, kernels())

    yield run
    library.jax_sce_use(native.status().detail.encode())


# -- what they give -----------------------------------------------------------------------------------


@needs_kernels
def test_the_exponential_is_within_its_bound_everywhere(run):
    """Of every 499th float from -2^-149 to -104, of those about 0, and at the end of the range."""
    bits = np.arange(0x80000001, 0xC2D00000, 499, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), np.float32([-0.0, 0.0, -87.336544, -88.0, -np.inf])])
    want = np.exp(x.astype(np.float64))
    normal = want >= 2.0**-126
    one, none = np.ones((1, 1), np.float32), np.full((1, 1), -1, np.int32)
    for ((got,),) in run(("label_cotangent", rows(x[None]), none, 0 * one, one, one, None)):
        got = got[0].astype(np.float64)
        error = np.abs(got - want)
        assert np.max(error[normal] / want[normal]) <= 2 * U
        assert np.max(error[~normal]) <= 2.0**-126
        assert np.all(got[x == 0] == 1)
        assert np.all(got[x < -88.1] == 0)


def problem(num_rows, num_classes, dtype, mask, seed=0):
    """In NumPy: logits, labels, a mask, distributions, and two cotangents of rows."""
    draw = np.random.default_rng(seed)
    z = draw.normal(scale=4, size=(num_rows, num_classes)).astype(dtype)
    z[0, -1] = 90  # confident
    labels = draw.integers(-1, num_classes, num_rows, dtype=np.int32)
    where = None
    if mask != "none":
        where = draw.random((1 if mask == "shared" else num_rows, num_classes)) < 0.7
        where[:, 0] = True
    targets = draw.dirichlet(np.ones(num_classes), num_rows).astype(dtype)
    factors = draw.normal(size=(2, num_rows, 1)).astype(np.float32)
    factors[:, 1] = 0
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
    is_lost = (labels < 0) | np.isnan(tail)
    with np.errstate(invalid="ignore"):
        distance = at_label - highest
    return highest, tail, np.where(is_lost, np.float32(np.nan), distance), *kept


def of_targets(statistics):
    """With NaN for the sum of `y (z - max)` where that of `y` is NaN, for then the row is."""
    highest, tail, mass, dot, *kept = statistics
    return highest, tail, mass, np.where(np.isnan(mass), np.float32(np.nan), dot), *kept


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
    z, labels, where, targets, g, h = problem(40, num_classes, jnp.dtype(dtype), mask)
    view, ids = rows(z, where), labels[:, None]
    lost = num_classes * 2.0**-125
    of_dtype, subnormal = rounding(dtype)
    rtol = of_dtype + 2 * 126 * 2.0**-22

    uniform, smoothing = (np.full((1, 1), x, np.float32) for x in (1 / num_classes, 0.25))
    weights = np.linspace(0, 2, num_classes, dtype=np.float32)[None]
    options = (None, uniform, None), (smoothing, uniform, weights)
    labeled = [
        ("target_statistics", view, targets_of(y, *x)) for x in options for y in (targets, ids)
    ]
    statistics = [("label_statistics", view, ids), *labeled]
    of_ids, *of_labeled = run_plain(*statistics)
    highest, slope = of_ids[0], g[::-1].copy()
    slope[1] = 0
    z_with_nan, max_with_nan = z.copy(), highest.copy()
    z_with_nan[1, 0] = max_with_nan[1] = np.nan  # where the factors are 0
    of_label = "label_cotangent", rows(z_with_nan, where), ids, max_with_nan, g, h
    cotangents = [
        ("spread", view, highest),
        (*of_label, None),
        (*of_label, slope),
        *(
            ("target_cotangent", view, y, *stats[:3], g, h, None)
            for (_, _, y), stats in zip(labeled, of_labeled, strict=True)
        ),
    ]
    want = run_plain(*cotangents)
    for stats, *rest in run(*statistics, *cotangents):
        assert_close(of_labels(stats, ids), of_labels(of_ids, ids), 32 * U, lost)
        for got, plain in zip(rest[:4], of_labeled, strict=True):
            assert_close(of_targets(got), of_targets(plain), 32 * U, lost)
        sums, cotangent, sloped, *of_distributions = rest[4:]
        # What may be lost of a term is multiplied by its distance.
        assert_close(sums, want[0], 16 * U, 128 * lost)
        assert_close(cotangent, want[1], rtol, lost + subnormal)
        # Relative to the terms of what may cancel.
        assert_close(sloped, want[2], rtol, lost + subnormal + 40 * 2.0**-22 + 4 * of_dtype)
        for x in (cotangent, sloped):
            assert np.all(np.asarray(x[0][1], np.float32) == 0)
        # Relative to the terms of the difference: g, h and the targets are at most some 4.
        for got, plain in zip(of_distributions, want[3:], strict=True):
            assert_close(got, plain, rtol, 40 * 2.0**-22 + 4 * of_dtype)


@needs_kernels
@pytest.mark.parametrize("num_classes", [1, 10, 113, 1025])
def test_divergences_are_what_they_are_in_plain_jax(num_classes, run):
    z, *_, g, h = problem(40, num_classes, np.float32, "none")
    noise = np.random.default_rng(5).normal(size=z.shape).astype(np.float32)
    distances, calls = (1e-3, 3.0), []
    for apart in distances:
        of_teacher = z + np.float32(apart) * noise
        if num_classes > 2:
            z[3, 1] = of_teacher[3:5, 1] = -np.inf
        stats = []
        for x in (z, of_teacher):
            highest = np.max(x, axis=-1, keepdims=True)
            stats += [highest, np.sum(np.exp(x - highest), axis=-1, keepdims=True) - 1]
        args = rows(of_teacher), *stats, np.log1p(stats[3]) - np.log1p(stats[1])
        calls += [
            ("divergence_sums", rows(z.copy()), *args),
            ("divergence_cotangent", rows(z.copy()), *args, g, h, None),
        ]
    want = run_plain(*calls)
    for got in run(*calls):
        for apart, k in zip(distances, (0, 2), strict=True):
            # The second sum cancels: relative to its terms, which are of the size of `apart` at most.
            np.testing.assert_allclose(got[k][0], want[k][0], rtol=1e-6, atol=1e-30)
            np.testing.assert_allclose(got[k][1], want[k][1], rtol=0, atol=32 * U * min(apart, 2))
            assert_close(got[k + 1], want[k + 1], 2e-6, 32 * U)
            assert np.all(got[k + 1][0][1] == 0)


@needs_kernels
def test_special_rows_are_as_in_plain_jax(run):
    inf, nan = np.inf, np.nan
    label, calls = np.zeros((7, 1), np.int32), []
    for num_classes in (3, 70, 1100):
        z = np.zeros((7, num_classes), np.float32)
        z[:, 1] = 2
        z[0], z[1, 0], z[2, 2], z[3], z[4], z[4, 2], z[5, 0], z[6] = (
            -inf,
            inf,
            nan,
            nan,
            -inf,
            5,
            -inf,
            1e8,
        )
        calls.append(("label_statistics", rows(z), label))
    plain = run_plain(*calls)
    highest = np.array([-inf, inf, nan, nan, 5, 2, 1e8], np.float32)
    for results in run(*calls):
        for got, want in zip(results, plain, strict=True):
            assert_close(of_labels(got, label)[1:], of_labels(want, label)[1:], 16 * U, 0)
            np.testing.assert_array_equal(got[0][:, 0], highest)


@needs_kernels
def test_infinite_cotangents_are_as_in_plain_jax(run):
    g, zero = np.float32([[np.inf], [-np.inf]]), np.zeros((2, 1), np.float32)
    statistics = []
    for num_classes in (3, 300):
        z, _, where, targets, *_ = problem(2, num_classes, np.float32, "none")
        uniform = np.full((1, 1), 1 / num_classes, np.float32)
        y = targets_of(targets, None, uniform, None)
        statistics.append(("target_statistics", rows(z, where), y))
    calls = [
        ("target_cotangent", *args, *stats[:3], g, zero, None)
        for (_, *args), stats in zip(statistics, run_plain(*statistics), strict=True)
    ]
    want = run_plain(*calls)
    assert all(np.all(np.isinf(x)) for (x,) in want)
    for got in run(*calls):
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_cotangent_of_0_hides_no_nan():
    """As in plain JAX, where it is 0 times NaN; but for a weight of 0, which leaves the row out."""
    z = np.zeros((3, 5), np.float32)
    z[1, 2], z[2, 0] = np.nan, np.inf
    ids, targets, zero = (
        np.zeros(3, np.int32),
        np.full((3, 5), 0.2, np.float32),
        np.zeros(3, np.float32),
    )
    losses = {
        "ids": lambda z: integer_loss(z, ids),
        "smoothed": lambda z: integer_loss(z, ids, label_smoothing=0.1),
        "dense": lambda z: softmax_cross_entropy(z, targets),
        "weighted": lambda z: softmax_cross_entropy(z, targets, weights=zero),
    }

    def gradients(z, g):
        return {kind: jax.vjp(loss, z)[1](g)[0] for kind, loss in losses.items()}

    for kind, got in jax.jit(gradients)(z, zero).items():
        want = np.zeros((3, 5))
        if kind != "weighted":
            want[1:] = np.nan
        np.testing.assert_array_equal(got, want, kind)


@needs_kernels
@pytest.mark.parametrize("num_classes", [7, 300, 5000])
def test_a_row_does_not_hang_on_the_others(num_classes):
    z, labels, *_ = problem(100, num_classes, np.float32, "none")
    grad = jax.jit(jax.grad(lambda z, y: jnp.sum(integer_loss(z, y, weights=y >= 0))))
    part = slice(32, 64)
    np.testing.assert_array_equal(grad(z, labels)[part], grad(z[part], labels[part]))


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
step = jax.jit(lambda z: jax.lax.fori_loop(0, 1000, lambda _, x: loss(z + x, y).sum(), 0.0))
unfinished = step(z)
"""


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    """And a process may end while its program runs."""

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
    z, ids = (jax.ShapeDtypeStruct(*x) for x in (((64, 4096), dtype), ((64,), np.int32)))
    for loss, labels in ((integer_loss, ids), (softmax_cross_entropy, z)):
        step = jax.jit(
            jax.grad(lambda z, y, loss=loss: loss(z, y, reduction="mean")), donate_argnums=0
        )
        compiled = step.lower(z, labels).compile()
        assert compiled.as_text().count('custom_call_target="jax_sce') == 2
        assert compiled.memory_analysis().temp_size_in_bytes < 64 * 4096 * z.dtype.itemsize / 50


@needs_kernels
def test_logits_that_were_reshaped_are_not_copied():
    """As those of a model are: XLA multiplies [batch * time, D] by [D, V], and reshapes that."""
    z, y = np.zeros((64, 4096), np.float32), np.zeros((8, 8), np.int32)

    def loss(z):
        return integer_loss(z.reshape(8, 8, 4096), y, reduction="mean")

    compiled = jax.jit(jax.grad(loss), donate_argnums=0).lower(z).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < z.nbytes / 50


@needs_kernels
def test_what_they_do_not_compute_is_left_to_xla():
    z, y = np.zeros((4, 300), np.float32), np.zeros(4, np.int32)
    assert "jax_sce" in compiled_text(lambda z: integer_loss(z, y), z)
    assert "jax_sce." not in compiled_text(lambda z: integer_loss(z, y, softcap=3.0), z)
    with jax.enable_x64(True):
        assert "jax_sce." not in compiled_text(lambda z: integer_loss(z, y), z.astype(np.float64))


@needs_kernels
def test_an_exported_program_does_without_them():
    z, y = np.zeros((4, 300), np.float32), np.zeros(4, np.int32)
    program = jax.jit(jax.grad(lambda z: integer_loss(z, y, reduction="mean")))
    for platforms in (["cpu"], ["cpu", "cuda", "tpu"]):
        exported = export.export(program, platforms=platforms)(z)
        assert "jax_sce." not in exported.mlir_module()
        np.testing.assert_allclose(exported.call(z), program(z), rtol=1e-6)


@needs_kernels
def test_vmap_over_anything():
    """Over what each row has of its own it is one call; class weights of each example are plain JAX."""
    draw = np.random.default_rng(0)
    z = draw.normal(size=(3, 5, 70)).astype(np.float32)
    y = draw.integers(70, size=(3, 5), dtype=np.int32)
    w = draw.random((3, 70), np.float32)

    def one(z, y, w):
        return integer_loss(z, y, class_weights=w, label_smoothing=0.1)

    def exact(z, y, w):
        z = z.astype(np.float64)
        log_probabilities = z - np.log(np.exp(z).sum(-1, keepdims=True))
        return -((0.9 * one_hot(y, 70) + 0.1 / 70) * w * log_probabilities).sum(-1)

    all_axes = (
        (0, 0, 0),
        (0, 0, None),
        (1, 1, None),
        (0, None, None),
        (None, 0, None),
        (None, None, 0),
    )
    calls = []
    for axes in all_axes:
        args = [x if axis is not None else x[0] for x, axis in zip((z, y, w), axes, strict=True)]
        want = [
            exact(*(x if axis is None else x[i] for x, axis in zip(args, axes, strict=True)))
            for i in range(3)
        ]
        moved = [x.swapaxes(0, 1) if axis == 1 else x for x, axis in zip(args, axes, strict=True)]
        calls.append((axes, moved, want))
    mapped = jax.jit(
        lambda all_args: [jax.vmap(one, a)(*x) for a, x in zip(all_axes, all_args, strict=True)]
    )
    for got, (axes, _, want) in zip(mapped([x for _, x, _ in calls]), calls, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=str(axes))
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
        want = jax.jit(jax.hessian(reference))(z)
    z, hidden, y = (np.asarray(x, np.float32) for x in (z, hidden, y))
    forward = functools.partial(loss, forward_mode=True)
    orders = (
        jax.jacrev(jax.grad(loss)),
        jax.jacfwd(jax.grad(loss)),
        jax.jacrev(jax.jacfwd(forward)),
        jax.hessian(forward),
    )
    for got in jax.jit(lambda z: [order(z) for order in orders])(z):
        np.testing.assert_allclose(got, want, rtol=0, atol=4 * 80 * U)


@needs_kernels
@pytest.mark.parametrize("kind", ["masked", "smoothed", "dense"])
@pytest.mark.parametrize(
    "spec", [P("data", "model"), P("data", None, "model")], ids=["examples", "classes"]
)
def test_plain_jit_splits_them_and_gathers_nothing(spec, kind):
    """Each device does its own rows; where the classes are split, a maximum and a sum cross."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    draw = np.random.default_rng(0)
    z = draw.normal(scale=3, size=(16, 4, 512)).astype(np.float32)
    y = draw.integers(512, size=(16, 4), dtype=np.int32)
    dense = draw.dirichlet(np.ones(512), (16, 4)).astype(np.float32)
    where = np.arange(512)[None, None] % 5 > 0
    weights = np.linspace(0, 2, 512, dtype=np.float32)

    def loss(z, y):
        if kind == "dense":
            return softmax_cross_entropy(z, dense, reduction="mean")
        options = {
            "masked": {"where": where},
            "smoothed": {"label_smoothing": 0.1, "class_weights": weights},
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
    z, ids, _, targets, *_ = problem(16, 40, np.float32, "none")
    ids, where = np.maximum(ids, 0), np.ones(z.shape, bool)
    where[:, 3:9] = False
    other = {"ids": ids, "masked": where, "dense": targets}[kind]
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
    got, want = (
        step(put(z, z_spec), put(other, y_spec)),
        jax.jit(jax.value_and_grad(loss))(z, other),
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-8)


@needs_kernels
def test_inside_shard_map_each_device_calls_them():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    z, y, *_ = problem(64, 300, np.float32, "none")

    def gradient(z, y):
        return jax.grad(lambda z: jnp.sum(integer_loss(z, y)))(z)

    spec = P(("data", "model"))
    split = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec))
    placed = jax.device_put((z, y), NamedSharding(mesh, spec))
    compiled = split.lower(*placed).compile()
    assert compiled.as_text().count('custom_call_target="jax_sce') == 2
    np.testing.assert_array_equal(compiled(*placed), jax.jit(gradient)(z, y))


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
    z, y = np.zeros((64, 600), np.float32), np.zeros(64, np.int32)
    split = jax.shard_map(integer_loss, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    export.export(jax.jit(split), platforms=["cpu", "tpu"])(
        *(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("a")))
            for x in (z, y)
        )
    )


@pytest.fixture
def status_with(monkeypatch):
    """The status of a process with that `JAX_SCE_NATIVE`."""

    def status(choice):
        monkeypatch.setenv("JAX_SCE_NATIVE", choice)
        return native.status.__wrapped__()

    usual = native.status()
    yield status
    if usual.available:
        status(usual.detail)


def test_a_program_prints_it():
    program = "from jax_sce import native; print(native.status())"
    env = {**os.environ, "JAX_SCE_NATIVE": "0"}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert out.stdout == "no native kernel: JAX_SCE_NATIVE=0 switches it off\n", out.stderr


@needs_kernels
def test_the_instruction_set_can_be_chosen_and_must_exist(status_with):
    assert str(status_with("baseline")) == "native kernel: baseline"
    assert status_with("") == status_with("1")
    assert not status_with("0").available
    with pytest.raises(ValueError, match="JAX_SCE_NATIVE must be 0, 1, or an instruction set"):
        status_with("sse9")


def test_what_was_built_for_a_newer_xla_is_not_used():
    """XLA would refuse it only when its first program runs, and say no more than that it cannot."""
    library = SimpleNamespace(jax_sce_ffi_major=lambda: 0, jax_sce_ffi_minor=lambda: 999)
    status = native._load(library, "1")
    assert not status.available
    assert "built for version 0.999 of XLA's FFI, and the installed jaxlib has 0." in status.detail


def test_what_is_not_there_is_told(monkeypatch, status_with):
    monkeypatch.setattr(_native, "__path__", [])
    status = status_with("1")
    assert not status.available
    assert str(status).startswith("no native kernel: it was not built")


@needs_kernels
def test_what_cannot_be_loaded_is_told(monkeypatch, status_with, tmp_path):
    """No library, the beginning of one, one of another machine (of bytes the other way round), and one
    that is not ours."""
    ours = native._find().read_bytes()
    of_another_machine = ours[:16] + bytes([ours[17], ours[16], ours[19], ours[18]]) + ours[20:]
    not_ours = Path(np._core._multiarray_umath.__file__).read_bytes()
    for i, content in enumerate((b"not a library", ours[:64], of_another_machine, not_ours)):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "libjax_sce_rows.so").write_bytes(content)
        monkeypatch.setattr(_native, "__path__", [str(folder)])
        status = status_with("1")
        assert not status.available
        assert "libjax_sce_rows.so" in status.detail
