"""JAX's debugging modes, many threads, repeated runs, caches and serialisation change nothing."""

import contextlib
import functools
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from support import BOTH, exact_gradient, exact_loss, one_hot, rng

from jax_sce import CrossEntropyAux, linear_softmax_cross_entropy, native

N, D, V = 12, 5, 300
IGNORED = -100


def arguments(kind, dtype=np.float32):
    r = rng(3)
    labels = r.integers(V, size=N, dtype=np.int32)
    if kind == "dense":
        return r.normal(size=(N, V)).astype(dtype), one_hot(labels, V, dtype)
    labels[::5] = IGNORED
    if kind == "integer":
        return r.normal(size=(N, V)).astype(dtype), labels
    return r.normal(size=(N, D)).astype(dtype), r.normal(size=(D, V)).astype(dtype), labels


FUNCTIONS = {**BOTH, "linear": linear_softmax_cross_entropy}
KINDS = list(FUNCTIONS)


def mean(kind, **more):
    options = {"reduction": "mean", "z_loss": 1e-4, **more}
    if kind != "dense":
        options["ignore_index"] = IGNORED
    return lambda *args: FUNCTIONS[kind](*args, **options)


def program(kind, **more):
    """The loss, and the gradients by all but the last argument."""
    floats = tuple(range(len(arguments(kind)) - 1))
    return jax.value_and_grad(mean(kind, **more), floats)


@functools.cache
def run(kind):
    """As it usually is."""
    return jax.jit(program(kind))(*arguments(kind))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@contextlib.contextmanager
def debugging():
    with jax.debug_nans(True), jax.debug_infs(True), jax.enable_checks(True), jax.checking_leaks():
        yield


MODES = {"debugging": debugging, "x64": lambda: jax.enable_x64(True), "not jitted": jax.disable_jit}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_modes_change_nothing(kind, mode):
    """Nor do they raise: not a NaN or infinity comes up on the way. Without `jit` the roundings of
    another order remain."""
    want = run(kind)
    with MODES[mode]():
        got = jax.jit(program(kind))(*arguments(kind))
    rtol, atol = (1e-5, 1e-7) if mode == "not jitted" else (0, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), got, want)


@pytest.mark.parametrize("forward_mode", [False, True], ids=["reverse", "forward"])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("kind", BOTH)
def test_masked_classes_are_no_infinities(kind, smoothing, forward_mode):
    """Nor in an eager derivative; one of the rows keeps no class."""
    mask = np.array([[True, True, False], [False, True, True], [False] * 3])
    labels = np.array([0, 1, 2])
    labels = labels if kind == "integer" else one_hot(labels, 3)

    def total(logits):
        losses, aux = BOTH[kind](
            logits, labels, where=mask, label_smoothing=smoothing, return_aux=True,
            forward_mode=forward_mode)  # fmt: skip
        return jnp.sum(losses + aux.entropy)

    with jax.debug_nans(True), jax.debug_infs(True):
        value, gradient = jax.value_and_grad(total)(np.zeros((3, 3), np.float32))
    np.testing.assert_allclose(value, 4 * np.log(2), rtol=1e-6)  # of two classes each
    want = np.array([[-0.5, 0.5, 0], [0, -0.5, 0.5], [0, 0, 0]])
    np.testing.assert_allclose(gradient, (1 - smoothing) * want, atol=1e-6)


def test_a_nan_is_found_where_it_is_made():
    z, y = np.zeros((2, 3), np.float32), np.array([0, 3], np.int32)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        BOTH["integer"](z, y).block_until_ready()


def test_many_threads_compile_and_call_at_once():
    shared = {kind: jax.jit(program(kind)) for kind in KINDS}

    def work(i):  # each thread a shape of its own, and those that all share
        logits, labels = np.ones((3, 4 + i), np.float32), np.zeros(3, np.int32)
        own = jax.jit(jax.grad(lambda z: BOTH["integer"](z, labels, reduction="sum")))(logits)
        return own.shape, {kind: shared[kind](*arguments(kind)) for kind in KINDS}

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    want = {kind: run(kind) for kind in KINDS}
    for i, (shape, got) in enumerate(results):
        assert shape == (3, 4 + i)
        assert_same(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_bitwise_equal(kind):
    """Of one program, and of another that is compiled again."""
    args = arguments(kind)
    first, second = (jax.jit(program(kind)).lower(*args).compile() for _ in range(2))
    for compiled in (first, first, first, second):
        assert_same(compiled(*args), run(kind))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_size_of_the_chunks_is_a_matter_of_rounding(reduction):
    """The gradient of the kernel is a sum over the examples, in parts; a loss is that of its example."""

    def loss(chunk_size, *args):
        g = np.resize(np.float32([1, -0.5, 2]), N)
        losses = mean("linear", reduction=reduction, chunk_size=chunk_size)(*args)
        return jnp.vdot(g, losses) if reduction == "none" else losses

    @jax.jit
    def by_chunks(*args):
        sizes = (None, 1, 5, N, 10 * N)
        return [jax.value_and_grad(loss, (1, 2))(size, *args) for size in sizes]

    (value, gradients), *others = by_chunks(*arguments("linear"))
    for other, by_size in others:
        np.testing.assert_allclose(other, value, rtol=4 * 2.0**-24)
        for a, b in zip(by_size, gradients, strict=True):  # of up to N parts, each added once
            np.testing.assert_allclose(a, b, rtol=0, atol=N * 2.0**-24 * np.abs(b).max())


@pytest.mark.parametrize("kind", KINDS)
def test_transformed_programs_give_the_same_bits(kind):
    """Checkpointed, scanned over steps, and under `jax.vmap`. But there XLA may sum in another
    order without the native kernels, and a head in as many parts as there are devices."""
    args = arguments(kind)
    steps = jax.tree.map(lambda x: np.stack([x, x]), args)

    def step(*args, transform=lambda fn: fn):
        floats = tuple(range(len(args) - 1))
        return jax.value_and_grad(transform(mean(kind)), floats)(*args)

    def scanned(*steps):
        one = functools.partial(step, transform=jax.checkpoint)
        return jax.lax.scan(lambda _, args: (None, one(*args)), None, steps)[1]

    want = jax.jit(step)(*args)
    both = jax.tree.map(lambda x: np.stack([x, x]), want)
    assert_same(jax.jit(functools.partial(step, transform=jax.checkpoint))(*args), want)
    assert_same(jax.jit(scanned)(*steps), both)
    of_vmap = jax.jit(jax.vmap(step))(*steps)
    if native.status().available and kind != "linear":
        assert_same(of_vmap, both)
    for a, b in zip(*map(jax.tree.leaves, (of_vmap, both)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2.0**-22 * np.abs(b).max())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_is_the_same(kind):
    """It does without the native kernels, and so has the bits of a program without them: with them some
    roundings differ, of the terms of a gradient that is a sum. So they do where the choice of the
    platform at run time is compiled otherwise."""
    args = arguments(kind)
    fn = jax.jit(jax.value_and_grad(mean(kind)))
    exported = jax.export.export(fn, platforms=("cpu", "cuda", "tpu"))(*args)
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    if not native.status().available:
        assert_same(jax.jit(jax.export.export(fn)(*args).call)(*args), fn(*args))
    for a, b in zip(*map(jax.tree.leaves, (exported.call(*args), fn(*args))), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=16 * 2.0**-24, atol=8 * 2.0**-24 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_is_the_same_when_it_is_read_again(kind):
    pytest.importorskip("flatbuffers")
    args = arguments(kind)
    fn = jax.jit(mean(kind))
    exported = jax.export.export(fn)(*args)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert_same(again.call(*args), fn(*args))
    floats = tuple(range(len(args) - 1))
    assert_same(jax.grad(again.call, floats)(*args), jax.grad(fn, floats)(*args))


def test_an_exported_program_takes_any_number_of_examples():
    """Of one chunk and of several, the last not full; some ignored, or all counted."""

    def program(hidden, kernel, labels, weights):
        @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
        def total(hidden, kernel, weights):
            head = functools.partial(linear_softmax_cross_entropy, hidden, kernel, labels)
            losses, aux = head(weights=weights, ignore_index=0, chunk_size=4, return_aux=True)
            mean = head(reduction="mean", chunk_size=3)
            return jnp.sum(losses) + mean, (losses, mean, aux.prediction)

        return total(hidden, kernel, weights)

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    batch, f32 = jax.export.symbolic_shape("b, s"), jnp.float32
    exported = jax.export.export(jax.jit(program))(
        shape(f32, *batch, 3), shape(f32, 3, 5), shape(jnp.int32, *batch), shape(f32, *batch)
    )
    r = rng(7)
    kernel = r.normal(size=(3, 5)).astype(np.float32)
    for batch in ((1, 1), (2, 5)):
        hidden = r.normal(size=(*batch, 3)).astype(np.float32)
        labels, weights = r.integers(5, size=batch, dtype=np.int32), r.random(batch, np.float32)
        (_, (losses, mean, prediction)), gradients = jax.jit(exported.call)(
            hidden, kernel, labels, weights
        )
        logits = hidden @ kernel
        counts, loss = labels != 0, exact_loss(logits, labels)
        np.testing.assert_allclose(losses, weights * counts * loss, rtol=1e-5)
        np.testing.assert_allclose(mean, np.mean(loss), rtol=1e-5)
        np.testing.assert_array_equal(prediction, np.where(counts, logits.argmax(-1), -1))
        of_logits = (weights * counts + 1 / labels.size)[..., None] * exact_gradient(logits, labels)
        want = of_logits @ kernel.T, np.einsum("bsd,bsv->dv", hidden, of_logits), counts * loss
        for a, b in zip(gradients, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_number_of_classes_of_an_exported_program_is_known():
    (v,) = jax.export.symbolic_shape("v")
    for kind, message in (("integer", "logits"), ("linear", "kernel")):
        args = arguments(kind)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
        shapes[-2] = shapes[-2].update(shape=(args[-2].shape[0], v))
        with pytest.raises(ValueError, match=f"{message} must have a known .*classes.*, v"):
            jax.export.export(jax.jit(mean(kind)))(*shapes)


NEXT = [
    name
    for name in ("jax_remat3", "jax_custom_vjp3", "jax_custom_jvp3")
    if hasattr(jax.config, name)
]


@pytest.mark.skipif("jax_custom_vjp3" not in NEXT, reason="this JAX has no such flags")
def test_the_next_checkpoint_and_custom_rules_of_jax_change_nothing():
    """They are off by default in JAX 0.12."""

    def step(args):
        def total(floats, label, kind, forward_mode):
            loss = jax.checkpoint(mean(kind, forward_mode=forward_mode))
            add = lambda sum, _: (sum + loss(*floats, label), None)  # noqa: E731
            return jax.lax.scan(add, jnp.float32(0), length=2)[0]

        def both(kind):
            *floats, label = args[kind]
            of = jax.value_and_grad(total)
            return [of(floats, label, kind, forward_mode) for forward_mode in (False, True)]

        return {kind: both(kind) for kind in KINDS}

    args = {kind: arguments(kind) for kind in KINDS}
    want = jax.jit(step)(args)
    try:
        for name in NEXT:
            jax.config.update(name, True)
        got = jax.jit(step)(args)
    finally:
        for name in NEXT:
            jax.config.update(name, False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


def test_functions_and_results_are_pickled():
    for fn in FUNCTIONS.values():
        assert pickle.loads(pickle.dumps(fn)) is fn
    _, aux = linear_softmax_cross_entropy(*arguments("linear"), ignore_index=-100, return_aux=True)
    again = pickle.loads(pickle.dumps(aux))
    assert isinstance(again, CrossEntropyAux)
    assert_same(again, aux)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "kernels"), [("integer", "native"), ("integer", "plain"), ("dense", "native")]
)
def test_more_than_2_to_the_31_logits(kind, kernels, monkeypatch):
    """And more than 2**32 bytes: 4.3 GB of bfloat16 logits, and as many of distributions, with the
    gradient written over the logits. The same few rows again and again: a small program tells their
    results."""
    if kernels == "plain":
        monkeypatch.setattr(native, "status", lambda: native.Status(False, "for this test"))
    elif not native.status().available:
        pytest.skip(f"no kernels: {native.status().detail}")
    period, repeats, num_classes = 97, 677, 2**15  # 2**31 logits are no multiple of 97 rows
    draw = rng(4)
    few = draw.normal(size=(period, num_classes)).astype(jnp.bfloat16)
    labels = draw.integers(num_classes, size=period, dtype=np.int32)
    if kind == "dense":
        labels = draw.dirichlet(np.ones(num_classes), period).astype(jnp.bfloat16)

    def many(x):
        tile = jax.jit(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)).reshape(-1, *x.shape[1:]))
        return jax.block_until_ready(tile(x))

    def both(z, y):
        def loss(z):
            losses = BOTH[kind](z, y)
            return jnp.sum(losses), losses

        gradient, losses = jax.grad(loss, has_aux=True)(z)
        return losses, gradient

    step = jax.jit(both, donate_argnums=0)
    small = [np.array(x) for x in step(jnp.asarray(few), labels)]
    large = step(many(few), many(labels))
    assert large[1].size > 2**31
    for got, want in zip(large, small, strict=True):
        rtol = (
            2.0**-20 if want.dtype == np.float32 else 2.0**-7
        )  # plain JAX may sum in another order
        want = want.astype(np.float32)
        for rows in np.split(np.asarray(got), repeats):
            np.testing.assert_allclose(rows.astype(np.float32), want, rtol, atol=1e-37)


CACHED = """
import sys, jax, numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from jax_sce import linear_softmax_cross_entropy as head
args = np.ones((6, 4), np.float32), np.eye(4, 9, dtype=np.float32), np.arange(6, dtype=np.int32)
for folder in sys.argv[1:]:
    jax.config.update("jax_compilation_cache_dir", folder)
    reset_cache()
    jax.clear_caches()
    step = jax.jit(jax.value_and_grad(lambda *a: head(*a, reduction="mean"), (0, 1)))
    print(*(np.asarray(x).tobytes().hex() for x in jax.tree.leaves(step(*args))))
"""


def test_the_persistent_cache_gives_the_same(tmp_path):
    """The bits are the same when JAX writes the cache, when it reads it, and when it warns that it
    cannot write it."""
    (tmp_path / "a file").touch()
    cache = tmp_path / "cache"

    def digests(*folders):
        command = [sys.executable, "-c", CACHED, *folders]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    first, without = digests(cache, tmp_path / "a file")
    assert list(cache.iterdir())
    (second,) = digests(cache)
    assert first == second == without


def test_importing_it_imports_little():
    program = """
import sys, jax
before = set(sys.modules)
import jax_sce
print(*sorted({".".join(name.split(".")[:2]) for name in set(sys.modules) - before}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    names = ended.stdout.split()
    assert "jax_sce" in names, ended.stderr
    assert [name for name in names if name.split(".")[0] != "jax_sce"] == []
