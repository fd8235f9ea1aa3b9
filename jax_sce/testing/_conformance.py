"""The conformance suite: every promise, kept or broken by a loss."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from .._command import check_known
from ._promises import PROMISES, Promise
from ._trial import Loss, NotApplicable, Raised, what_raised

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"


@dataclasses.dataclass(frozen=True)
class Result:
    """How a loss stands to one promise."""

    promise: str
    says: str  # what is promised
    status: str  # "pass", "fail" or "not applicable"
    error: float | None = None  # the one that comes nearest to its bound, or exceeds it most
    bound: float | None = None
    detail: str = ""  # what came and what is right, what it raised, or why it does not apply
    broken: str = ""  # of one that fails: what that means for training
    reproduce: str = ""  # of one that fails: lines of Python, where a few will do
    documented: str = ""  # of one that fails: where its makers say that it is so


@dataclasses.dataclass(frozen=True)
class Report:
    """The results, in the order of the promises."""

    name: str
    kind: str
    results: tuple[Result, ...]

    @property
    def holds(self) -> bool:
        """Whether every promise that applies is kept."""
        return not self.broken

    @property
    def broken(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.status == FAIL)

    def __getitem__(self, promise: str) -> Result:
        for result in self.results:
            if result.promise == promise:
                return result
        raise KeyError(promise)

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.kind}: promises broken: {len(self.broken)}"]
        for result in self.results:
            error = (
                "" if result.error is None else f", error {result.error:.1e} of {result.bound:.1e}"
            )
            lines.append(f"{result.status:15}{result.promise}{error}")
            if result.status == FAIL:
                lines += [f"    {result.detail}", f"    {result.broken}"]
        return "\n".join(lines)


def conformance(
    loss_fn: Callable[..., Any],
    kind: str = "integer",
    *,
    options: Iterable[str] | None = None,
    promises: Iterable[str] | None = None,
    name: str = "",
    source: str = "",
    documented: Mapping[str, str] | None = None,
) -> Report:
    """Put a softmax cross-entropy of any library to the test.

    Each promise is checked on inputs of its own against float64: values, gradients, the corners
    (infinities, ties, bad labels, masks), 16-bit types, JAX's transformations, memory and errors. A
    promise about a keyword that the loss does not take, or that its kind cannot keep, does not apply.

    A loss with another signature is adapted by a lambda, for instance
    `lambda hidden, kernel, labels: other(hidden, labels, kernel.T, reduction="none")`. One that returns
    only a mean or a sum is called for each example apart where the losses of examples are asked for.

    Args:
      loss_fn: `loss_fn(logits, labels)` for logits [N, V], or `loss_fn(hidden, kernel, labels)` for
        hidden [N, D] and kernel [D, V]; returns the losses [N], or their mean or sum. Keywords of the
        names that jax_sce uses (`where`, `ignore_index`, `weights`, `class_weights`,
        `label_smoothing`, `z_loss`, `softcap`, `temperature`, `reduction`, `return_aux`,
        `forward_mode`) are put to the test if it takes them, and so are labels that are a
        `jax_sce.Teacher`.
      kind: "integer" for labels [N], "dense" for labels [N, V], distributions, or "linear" for the loss
        of a head with labels [N].
      options: The keywords that it takes; None reads them from its signature.
      promises: The names of those to check; None checks all.
      name: What the report calls the loss.
      source: Lines of Python that define `loss`, for the reproductions.
      documented: By the promise's name, where the loss's documentation says that it is not kept.

    Returns:
      A `Report`; `report.holds`, `report.broken`, `report["confident rows"]`, `print(report)`.

    Raises:
      ValueError: `kind` or a name in `promises` is unknown, or the loss returns neither losses of shape
        [N] nor one number. What the loss raises when it is first called is raised.

    Example:
      >>> import optax
      >>> from jax_sce.testing import conformance
      >>> report = conformance(optax.softmax_cross_entropy_with_integer_labels,
      ...                      promises=["values", "confident rows"])
      >>> print([(result.promise, result.status) for result in report.results])
      [('values', 'pass'), ('confident rows', 'fail')]
      >>> print(report["confident rows"].broken)
      examples that are nearly learned report a loss of 0 or a noisy one, and stop learning
    """
    chosen = PROMISES if promises is None else by_name(promises)
    name = name or getattr(loss_fn, "__name__", type(loss_fn).__name__)
    imports = "import jax, jax.numpy as jnp, numpy as np\n"
    loss = Loss.of(loss_fn, kind, options, imports + (source or f"loss = {name}  # yours"))
    with jax.default_matmul_precision("highest"):
        results = tuple(_result(promise, loss, documented or {}) for promise in chosen)
    return Report(name, kind, results)


def by_name(names: Iterable[str]) -> tuple[Promise, ...]:
    known = {promise.name: promise for promise in PROMISES}
    names = tuple(names)
    check_known("promises", names, known)
    return tuple(known[name] for name in names)


def _result(promise: Promise, loss: Loss, documented: Mapping[str, str]) -> Result:
    def result(status: str, **more: Any) -> Result:
        return Result(promise.name, promise.says, status, **more)

    def failed(**more: Any) -> Result:
        return result(
            FAIL, broken=promise.broken, documented=documented.get(promise.name, ""), **more
        )

    if loss.kind not in promise.kinds:
        return result(NOT_APPLICABLE, detail=f"it is not for losses of kind {loss.kind!r}")
    if lacking := [option for option in promise.needs if option not in loss.options]:
        return result(NOT_APPLICABLE, detail=f"it takes no {', '.join(lacking)}")
    try:
        measures = list(promise.check(loss))
    except NotApplicable as reason:
        return result(NOT_APPLICABLE, detail=str(reason))
    except Raised as error:
        return failed(detail=str(error), reproduce=error.reproduce)
    except Exception as error:
        return failed(detail=what_raised(error))
    if not measures:
        return result(PASS)
    worst = max(measures, key=lambda measure: measure.excess)
    measured = {"error": worst.error, "bound": worst.bound}
    if worst.holds:
        return result(PASS, **measured)
    return failed(**measured, detail=worst.says, reproduce=worst.reproduce)


def to_json(report: Report) -> dict[str, Any]:
    """As JSON can say it: what is not finite becomes None."""

    def clean(x: Any) -> Any:
        return None if isinstance(x, float) and not math.isfinite(x) else x

    results = [
        {k: clean(x) for k, x in dataclasses.asdict(result).items()} for result in report.results
    ]
    return {"name": report.name, "kind": report.kind, "holds": report.holds, "results": results}
