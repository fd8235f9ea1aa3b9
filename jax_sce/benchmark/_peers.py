"""The peers: the losses of JAX's libraries and PyTorch, each with the package that it needs.

naive          `-sum y log softmax(z)` of logits; of a linear head, `optax` on its logits, which are
               accumulated in float32
optax          `softmax_cross_entropy_with_integer_labels`, or of distributions `softmax_cross_entropy`
optax float32  the same, of 16-bit logits cast to float32 first
jax_sce        this library
tokamax        `linear_softmax_cross_entropy_loss`, by implementation
jax-cce        `linear_cross_entropy`, which takes the kernel as [V, D]: given the transposed one
torch          `torch.nn.functional.cross_entropy`, and on GPU the same under `torch.compile`
Liger-Kernel and cut-cross-entropy, on GPU: their fused heads for PyTorch

All of them return the mean loss. The times are divided by that of the `BASELINE`.
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

from .._command import Steps, check_known, is_installed
from ._cases import DTYPES, PASSES, SOFTCAP, Case
from ._programs import Loss, Program, jax_program
from ._torch import PASSES as TORCH_PASSES, torch_program

BASELINE = {
    "logits": "optax",
    "softcap": "optax",
    "distributions": "optax",
    "linear": "naive",
    "scaling": "naive",
    "small": "optax",
}


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    package: str | None = None  # the name that pip uses; None if it is always there
    loss: Loss | None = None  # in JAX
    program_of: Callable[[Case, str], Program] | None = None  # None for that of `loss`
    passes: Sequence[str] = PASSES["logits"]
    dtypes: Sequence[str] = DTYPES

    @property
    def module(self) -> str | None:
        return self.package and self.package.replace("-", "_")

    @property
    def installed(self) -> bool:
        return self.package is None or is_installed(self.package)

    def fits(self, case: Case, pass_name: str) -> bool:
        return pass_name in self.passes and case.dtype in self.dtypes

    def program(self, case: Case, pass_name: str) -> Program:
        if self.program_of is not None:
            return self.program_of(case, pass_name)
        assert self.loss is not None
        return jax_program(self.loss, case, pass_name)


def all_peers(subject: str, platform: str) -> list[Peer]:
    """The peers of the subject on the platform, installed or not."""
    if subject == "linear":
        tokamax = ["xla", "chunked_xla"] + (["mosaic_tpu"] if platform == "tpu" else [])
        peers = [
            Peer("naive", "optax", _naive_head),
            Peer("jax_sce", None, _jax_sce_head),
            *(Peer(f"tokamax {x}", "tokamax", functools.partial(_tokamax, x)) for x in tokamax),
            Peer("jax-cce", "jax-cce", _jax_cce),
        ]
    else:
        naive, optax, ours = _OF_LOGITS[subject]
        peers = [
            Peer("naive", None, naive),
            Peer("optax", "optax", optax),
            Peer("optax float32", "optax", _of_float32(optax), dtypes=("bfloat16",)),
            Peer("jax_sce", None, ours),
        ]
    in_torch: list[tuple[str, str, str]] = []  # name, package, and what `torch_program` calls it
    if platform in ("cpu", "gpu") and subject != "softcap":
        in_torch.append(("torch", "torch", "eager"))
    if platform == "gpu" and subject != "softcap":
        in_torch.append(("torch compiled", "torch", "compiled"))
    if platform == "gpu" and subject == "linear":
        in_torch.append(("Liger-Kernel", "liger-kernel", "liger"))
        in_torch.append(("cut-cross-entropy", "cut-cross-entropy", "cut"))
    return peers + [
        Peer(name, package, None, functools.partial(torch_program, by=by), TORCH_PASSES)
        for name, package, by in in_torch
    ]


def compiled_peers(subject: str, platform: str) -> list[str]:
    """The names of the peers that can be compiled for another machine."""
    return [peer.name for peer in all_peers(subject, platform) if peer.loss is not None]


def missing(peers: Sequence[Peer]) -> list[str]:
    """The packages of those peers that are not installed."""
    return sorted({str(peer.package) for peer in peers if not peer.installed})


def choose(
    subject: str, platform: str, names: Sequence[str] | None, losses: Mapping[str, Loss]
) -> list[Peer]:
    """The installed peers with these names, or all for None, and the caller's own losses."""
    known = all_peers(subject, platform)
    check_known(f"peers of {subject}", names or (), [peer.name for peer in known])
    if taken := {peer.name for peer in known} & set(losses):
        raise ValueError(f"losses must have names that no peer has, got {', '.join(taken)}")
    chosen = [p for p in known if p.installed and (names is None or p.name in names)]
    return chosen + [Peer(name, loss=loss) for name, loss in losses.items()]


def import_packages(peers: Sequence[Peer], step: Steps) -> None:
    """To be called before anything is compiled: a program that is compiled before tokamax is imported is
    compiled again at its next call, which would be a timed one."""
    for module in dict.fromkeys(peer.module for peer in peers if peer.module is not None):
        step.detail(f"importing {module}")
        # If it cannot be imported, its peer's row says so.
        with contextlib.suppress(Exception):
            importlib.import_module(module)


def _of_float32(loss: Loss) -> Loss:
    return lambda logits, labels: loss(logits.astype(jnp.float32), labels)


# -- logits [N, V], labels [N] -------------------------------------------------------------------------


def _naive(logits: Array, labels: Array) -> Array:
    return _naive_dense(logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))


def _optax(logits: Array, labels: Array) -> Array:
    import optax

    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _jax_sce(logits: Array, labels: Array) -> Array:
    return jax_sce.softmax_cross_entropy_with_integer_labels(logits, labels, reduction="mean")


# -- the same, capped --------------------------------------------------------------------------------


def _capped(loss: Loss) -> Loss:
    return lambda logits, labels: loss(SOFTCAP * jnp.tanh(logits / SOFTCAP), labels)


def _jax_sce_capped(logits: Array, labels: Array) -> Array:
    return jax_sce.softmax_cross_entropy_with_integer_labels(
        logits, labels, softcap=SOFTCAP, reduction="mean"
    )


# -- logits [N, V], labels [N, V] ----------------------------------------------------------------------


def _naive_dense(logits: Array, labels: Array) -> Array:
    return jnp.mean(-jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1))


def _optax_dense(logits: Array, labels: Array) -> Array:
    import optax

    return jnp.mean(optax.softmax_cross_entropy(logits, labels))


def _jax_sce_dense(logits: Array, labels: Array) -> Array:
    return jax_sce.softmax_cross_entropy(logits, labels, reduction="mean")


_OF_LOGITS: dict[str, tuple[Loss, Loss, Loss]] = {
    "logits": (_naive, _optax, _jax_sce),
    "softcap": (_capped(_naive), _capped(_optax), _jax_sce_capped),
    "distributions": (_naive_dense, _optax_dense, _jax_sce_dense),
}

# -- hidden [N, D], kernel [D, V], labels [N] ----------------------------------------------------------


def _naive_head(hidden: Array, kernel: Array, labels: Array) -> Array:
    return _optax(jnp.dot(hidden, kernel, preferred_element_type=jnp.float32), labels)


def _jax_sce_head(hidden: Array, kernel: Array, labels: Array) -> Any:
    return jax_sce.linear_softmax_cross_entropy(hidden, kernel, labels, reduction="mean")


def _tokamax(implementation: str, hidden: Array, kernel: Array, labels: Array) -> Array:
    import tokamax

    if implementation == "mosaic_tpu" and jax.default_backend() != "tpu":
        return _tokamax_for_tpu()(hidden, labels, kernel, reduction="mean")
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, kernel, reduction="mean", implementation=implementation
    )


def _tokamax_for_tpu() -> Any:
    """Its TPU kernels, without its check that there is a TPU."""
    from tokamax._src.ops.linear_softmax_cross_entropy_loss import api

    op = dataclasses.replace(api.IMPLEMENTATIONS["mosaic_tpu"], bypass_device_check=True)
    object.__setattr__(op, "vjp", dataclasses.replace(op.vjp, bypass_device_check=True))
    return op


def _jax_cce(hidden: Array, kernel: Array, labels: Array) -> Array:
    import jax_cce

    return jax_cce.linear_cross_entropy(hidden, kernel.T, labels)
