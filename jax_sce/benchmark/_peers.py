"""Who is compared: the losses of JAX's libraries and PyTorch, each with the package that it needs.

naive     `-sum y log softmax(z)` of logits; of a linear head, `optax` on its logits, which are
          accumulated in float32
optax     `softmax_cross_entropy_with_integer_labels`, or of distributions `softmax_cross_entropy`
jax_sce   this library
tokamax   `linear_softmax_cross_entropy_loss`, by implementation
jax-cce   `linear_cross_entropy`, which takes the kernel as [V, D]: given the transposed one
torch     `torch.nn.functional.cross_entropy`, and on GPU the same under `torch.compile`

All of them return the mean loss. `BASELINE` is the one by whose time the others' are divided.
"""

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jax_sce

from .._command import check_known, is_installed
from ._cases import PASSES, Case
from ._programs import Loss, Program, jax_program
from ._torch import PASSES as TORCH_PASSES, torch_program

BASELINE = {
    "logits": "optax",
    "distributions": "optax",
    "linear": "naive",
    "scaling": "naive",
    "small": "optax",
}


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    program: Callable[[Case, str], Program]
    package: str | None = None  # as pip calls it; None if it is always there
    passes: Sequence[str] = PASSES["logits"]

    @property
    def module(self) -> str | None:
        return self.package and self.package.replace("-", "_")

    @property
    def installed(self) -> bool:
        return self.package is None or is_installed(self.package)


def all_peers(subject: str) -> list[Peer]:
    """Those of the subject on this platform, installed or not."""
    on = jax.default_backend()
    if subject == "logits":
        peers = [
            Peer("naive", _of(_naive)),
            Peer("optax", _of(_optax), "optax"),
            Peer("jax_sce", _of(_jax_sce)),
        ]
    elif subject == "distributions":
        peers = [
            Peer("naive", _of(_naive_dense)),
            Peer("optax", _of(_optax_dense), "optax"),
            Peer("jax_sce", _of(_jax_sce_dense)),
        ]
    else:
        tokamax = ["xla", "chunked_xla"] + (["mosaic_tpu"] if on == "tpu" else [])
        peers = [
            Peer("naive", _of(_naive_head), "optax"),
            Peer("jax_sce", _of(_jax_sce_head)),
            *(
                Peer(f"tokamax {x}", _of(functools.partial(_tokamax, x)), "tokamax")
                for x in tokamax
            ),
            Peer("jax-cce", _of(_jax_cce), "jax-cce"),
        ]
    if on in ("cpu", "gpu"):
        peers.append(Peer("torch", torch_program, "torch", TORCH_PASSES))
    if on == "gpu":
        compiled = functools.partial(torch_program, compiled=True)
        peers.append(Peer("torch compiled", compiled, "torch", TORCH_PASSES))
    return peers


def missing(subject: str) -> list[str]:
    """The packages that would add peers, and are not installed."""
    return sorted({str(p.package) for p in all_peers(subject) if not p.installed})


def choose(subject: str, names: Sequence[str] | None, losses: Mapping[str, Loss]) -> list[Peer]:
    """The installed peers of those names, all for None, and the losses that the caller brings."""
    known = all_peers(subject)
    check_known(f"peers of {subject}", names or (), [peer.name for peer in known])
    if taken := {peer.name for peer in known} & set(losses):
        raise ValueError(f"losses must have names that no peer has, got {', '.join(taken)}")
    chosen = [p for p in known if p.installed and (names is None or p.name in names)]
    return chosen + [Peer(name, _of(loss)) for name, loss in losses.items()]


def import_packages(peers: Sequence[Peer]) -> None:
    """Before anything is compiled: what is compiled before tokamax is imported, JAX compiles again at
    its next call, which would be a timed one."""
    for module in {peer.module for peer in peers if peer.module is not None}:
        # One that cannot be imported says so in its peer's row.
        with contextlib.suppress(Exception):
            importlib.import_module(module)


def _of(loss: Loss) -> Callable[[Case, str], Program]:
    return functools.partial(jax_program, loss)


# -- logits [N, V], labels [N] -------------------------------------------------------------------------


def _naive(logits: Array, labels: Array) -> Array:
    return _naive_dense(logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))


def _optax(logits: Array, labels: Array) -> Array:
    import optax

    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _jax_sce(logits: Array, labels: Array) -> Array:
    return jax_sce.softmax_cross_entropy_with_integer_labels(logits, labels, reduction="mean")


# -- logits [N, V], labels [N, V] ----------------------------------------------------------------------


def _naive_dense(logits: Array, labels: Array) -> Array:
    return jnp.mean(-jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1))


def _optax_dense(logits: Array, labels: Array) -> Array:
    import optax

    return jnp.mean(optax.softmax_cross_entropy(logits, labels))


def _jax_sce_dense(logits: Array, labels: Array) -> Array:
    return jax_sce.softmax_cross_entropy(logits, labels, reduction="mean")


# -- hidden [N, D], kernel [D, V], labels [N] ----------------------------------------------------------


def _naive_head(hidden: Array, kernel: Array, labels: Array) -> Array:
    return _optax(jnp.dot(hidden, kernel, preferred_element_type=jnp.float32), labels)


def _jax_sce_head(hidden: Array, kernel: Array, labels: Array) -> Any:
    return jax_sce.linear_softmax_cross_entropy(hidden, kernel, labels, reduction="mean")


def _tokamax(implementation: str, hidden: Array, kernel: Array, labels: Array) -> Array:
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, kernel, reduction="mean", implementation=implementation
    )


def _jax_cce(hidden: Array, kernel: Array, labels: Array) -> Array:
    import jax_cce

    return jax_cce.linear_cross_entropy(hidden, kernel.T, labels)
