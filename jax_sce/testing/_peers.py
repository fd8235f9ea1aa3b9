"""The losses of the README's table: ours, and those of other libraries."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping

import jax_sce

from .._command import Progress, is_installed
from ._candidate import Candidate
from ._conformance import Report, conformance

_LABELS_ASSUMED = "its documentation assumes labels in [0, V)"
_NOT_INFINITE = "its documentation says that logits must not be -inf"


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    package: str  # the name that pip uses
    candidate: Candidate
    documented: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def installed(self) -> bool:
        return is_installed(self.package)

    @property
    def version(self) -> str:
        if self.package == "jax_sce":
            return jax_sce.__version__
        return importlib.metadata.version(self.package)


def report_of(
    candidate: Candidate,
    name: str,
    promises: list[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """The report of a loss, the same whether it is tested alone or beside others.

    Raises:
      ValueError: There is no such function.
      Exception: The error of the loss when it is first called.
    """
    loaded = candidate.loaded
    documented: Mapping[str, str] = {}
    for peer in PEERS:
        if peer.candidate == candidate:
            documented = peer.documented
    return conformance(
        loaded.loss,
        candidate.kind,
        options=loaded.options,
        promises=promises,
        name=name,
        source=candidate.source,
        documented=documented,
        progress=progress,
    )


def _tokamax(implementation: str) -> Peer:
    documented = {"absent classes": _NOT_INFINITE, "absent labels": _NOT_INFINITE}
    if implementation == "xla":
        whole = "its documentation says that it needs to materialize the full logits"
        documented |= {"memory": whole, "residuals": whole}
    candidate = Candidate(
        "tokamax:linear_softmax_cross_entropy_loss",
        "linear",
        ("hidden", "labels", "kernel"),
        {"reduction": "none", "implementation": implementation},
    )
    return Peer(f"tokamax {implementation}", "tokamax", candidate, documented)


PEERS = (
    Peer(
        "jax_sce integer",
        "jax_sce",
        Candidate("jax_sce:softmax_cross_entropy_with_integer_labels"),
    ),
    Peer("jax_sce dense", "jax_sce", Candidate("jax_sce:softmax_cross_entropy", "dense")),
    Peer("jax_sce linear", "jax_sce", Candidate("jax_sce:linear_softmax_cross_entropy", "linear")),
    Peer(
        "optax integer",
        "optax",
        Candidate("optax:softmax_cross_entropy_with_integer_labels"),
        {"bad labels": _LABELS_ASSUMED},
    ),
    Peer(
        "optax dense",
        "optax",
        Candidate("optax:softmax_cross_entropy", "dense"),
        {"absent classes": "its documentation points to safe_softmax_cross_entropy for -inf"},
    ),
    Peer(
        "optax safe dense",
        "optax",
        Candidate("optax:safe_softmax_cross_entropy", "dense"),
        {"targets": "its documentation assumes labels that sum to one"},
    ),
    _tokamax("xla"),
    _tokamax("chunked_xla"),
    Peer(
        "jax-cce",
        "jax-cce",
        Candidate("jax_cce:linear_cross_entropy", "linear", ("hidden", "kernel.T", "labels")),
        {
            "bad labels": _LABELS_ASSUMED,
            "float64": "its documentation says that float32 and bfloat16 are supported",
        },
    ),
)
