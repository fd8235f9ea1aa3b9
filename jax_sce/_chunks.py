"""How a head cuts its examples into shards and chunks, and the operations on a chunk.

The N examples are cut into L shards of n. A chunk takes c examples from each shard: C = L c. In each
shard, the examples that count come first. If the compiler splits the loop over devices, each device has
a shard and so its part of every chunk, and no example is sent. On one device there is one shard."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._rows import compute_dtype


class Size(NamedTuple):
    """How many examples a chunk should have, with V logits each."""

    logits: int  # chunks with this many logits run at full rate,
    least: int  # if they have at least this many examples: below, the kernel's traffic dominates
    most: int  # more examples gain nothing
    budget: int  # never more logits than this, to bound the memory

    def examples(self, num_classes: int) -> int:
        enough = min(max(self.logits // num_classes, self.least), self.most)
        return max(min(enough, self.budget // num_classes), 1)


class Loop(NamedTuple):
    """How a platform runs the loop over the chunks."""

    gradients: Size
    values: Size  # for values without gradients
    products: Callable
    take: Callable
    devices: int = 1  # the compiler may split the examples over this many


class Plan(NamedTuple):
    """How examples are cut into shards and chunks. It is static."""

    shards: int  # L
    per_shard: int  # n
    chunk: int  # c, at least 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.shards, self.per_shard

    @property
    def chunks(self) -> int:
        return ceil_div(self.per_shard, self.chunk)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def plan(
    num_examples: int, num_classes: int, devices: int, size: Size, chunk_size: int | None
) -> Plan:
    """Chunks as even as possible, with at most `chunk_size` examples, or as `size` says. If a program is
    exported for any number of examples, `num_examples` is symbolic: division and `max_dim` work, but
    order comparisons do not, and `==` is True only if equality can be proved."""
    wanted = chunk_size or size.examples(num_classes)
    chunks = jax.core.max_dim(ceil_div(num_examples, wanted), 1)
    divisors = (n for n in range(1, devices + 1) if devices % n == 0 == num_examples % n)
    shards = max(divisors) if num_examples != 0 else 1
    per_shard = num_examples // shards
    return Plan(shards, per_shard, jax.core.max_dim(ceil_div(per_shard, chunks), 1))


def order(plan: Plan, counts: Array | None) -> tuple[Array, Array | int]:
    """The ids of the examples of each shard, [L, n + c], those that count first; and how many
    examples count in the shard that has most. The last c ids are n, which stands for no example."""
    ids = jnp.broadcast_to(jnp.arange(plan.per_shard), plan.shape)
    most: Array | int = plan.per_shard
    if counts is not None:
        ids = jnp.argsort(~counts, axis=1, stable=True)
        most = jnp.max(jnp.sum(counts, axis=1, dtype=jnp.int32), initial=0)
    return jnp.pad(ids, ((0, 0), (0, plan.chunk)), constant_values=plan.per_shard), most


# `take` and `put` do not use `jax.vmap`. JAX would mistake it for an outer one with `spmd_axis_name`,
# and checkify's index checks would fail on its scatter. `take` is jitted because these checks also fail
# on a gather under `jax.checkpoint` that is not.


@jax.jit
def take(x: Array, ids: Array) -> Array:
    """`x[l, ids[l]]` for `x` [L, n, ...], as [C, ...]. The rows for the id n are arbitrary."""
    at = x.at[_shards(ids), jnp.minimum(ids, x.shape[1] - 1)]
    rows = at.get(mode="promise_in_bounds", wrap_negative_indices=False)
    return rows.reshape(ids.size, *x.shape[2:])


def put(x: Array, ids: Array, rows: Array) -> Array:
    """`x` [L, n, ...] with `rows` [C, ...] at `ids` [L, c]. Rows for the id n are dropped."""
    rows = rows.reshape(*ids.shape, *x.shape[2:])
    return x.at[_shards(ids), ids].set(rows, mode="drop", wrap_negative_indices=False)


def _shards(ids: Array) -> Array:
    return lax.broadcasted_iota(ids.dtype, ids.shape, 0)


def dot(a: Array, b: Array, precision: Any = None) -> Array:
    """The matrix product, in float32 for 16-bit operands."""
    return jnp.matmul(a, b, precision=precision, preferred_element_type=compute_dtype(a.dtype))


def products(
    hidden: Array, kernel: Array, g: Array, of_kernel: Array | None, wants_hidden: bool,
    precision: Any,
) -> tuple[Array | None, Array | None]:  # fmt: skip
    """The backward products: `g kernel^T` in the dtype of `hidden`, if `wants_hidden`, and
    `of_kernel + hidden^T g`, if `of_kernel` is given. The cotangent g, [C, V], is first rounded to the
    kernel's dtype, so that a 16-bit kernel is multiplied by 16 bits."""
    g = g.astype(kernel.dtype)
    return (
        dot(g, kernel.T, precision).astype(hidden.dtype) if wants_hidden else None,
        None if of_kernel is None else of_kernel + dot(hidden.T, g, precision),
    )


# A chunk of c examples adds [D, V] to the kernel's gradient in float32: 8 D V bytes of traffic for
# 2 c D V operations, for any D and V. Both take equally long at c = 4 x rate / bandwidth, which is
# 1050 on an H100 (790 TFLOP/s, 3 TB/s) and 700 on a TPU v5p. At twice that, the traffic is nearly free.
# Measured on an H100, before there was a kernel for the statistics: with chunks of 512, 1024, 2048 and
# 4096 examples the head with its gradients took 1.95, 1.51, 1.36 and 1.30 times as long as 6NDV
# operations at 790 TFLOP/s (32768 x 4096 x 128256), and 2.11, 1.63, 1.47 and 1.46 times as long
# (8192 x 2304 x 256000). 2**29 logits are 2 GiB: 2048 examples of 256000 classes.
LOOP = Loop(
    gradients=Size(logits=2**27, least=2048, most=8192, budget=2**29),
    values=Size(logits=2**27, least=1024, most=8192, budget=2**29),
    products=products,
    take=take,
)
