"""The conformance suite: every promise, kept or broken by a loss."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from .._command import Progress, Steps, check_known
from ._candidate import ways_to_call
from ._promises import PROMISES, Promise
from ._trial import IMPORTS, Loss, NotApplicable, Raised, what_raised

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"


@dataclasses.dataclass(frozen=True)
class Result:
    """Whether a loss keeps one promise."""

    promise: str
    says: str  # the promise, in words
    status: str  # "pass", "fail" or "not applicable"
    error: float | None = None  # the error that comes nearest to its bound, or exceeds it most
    bound: float | None = None
    detail: str = ""  # the answer and the right one, the error raised, or why it does not apply
    broken: str = ""  # for a broken promise: what that means for training
    reproduce: str = ""  # for a broken promise: lines of Python that show it
    documented: str = ""  # for a broken promise: where the loss's documentation says so


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
    progress: Progress | None = None,
) -> Report:
    """Test a softmax cross-entropy of any library, promise by promise.

    Each promise is checked on inputs of its own against float64: values, gradients, the corners
    (infinities, ties, bad labels, masks), 16-bit types, JAX's transformations, memory and errors. A
    promise about a keyword that the loss does not take, or that its kind cannot keep, does not apply.

    A loss with another signature is adapted by a lambda, for instance
    `lambda hidden, kernel, labels: other(hidden, labels, kernel.T, reduction="none")`. One that returns
    only a mean or a sum is called once for each example where a promise is about the examples' losses.

    Args:
      loss_fn: `loss_fn(logits, labels)` for logits [N, V], or `loss_fn(hidden, kernel, labels)` for
        hidden [N, D] and kernel [D, V]; returns the losses [N], or their mean or sum. Keywords with
        the names that jax_sce uses (`where`, `ignore_index`, `weights`, `class_weights`,
        `label_smoothing`, `z_loss`, `softcap`, `temperature`, `reduction`, `return_aux`,
        `forward_mode`) are tested if it takes them, and so are labels that are a `jax_sce.Teacher`.
      kind: "integer" for labels [N], "dense" for labels [N, V], distributions, or "linear" for the loss
        of a head with labels [N].
      options: The keywords that it takes; None reads them from its signature.
      promises: The names of those to check; None checks all.
      name: What the report calls the loss.
      source: Lines of Python that define `loss`, for the reproductions.
      documented: By the promise's name, where the loss's documentation says that it is not kept.
      progress: Called before each step with the number of steps done, the number of all, and a
        description of the next.

    Returns:
      A `Report`; `report.holds`, `report.broken`, `report["confident rows"]`, `print(report)`.

    Raises:
      ValueError: `kind` or a name in `promises` is unknown, or the loss returns neither losses of shape
        [N] nor one number.
      Exception: The error of the loss when it is first called, with a note if another `kind` would do.

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
    source = source or (f"loss = {name}  # yours" if name.isidentifier() else "# loss = yours")
    step = Steps(len(chosen), progress)
    step.detail("compiling the first call")
    try:
        loss = Loss.of(loss_fn, kind, options, f"{IMPORTS}\n{source}")
    except Exception as error:
        if other := next((k for k, names in ways_to_call(loss_fn) if not names), None):
            error.add_note(f"It can be called with kind={other!r}.")
        raise
    results = []
    with jax.default_matmul_precision("highest"):
        for promise in chosen:
            step(f"compiling and checking: {promise.name}")
            results.append(_result(promise, loss, documented or {}))
    return Report(name, kind, tuple(results))


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
        kinds = " and ".join(promise.kinds)
        return result(NOT_APPLICABLE, detail=f"the promise is about kind {kinds}")
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
    """For JSON, which has no infinity: it becomes None."""

    def clean(x: Any) -> Any:
        return None if isinstance(x, float) and not math.isfinite(x) else x

    results = [
        {k: clean(x) for k, x in dataclasses.asdict(result).items()} for result in report.results
    ]
    return {"name": report.name, "kind": report.kind, "holds": report.holds, "results": results}
