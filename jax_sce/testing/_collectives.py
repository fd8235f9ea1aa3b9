"""What a compiled program sends between devices, read from its text."""

from typing import Any

from .._hlo import Collective as Collective, kernels


def collectives(compiled: Any) -> list[Collective]:
    """What crosses the devices in a program, `jax.jit(f).lower(...).compile()`; of a loop, in one turn.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_sce.testing import collectives
      >>> collectives(jax.jit(jnp.sum).lower(jnp.ones(8)).compile())
      []
    """
    found = kernels(compiled.as_text(), every_branch=True)
    return [kernel.collective for kernel in found if kernel.collective is not None]
