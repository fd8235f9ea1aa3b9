"""The order in which a head works off its examples: in lanes, in chunks, those that count first.

The N examples are L lanes of n, and a chunk takes c from each lane: C = L c. With a lane for each
device, whichever way the examples are split over the devices, each device has its part of every chunk
and no example travels. On one device there is one lane, and in a `jax.shard_map` over all axes too.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _rows
from ._axis import AxisName


class Size(NamedTuple):
    """How many examples a chunk of V logits each should have, the product of which is its memory."""

    logits: int  # so many logits are enough to run at full rate,
    least: int  # if they are of so many examples, for the kernel's sake;
    most: int  # more examples gain nothing,
    budget: int  # and more logits cost too much memory, come what may

    def examples(self, num_classes: int) -> int:
        enough = min(max(self.logits // num_classes, self.least), self.most)
        return max(min(enough, self.budget // num_classes), 1)


# A chunk reads the kernel and adds to its gradient, [D, V] each, whatever its size, and matrix products
# want enough rows. On two CPU cores (AVX2), chunks of 64 examples took 1.4 times as long as ones of 256,
# ones of 128 1.15 times, and 512 no less: so 256, and more where the vocabulary is small. Values alone
# run at full rate from 64 on. 2**25 logits are 128 MiB. An accelerator has many times the rate for the
# same bandwidth of memory: some thousand examples, 1 GiB of logits at most; this was not measured.
GRADIENTS = {"cpu": Size(2**22, 256, 512, 2**25), "default": Size(2**27, 512, 4096, 2**28)}
VALUES = {"cpu": Size(2**22, 64, 256, 2**25), "default": Size(2**27, 512, 4096, 2**28)}


class Plan(NamedTuple):
    """How the work is laid out, all of it known when tracing."""

    lanes: int  # L
    per_lane: int  # n
    chunk: int  # c, at least 1
    chunk_of_values: int  # c where no gradient is computed
    with_prediction: bool
    axis_name: AxisName  # over which the classes are split

    @property
    def shape(self) -> tuple[int, int]:
        return self.lanes, self.per_lane

    @property
    def chunks(self) -> int:
        return math.ceil(self.per_lane / self.chunk)


class Plans(NamedTuple):
    cpu: Plan
    default: Plan

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(plan, *args)`, with the plan for the platform that it is compiled for."""
        if self.cpu == self.default:
            return fn(self.default, *args)
        cpu, default = (functools.partial(fn, plan) for plan in self)
        return lax.platform_dependent(*args, cpu=cpu, default=default)


def plans(
    num_examples: int,
    num_classes: int,
    chunk_size: int | None,
    with_prediction: bool,
    axis_name: AxisName,
) -> Plans:
    lanes = math.gcd(num_examples, _devices()) if num_examples else 1
    per_lane = num_examples // lanes

    def per_chunk(size: Size) -> int:
        chunks = max(math.ceil(num_examples / (chunk_size or size.examples(num_classes))), 1)
        return max(math.ceil(per_lane / chunks), 1)  # as even as they can be

    def plan(platform: str) -> Plan:
        chunk, values = per_chunk(GRADIENTS[platform]), per_chunk(VALUES[platform])
        return Plan(lanes, per_lane, chunk, values, with_prediction, axis_name)

    return Plans(plan("cpu"), plan("default"))


def _devices() -> int:
    """Over how many the compiler may split the examples: inside `jax.shard_map`, those of the axes that
    it leaves automatic."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return jax.device_count()
    return math.prod(n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes)


def order(plan: Plan, live: Array | None) -> tuple[Array, Array | int]:
    """The examples of each lane, [L, n and a chunk more], the `live` ones first, and how many those are
    at most. Behind the last example of a lane stands n, which is none."""
    ids = jnp.broadcast_to(jnp.arange(plan.per_lane), plan.shape)
    most: Array | int = plan.per_lane
    if live is not None:
        ids = jnp.argsort(~live, axis=1, stable=True)
        most = jnp.max(jnp.sum(live, axis=1, dtype=jnp.int32), initial=0)
    return jnp.pad(ids, ((0, 0), (0, plan.chunk)), constant_values=plan.per_lane), most


@jax.custom_jvp
def take(x: Array, ids: Array) -> Array:
    """`x[l, ids[l]]` of [L, n, ...], as [C, ...]. On CPU moved as bits; on TPU they would be a copy of
    all of `x`, made before the loop and held through it."""

    def as_bits(x, ids):
        return _rows.from_bits(_take(_rows.to_bits(x), ids), x.dtype)

    return lax.platform_dependent(x, ids, cpu=as_bits, default=_take)


@take.defjvp
def _take_jvp(primals, tangents):
    return take(*primals), _take(tangents[0], primals[1])


def _take(x: Array, ids: Array) -> Array:
    rows = jax.vmap(lambda x, ids: jnp.take(x, ids, axis=0, mode="clip"))(x, ids)
    return rows.reshape(ids.size, *x.shape[2:])


def put(x: Array, ids: Array, rows: Array) -> Array:
    """`x` [L, n, ...] with `rows` [C, ...] at `ids` [L, c]; what has the id n goes nowhere."""
    rows = rows.reshape(*ids.shape, *x.shape[2:])
    return jax.vmap(lambda x, ids, rows: x.at[ids].set(rows, mode="drop"))(x, ids, rows)
