"""A pass of a peer as something to run: compiled for a case, with what the compiler says of it.

Passes:
  forward           the mean loss
  value_and_grad    the mean loss and its gradients, into fresh arrays
  donated_gradient  the gradient, written over the logits, which are donated; each run is given the
                    gradient of the run before for its logits
  eager_forward     the mean loss, without `jax.jit`

Gradients are by all arguments but the labels, which are last.

Floors, with the same passes:
  logits            a pass over the logits that negates them: into a fresh array for value_and_grad, in
                    place otherwise
  distributions     the same; the labels, which a loss reads too, are not counted
  linear            the matrix product that gives the logits, into an array that is there already; for
                    value_and_grad also the two that take such an array to the hidden states and the
                    kernel. Of more than 2^28 logits a part is made, and its time scaled to all.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._cases import Case

Output = tuple[Any, tuple[Any, ...]]  # the value or None, and the gradients
Run = Callable[[], Output]  # one run, and its end awaited
Loss = Callable[..., Any]  # of the case's arguments: the mean loss, or the loss of each example

_FLOOR_LOGITS = 2**28


@dataclasses.dataclass(frozen=True)
class Program:
    start: Callable[[tuple[Array, ...]], Run]  # given the case's arrays
    needed_bytes: int  # to run it: arguments, results and temporaries
    temporary_bytes: int | None = None
    compile_seconds: float | None = None
    times: float = 1  # what its time counts


def jax_program(loss: Loss, case: Case, pass_name: str) -> Program:
    """Of a JAX loss."""
    arguments, function = case.arguments(), pass_of(loss, case, pass_name)
    if pass_name == "eager_forward":
        return Program(lambda arrays: lambda: _done(function(*arrays)), total_bytes(arguments))
    return _compiled(function, arguments, donates=pass_name == "donated_gradient")


def pass_of(loss: Loss, case: Case, pass_name: str) -> Callable[..., Output]:
    """What a pass computes of the case's arguments."""

    def mean(*arguments: Array) -> Array:
        return jnp.mean(loss(*arguments))

    argnums = tuple(range(len(case.arguments()) - 1))
    if "grad" not in pass_name:
        return lambda *args: (mean(*args), ())
    if pass_name == "value_and_grad":
        return jax.value_and_grad(mean, argnums)
    return lambda *args: (None, jax.grad(mean, argnums)(*args))


def floor_program(case: Case, pass_name: str) -> Program:
    """What a loss does at the least: of logits the memory's traffic, of a head the arithmetic."""
    *floats, _ = case.arguments()
    if case.subject != "linear":
        return _compiled(
            lambda logits, *_: (None, (-logits,)),
            case.arguments(),
            donates=pass_name != "value_and_grad",
        )
    n, _, v = case.shape
    rows = max(min(n, _FLOOR_LOGITS // v), 1)
    out = jax.ShapeDtypeStruct((rows, v), floats[0].dtype)

    def products(out: Array, hidden: Array, kernel: Array) -> Output:
        del out  # overwritten
        hidden = hidden[:rows]
        logits = hidden @ kernel
        if pass_name != "value_and_grad":
            return None, (logits,)
        return None, (logits, logits @ kernel.T, hidden.T @ logits)

    program = _compiled(products, (out, *floats), donates=True)
    return dataclasses.replace(
        program,
        start=lambda arrays: program.start((jnp.zeros(out.shape, out.dtype), *arrays[:2])),
        times=n / rows,
    )


def _compiled(
    function: Callable[..., Output], arguments: Sequence[jax.ShapeDtypeStruct], donates: bool
) -> Program:
    jitted = jax.jit(function, donate_argnums=(0,) if donates else (), keep_unused=True)
    begin = time.perf_counter()
    memory = jitted.lower(*arguments).compile().memory_analysis()
    seconds = time.perf_counter() - begin
    start = functools.partial(_start_donated if donates else _start, jitted)
    if memory is None:  # some platforms do not tell
        return Program(start, total_bytes(arguments), compile_seconds=seconds)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = total_bytes(arguments) + results + memory.temp_size_in_bytes
    return Program(start, needed, memory.temp_size_in_bytes, seconds)


def _start(function: Callable[..., Output], arrays: tuple[Array, ...]) -> Run:
    return lambda: _done(function(*arrays))


def _start_donated(function: Callable[..., Output], arrays: tuple[Array, ...]) -> Run:
    given = [jnp.copy(arrays[0])]

    def run() -> Output:
        output = _done(function(given.pop(), *arrays[1:]))
        given.append(output[1][0])
        return output

    return run


def _done(output: Output) -> Output:
    return jax.block_until_ready(output)


def total_bytes(arguments: Sequence[jax.ShapeDtypeStruct]) -> int:
    return sum(x.size * x.dtype.itemsize for x in arguments)
