"""What is kept for the derivative, and what the compiled gradient needs beside its arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import BOTH, saved

from jax_sce import native

N, V = 6, 256
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "class_weights": {"class_weights": np.ones(V, np.float32)},
    "weights": {"weights": np.ones(N, np.float32)},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 3.0},
    "where examples": {"where": np.ones(N, bool)},
    "where classes": {"where": np.ones((1, V), bool)},
    "mean": {"reduction": "mean"},
}
OPTIONS["everything"] = {k: v for options in OPTIONS.values() for k, v in options.items()}


def labels_like(kind, batch, v):
    if kind == "integer":
        return jax.ShapeDtypeStruct(batch, jnp.int32)
    return jax.ShapeDtypeStruct((*batch, v), jnp.float32)


@pytest.mark.parametrize("forward_mode", [False, True], ids=["reverse", "forward"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", BOTH)
def test_only_the_arguments_are_kept_at_full_size(kind, options, dtype, forward_mode):
    logits, labels = jax.ShapeDtypeStruct((N, V), dtype), labels_like(kind, (N,), V)
    fn = functools.partial(BOTH[kind], forward_mode=forward_mode, **OPTIONS[options])
    argnums = 1 if kind == "integer" else 2  # the labels are differentiated if they can be

    def loss(*args):
        return fn(*args, *([labels_value] if kind == "integer" else []))

    labels_value = jnp.zeros(N, jnp.int32)
    kept = saved(loss, *(logits, labels)[:argnums])
    large = [
        (shape, dtype) for shape, dtype, given in kept if np.prod(shape) >= N * V and not given
    ]
    assert large == []
    assert any(given for _, _, given in kept)  # the check sees the residuals


def test_the_check_finds_what_automatic_differentiation_keeps():
    def naive(z):
        return jax.nn.logsumexp(jnp.square(jnp.sin(z)), axis=-1)

    kept = saved(naive, jax.ShapeDtypeStruct((N, V), jnp.float32))
    assert any(np.prod(shape) >= N * V and not given for shape, _, given in kept)


IS_OLD = jax.__version_info__ < (0, 12)


def block_memory(dtype):
    """What the statistics of long rows may hold on CPU, as a part of the logits' bytes: one number for
    each block of classes, and then one block a row. XLA's compiler before JAX 0.12 drops the barriers
    that free the one before the other is made, and widens the block."""
    if IS_OLD:
        return 0.026
    return 0.010 if dtype == jnp.float32 else 0.0115


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_donated_logits_needs_no_second_copy(dtype):
    n, v = 1024, 32000
    logits, labels = jax.ShapeDtypeStruct((n, v), dtype), labels_like("integer", (n,), v)
    gradient = jax.grad(functools.partial(BOTH["integer"], reduction="mean"))
    compiled = jax.jit(gradient, donate_argnums=0).lower(logits, labels).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= block_memory(dtype) * n * v * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distributions_need_no_more_memory_than_optax(dtype):
    n, v = 256, 8000
    logits, labels = jax.ShapeDtypeStruct((n, v), dtype), jax.ShapeDtypeStruct((n, v), dtype)

    def temporary(fn):
        gradient = jax.jit(jax.grad(lambda z, y: fn(z, y).mean()), donate_argnums=0)
        return gradient.lower(logits, labels).compile().memory_analysis().temp_size_in_bytes

    # A number or two for each block, beside what XLA's CPU compiler writes for a `select`.
    assert temporary(BOTH["dense"]) <= temporary(optax.softmax_cross_entropy) + 0.05 * n * v * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_loss_alone_never_writes_the_logits_in_float32(dtype):
    n, v = 1024, 32000
    logits, labels = jax.ShapeDtypeStruct((n, v), dtype), labels_like("integer", (n,), v)
    compiled = jax.jit(BOTH["integer"]).lower(logits, labels).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= block_memory(dtype) * n * v * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("batch", [(1024,), (8, 128)], ids=str)
def test_between_the_products_of_a_head_the_logits_need_no_more_memory_than_with_optax(batch, kind):
    if IS_OLD and len(batch) > 1:
        pytest.skip("XLA before JAX 0.12 drops the barrier; examples/limits.md says so")
    d, v = 16, 8192
    hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*batch, d), (d, v)))
    labels = labels_like(kind, batch, v)

    def temporary(fn):
        gradient = jax.jit(jax.grad(lambda h, k, y: fn(h @ k, y).mean(), argnums=(0, 1)))
        compiled = gradient.lower(hidden, kernel, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    optax_loss = {
        "integer": optax.softmax_cross_entropy_with_integer_labels,
        "dense": optax.softmax_cross_entropy,
    }[kind]
    blocks = 0.03 * 4 * np.prod(batch) * v
    assert temporary(BOTH[kind]) <= temporary(optax_loss) + blocks


@pytest.mark.skipif(IS_OLD, reason="XLA before JAX 0.12 drops the barrier")
@pytest.mark.skipif(not native.status().available, reason="it is the kernel's barrier")
@pytest.mark.parametrize("kind", BOTH)
def test_computed_logits_of_several_axes_of_examples_are_not_copied_for_their_gradient(kind):
    """The kernel for CPU writes the gradient over them, after they are reshaped to [N, V]."""
    logits, labels = jax.ShapeDtypeStruct((2, 3, V), jnp.float32), labels_like(kind, (2, 3), V)
    gradient = jax.grad(lambda z, y: jnp.sum(BOTH[kind](2 * z, y)))
    assert " copy(" not in jax.jit(gradient).lower(logits, labels).compile().as_text()
