"""How a head processes its examples: in shards, in chunks, those that count first; and the pieces of a
chunk.

The N examples are L shards of n, and a chunk takes c from each shard: C = L c. In a loop that the
compiler splits there is a shard for each device, so that each has its part of every chunk and no example
travels. In the loop of one device there is one shard."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._rows import compute_dtype


class Size(NamedTuple):
    """How many examples a chunk should have, of V logits each."""

    logits: int  # so many logits are enough to run at full rate,
    least: int  # if they are of so many examples, for the kernel's sake;
    most: int  # more examples gain nothing,
    budget: int  # and more logits cost too much memory, come what may

    def examples(self, num_classes: int) -> int:
        enough = min(max(self.logits // num_classes, self.least), self.most)
        return max(min(enough, self.budget // num_classes), 1)


class Loop(NamedTuple):
    """How a platform runs the loop over the chunks."""

    gradients: Size
    values: Size  # where no gradient is computed
    products: Callable
    take: Callable
    devices: int = 1  # over so many the compiler may split the examples


class Plan(NamedTuple):
    """How the work is laid out, all of it known when tracing."""

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
    """Chunks as even as they can be, of at most `chunk_size` examples or else as the platform likes
    them. In a program exported for any number of examples that number is an expression: it divides and
    has a maximum, but has no order, and differs from all that it is not known to equal."""
    wanted = chunk_size or size.examples(num_classes)
    chunks = jax.core.max_dim(ceil_div(num_examples, wanted), 1)
    divisors = (n for n in range(1, devices + 1) if devices % n == 0 == num_examples % n)
    shards = max(divisors) if num_examples != 0 else 1
    per_shard = num_examples // shards
    return Plan(shards, per_shard, jax.core.max_dim(ceil_div(per_shard, chunks), 1))


def order(plan: Plan, counts: Array | None) -> tuple[Array, Array | int]:
    """The examples of each shard, [L, n and a chunk more], those that count first, and how many those
    are at most. Behind the last example of a shard stands n, which is none."""
    ids = jnp.broadcast_to(jnp.arange(plan.per_shard), plan.shape)
    most: Array | int = plan.per_shard
    if counts is not None:
        ids = jnp.argsort(~counts, axis=1, stable=True)
        most = jnp.max(jnp.sum(counts, axis=1, dtype=jnp.int32), initial=0)
    return jnp.pad(ids, ((0, 0), (0, plan.chunk)), constant_values=plan.per_shard), most


# There is no `jax.vmap` in these two: JAX takes it for an outer one with `spmd_axis_name`, and the index
# checks of checkify fail on the scatter that it makes, as they do on a gather that is not jitted under
# `jax.checkpoint`.


@jax.jit
def take(x: Array, ids: Array) -> Array:
    """`x[l, ids[l]]` of [L, n, ...], as [C, ...]; anything for the id n."""
    at = x.at[_shards(ids), jnp.minimum(ids, x.shape[1] - 1)]
    rows = at.get(mode="promise_in_bounds", wrap_negative_indices=False)
    return rows.reshape(ids.size, *x.shape[2:])


@jax.jit
def put(x: Array, ids: Array, rows: Array) -> Array:
    """`x` [L, n, ...] with `rows` [C, ...] at `ids` [L, c]; what has the id n goes nowhere."""
    rows = rows.reshape(*ids.shape, *x.shape[2:])
    return x.at[_shards(ids), ids].set(rows, mode="drop", wrap_negative_indices=False)


def _shards(ids: Array) -> Array:
    return lax.broadcasted_iota(ids.dtype, ids.shape, 0)


def dot(a: Array, b: Array, precision: Any = None) -> Array:
    """The matrix product; of 16-bit operands in float32."""
    return jnp.matmul(a, b, precision=precision, preferred_element_type=compute_dtype(a.dtype))


def products(
    hidden: Array, kernel: Array, g: Array, of_kernel: Array | None, wants_hidden: bool,
    precision: Any,
) -> tuple[Array | None, Array | None]:  # fmt: skip
    """Backward: `g kernel^T` in the dtype of `hidden`, if it is wanted, and `of_kernel + hidden^T g`,
    if that is. The cotangent is rounded first, to multiply 16-bit numbers by such."""
    g = g.astype(kernel.dtype)
    return (
        dot(g, kernel.T, precision).astype(hidden.dtype) if wants_hidden else None,
        None if of_kernel is None else of_kernel + dot(hidden.T, g, precision),
    )


# A chunk of c examples adds [D, V] to the kernel's gradient in float32: 8 D V bytes of traffic for its
# 2 c D V operations, whatever D and V are. The product alone is as long as that traffic at c = 4 x rate
# / bandwidth, 1050 on an H100 (790 TFLOP/s, 3 TB/s) and 700 on a TPU v5p, and the traffic is nearly
# free at twice that. Measured on an H100, before there was a kernel for the statistics: with 512, 1024,
# 2048 and 4096 examples in a chunk the head with its gradients took 1.95, 1.51, 1.36 and 1.30 times as
# long as 6NDV operations at 790 TFLOP/s (32768 x 4096 x 128256), and 2.11, 1.63, 1.47 and 1.46 times
# (8192 x 2304 x 256000). 2**29 logits are 2 GiB, which is 2048 examples of 256000 classes.
LOOP = Loop(
    gradients=Size(logits=2**27, least=2048, most=8192, budget=2**29),
    values=Size(logits=2**27, least=1024, most=8192, budget=2**29),
    products=products,
    take=take,
)
