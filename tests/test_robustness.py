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
from support import BOTH, one_hot, quick, rng

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


def run(kind, **more):
    """The loss, and the gradients by all but the last argument."""
    args = arguments(kind)
    return jax.value_and_grad(mean(kind, **more), tuple(range(len(args) - 1)))(*args)


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
        got = run(kind)
    rtol, atol = (1e-5, 1e-7) if mode == "not jitted" else (0, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), got, want)


def test_a_nan_is_found_where_it_is_made():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        BOTH["integer"](jnp.zeros((2, 3)), jnp.array([0, 3])).block_until_ready()


def test_many_threads_compile_and_call_at_once():
    def work(i):  # each thread a shape of its own, and those that all share
        logits, labels = jnp.ones((3, 4 + i)), jnp.zeros(3, jnp.int32)
        own = jax.grad(lambda z: BOTH["integer"](z, labels, reduction="sum"))(logits)
        return own.shape, [run(kind) for kind in KINDS]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    want = [run(kind) for kind in KINDS]
    for i, (shape, got) in enumerate(results):
        assert shape == (3, 4 + i)
        assert_same(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_bitwise_equal(kind):
    want = run(kind)
    for _ in range(3):
        assert_same(run(kind), want)
    jax.clear_caches()
    assert_same(run(kind), want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_size_of_the_chunks_is_a_matter_of_rounding(reduction):
    """The gradient of the kernel is a sum over the examples, in parts; a loss is that of its example."""
    args = arguments("linear")

    def loss(chunk_size):
        g = np.resize(np.float32([1, -0.5, 2]), N)
        fn = mean("linear", reduction=reduction, chunk_size=chunk_size)
        return jax.value_and_grad(
            lambda *a: jnp.vdot(g, fn(*a)) if reduction == "none" else fn(*a), (0, 1)
        )(*args)

    value, gradients = loss(None)
    for chunk_size in (1, 5, N, 10 * N):
        other, by_chunks = loss(chunk_size)
        np.testing.assert_allclose(other, value, rtol=4 * 2.0**-24)
        for a, b in zip(by_chunks, gradients, strict=True):  # of up to N parts, each added once
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
        assert_same(jax.export.export(fn)(*args).call(*args), fn(*args))
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
    want = quick(step)(args)
    try:
        for name in NEXT:
            jax.config.update(name, True)
        got = quick(step)(args)
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


CACHED = """
import sys, jax, numpy as np
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from jax_sce import linear_softmax_cross_entropy as head
args = np.ones((6, 4), np.float32), np.eye(4, 9, dtype=np.float32), np.arange(6, dtype=np.int32)
loss, gradients = jax.jit(jax.value_and_grad(lambda *a: head(*a, reduction="mean"), (0, 1)))(*args)
print(loss, *(g.sum(-1).tolist() for g in gradients))
"""


def test_the_persistent_cache_gives_the_same(tmp_path):
    command = [sys.executable, "-c", CACHED, tmp_path / "cache"]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert list((tmp_path / "cache").iterdir())
    assert first == second


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
