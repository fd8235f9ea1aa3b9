"""The losses of the README's table: ours, and those of other libraries, adapted in a line each."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping

import jax_sce

from .._command import is_installed
from ._conformance import Report, conformance
from ._trial import run

_LABELS_ASSUMED = "its documentation assumes labels in [0, V)"
_NOT_INFINITE = "its documentation says that logits must not be -inf"


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    kind: str
    package: str  # as pip calls it
    source: str  # defines `loss`, and is what is run
    documented: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def installed(self) -> bool:
        return is_installed(self.package)

    @property
    def version(self) -> str:
        if self.package == "jax_sce":
            return jax_sce.__version__
        return importlib.metadata.version(self.package)

    def report(self, promises: list[str] | None) -> Report:
        return conformance(run(self.source)["loss"], self.kind, promises=promises, name=self.name,
                           source=self.source, documented=self.documented)  # fmt: skip


def _tokamax(implementation: str) -> Peer:
    source = (
        "import tokamax\n"
        "def loss(hidden, kernel, labels, *, reduction='none'):\n"
        "    return tokamax.linear_softmax_cross_entropy_loss(\n"
        f"        hidden, labels, kernel, reduction=reduction, implementation={implementation!r})"
    )
    documented = {"absent classes": _NOT_INFINITE, "absent labels": _NOT_INFINITE}
    if implementation == "xla":
        whole = "its documentation says that it needs to materialize the full logits"
        documented |= {"memory": whole, "residuals": whole}
    return Peer(f"tokamax {implementation}", "linear", "tokamax", source, documented)


PEERS = (
    Peer(
        "jax_sce integer", "integer", "jax_sce",
        "from jax_sce import softmax_cross_entropy_with_integer_labels as loss",
    ),
    Peer(
        "jax_sce dense", "dense", "jax_sce",
        "from jax_sce import softmax_cross_entropy as loss",
    ),
    Peer(
        "jax_sce linear", "linear", "jax_sce",
        "from jax_sce import linear_softmax_cross_entropy as loss",
    ),
    Peer(
        "optax integer", "integer", "optax",
        "from optax import softmax_cross_entropy_with_integer_labels as loss",
        {"bad labels": _LABELS_ASSUMED},
    ),
    Peer(
        "optax dense", "dense", "optax",
        "from optax import softmax_cross_entropy as loss",
        {"absent classes": "its documentation points to safe_softmax_cross_entropy for -inf"},
    ),
    Peer(
        "optax safe dense", "dense", "optax",
        "from optax import safe_softmax_cross_entropy as loss",
        {"targets": "its documentation assumes labels that sum to one"},
    ),
    _tokamax("xla"),
    _tokamax("chunked_xla"),
    Peer(
        "jax-cce", "linear", "jax-cce",
        "import jax_cce\n"
        "def loss(hidden, kernel, labels):\n"
        "    return jax_cce.linear_cross_entropy(hidden, kernel.T, labels)",
        {
            "bad labels": _LABELS_ASSUMED,
            "float64": "its documentation says that float32 and bfloat16 are supported",
        },
    ),
)  # fmt: skip
