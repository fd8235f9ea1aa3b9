"""A loss on trial: called as a function of logits, whatever its signature, and measured."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._oracle import Exact, exact, one_hot, wide

ORDINARY = 1e-5  # a hundred roundings of 2^-24, and less than any term that could be missing
TINY = 2.0**-126  # below this a compiler may flush to zero

KINDS = ("integer", "dense", "linear")
TAKES = {
    "integer": ("logits", "labels"),
    "dense": ("logits", "labels"),
    "linear": ("hidden", "kernel", "labels"),
}


class NotApplicable(Exception):
    """The promise is not about this loss; the message says why."""


class Raised(Exception):
    """The loss raised an error where it should have answered."""

    def __init__(self, error: Exception, reproduce: str):
        super().__init__(what_raised(error))
        self.reproduce = reproduce  # lines of Python


def what_raised(error: Exception) -> str:
    raised = str(error).strip() or type(error).__name__
    return f"raises {type(error).__name__}: {raised.splitlines()[0]}"


# -- inputs -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Logits [N, V], class ids [N] or distributions [N, V], options, and how to make them anew."""

    logits: np.ndarray
    labels: np.ndarray
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: str = ""  # Python for the arrays; empty if they are to be written down

    @property
    def targets(self) -> np.ndarray:
        """Distributions [N, V], float64."""
        if self.labels.ndim == self.logits.ndim:
            return wide(self.labels)
        return one_hot(self.labels, self.logits.shape[-1])

    @functools.cached_property
    def exact(self) -> Exact:
        known = ("label_smoothing", "class_weights", "z_loss", "softcap", "temperature")
        return exact(
            self.logits, self.targets, **{k: x for k, x in self.options.items() if k in known}
        )

    def and_then(self, *lines: str) -> "Case":
        """With more lines in its recipe."""
        return dataclasses.replace(self, recipe="\n".join([*self.written(), *lines]))

    def with_options(self, **options: Any) -> "Case":
        return dataclasses.replace(self, options=options)

    def written(self) -> list[str]:
        """Lines of Python that make the arrays."""
        if self.recipe:
            return self.recipe.splitlines()
        return [f"logits = {literal(self.logits)}", f"labels = {literal(self.labels)}"]


def literal(x: np.ndarray) -> str:
    numbers = repr(x.tolist()).replace("inf", "np.inf").replace("nan", "np.nan")
    module = "jnp" if x.dtype.name == "bfloat16" else "np"
    return f"{module}.array({numbers}, {module}.{x.dtype.name})"


def rows(*logits: Any, labels: Any = 0, dtype: Any = np.float32) -> Case:
    """The logits are written down; the labels are class 0 unless they are given."""
    array = np.array(logits, dtype)
    return Case(array, np.broadcast_to(np.asarray(labels), array.shape[:1]).astype(np.int32))


def normal(n: int, v: int, *, seed: int = 0, dtype: str = "float32") -> Case:
    """Logits of standard deviation 2.5, so small that every class counts."""
    return _drawn(n, v, seed, dtype, f"draw.integers({v}, size={n}, dtype=np.int32)")


def distributions(n: int, v: int) -> Case:
    """The same with targets that do not sum to one, of either sign."""
    return _drawn(n, v, 0, "float32", f"draw.uniform(-0.5, 1, ({n}, {v})).astype(jnp.float32)")


def zeros(n: int, v: int) -> Case:
    recipe = f"logits = np.zeros(({n}, {v}), np.float32)\nlabels = np.zeros({n}, np.int32)"
    names = run(recipe)
    return Case(names["logits"], names["labels"], recipe=recipe)


@functools.lru_cache(maxsize=32)
def _drawn(n: int, v: int, seed: int, dtype: str, labels: str) -> Case:
    recipe = (
        f"draw = np.random.default_rng({seed})\n"
        f"logits = (2.5 * draw.standard_normal(({n}, {v}))).astype(jnp.{dtype})\n"
        f"labels = {labels}"
    )
    names = run(recipe)
    return Case(names["logits"], names["labels"], recipe=recipe)


def first_case() -> Case:
    """A loss is called with it before any promise is checked."""
    return rows([0.0, 1.0], [2.0, -1.0], [0.0, 0.0], labels=[0, 1, 1])


def run(lines: str, **names: Any) -> dict[str, Any]:
    """The names that these lines of Python define. The lines that are shown are those that ran."""
    names = {"jax": jax, "jnp": jnp, "np": np, **names}
    exec(lines, names)
    return names


# -- the loss -----------------------------------------------------------------------------------------


IMPORTS = "import jax, jax.numpy as jnp, numpy as np"
_ARRAYS = ("hidden", "kernel", "logits", "labels")
_IDENTITY = "jnp.eye(len(labels), dtype=logits.dtype)"


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss with its signature: the keywords it takes, and whether it returns the examples' losses."""

    fn: Callable[..., Any]
    kind: str
    options: frozenset[str]  # the keywords that it takes
    source: str  # lines of Python that import what is needed and define `loss`
    reduces: str = ""  # "mean" or "sum" if it returns one number only

    @classmethod
    def of(cls, fn: Callable[..., Any], kind: str, options: Any, source: str) -> "Loss":
        """Calls it once to see what it returns.

        Raises:
          ValueError: It returns neither the loss of each example nor one number.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        names = keywords_of(fn, kind) if options is None else frozenset(options)
        loss = cls(fn, kind, names, source)
        case = first_case()
        out = fn(*loss.arrays(case))
        if isinstance(out, tuple | list | dict) or jnp.shape(out) not in ((3,), ()):
            came = type(out).__name__ if isinstance(out, tuple | list | dict) else jnp.shape(out)
            raise ValueError(
                f"loss_fn must return the losses, of shape (3,) for three examples, or one number, "
                f"got {came}; adapt it by a lambda"
            )
        if jnp.shape(out) == (3,):
            return loss
        total = float(case.exact.loss.sum())
        is_mean = abs(3 * float(out) - total) < abs(float(out) - total)
        return dataclasses.replace(loss, reduces="mean" if is_mean else "sum")

    def arrays(self, case: Case) -> tuple[Array, ...]:
        """The arrays that it is called with. A head gets the rows of the identity as hidden states, so
        that its kernel is the logits, exactly."""
        logits, labels = jnp.asarray(case.logits), jnp.asarray(case.labels)
        if self.kind == "dense" and labels.ndim < logits.ndim:
            labels = jnp.asarray(case.targets.astype(case.logits.dtype))
        if self.kind != "linear":
            return logits, labels
        return jnp.eye(logits.shape[0], dtype=logits.dtype), logits, labels

    @property
    def position(self) -> int:
        """The position of the logits among these arrays."""
        return 1 if self.kind == "linear" else 0

    def at_logits(self, arrays: tuple[Array, ...], logits: Array) -> tuple[Array, ...]:
        """The arrays, with other logits."""
        return replaced(arrays, self.position, logits)

    def raw(self, *arrays: Array, **options: Any) -> Array:
        return jnp.asarray(self.fn(*arrays, **options))

    def each(self, *arrays: Array, **options: Any) -> Array:
        """The loss of each example, [N]."""
        if not self.reduces:
            return self.raw(*arrays, **options)
        return run(self.defining_each, loss=self.raw)["each"](*arrays, **options)

    @property
    def defining_each(self) -> str:
        """Python for the losses of the examples, by a call for each, if the loss returns one number."""
        sliced = [name for name in ("weights", "where") if name in self.options]
        one = ", ".join(x if x == "kernel" else f"{x}[i:i+1]" for x in TAKES[self.kind])
        options = "options"
        if sliced:
            options = f"{{k: x[i:i+1] if k in {sliced} else x for k, x in options.items()}}"
        return (
            f"each = lambda {', '.join(TAKES[self.kind])}, **options: "
            f"jnp.stack([loss({one}, **{options}) for i in range(len(labels))])"
        )

    def call(self, *, state: str = _IDENTITY, whole: bool = False, **options: Any) -> str:
        """The call in Python: of `each`, or `whole`, as the loss itself is called. `state` is the hidden
        states of a head."""
        name = "each" if self.reduces and not whole else "loss"
        keywords = "".join(f", {k}={_shown(k, x)}" for k, x in options.items())
        hidden = f"{state}, " if self.kind == "linear" else ""
        return f"{name}({hidden}logits, labels{keywords})"


def replaced(arrays: tuple[Array, ...], position: int, x: Array) -> tuple[Array, ...]:
    return (*arrays[:position], x, *arrays[position + 1 :])


def _shown(name: str, x: Any) -> str:
    if not isinstance(x, np.ndarray | Array):
        return repr(x)
    return literal(np.asarray(x)) if x.size <= 12 else name  # the recipe defines it


def keywords_of(fn: Callable[..., Any], kind: str) -> frozenset[str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    taken = len(TAKES[kind])  # whatever they are called
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(p.name for p in list(parameters)[taken:] if p.kind in named)


# -- measuring ----------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """The error of an answer that comes nearest to the bound, or exceeds it most."""

    error: float  # infinite where one is finite and the other is not
    bound: float
    reproduce: str = ""  # lines of Python
    says: str = ""  # the answer, and the expected one

    @property
    def holds(self) -> bool:
        return self.error <= self.bound

    @property
    def excess(self) -> float:
        return _ratio(np.float64(self.error), np.float64(self.bound))


def _ratio(error: Any, bound: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(error == 0, 0, error / bound)[()]


def measure(
    loss: Loss, case: Case, call: str, got: Any, want: Any, bound: Any, scale: Any = None
) -> Measure:
    """The error relative to `scale`, by default the exact answer. `call` is the Python that gives the
    answer. Numbers below the smallest normal one count as 0."""
    shown, got = np.asarray(got), wide(got)
    want = np.broadcast_to(wide(want), got.shape)
    scale = np.broadcast_to(np.abs(want) if scale is None else wide(scale), got.shape)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    same |= (np.abs(got) < TINY) & (np.abs(want) < TINY)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(same, 0, np.abs(got - want) / scale)
    error = np.where(np.isnan(error), np.inf, error)
    bound = np.broadcast_to(bound, got.shape)
    at = np.unravel_index(np.argmax(_ratio(error, bound)), got.shape)
    element = f"[{', '.join(map(str, at))}]" if got.ndim else ""
    digits = 6 if f"{got[at]:.6g}" != f"{want[at]:.6g}" else 17
    says = f"gives {shown[at]!s}, expected {want[at]:.{digits}g}"
    reproduce = reproduction(loss, case, call + element, says)
    return Measure(float(error[at]), float(bound[at]), reproduce, f"{element} {says}".lstrip())


def flag(loss: Loss, case: Case, call: str, holds: bool, says: str) -> Measure:
    """A measure of what has no size."""
    return Measure(0.0 if holds else np.inf, 0.0, reproduction(loss, case, call, says), says)


@contextlib.contextmanager
def calling(loss: Loss, case: Case, call: str) -> Iterator[None]:
    """An error that is raised inside is reproduced by `call`."""
    try:
        yield
    except Exception as error:
        raise Raised(error, reproduction(loss, case, call, what_raised(error))) from error


def reproduction(loss: Loss, case: Case, call: str, says: str) -> str:
    lines = [loss.source, *case.written()]
    if loss.kind == "dense" and case.labels.ndim < case.logits.ndim:
        lines.append("labels = np.eye(logits.shape[1], dtype=logits.dtype)[labels]")
    made = [name for name in _ARRAYS if any(line.startswith(f"{name} = ") for line in lines)]
    names = ", ".join(made)
    lines.append(f"{names} = map(jnp.asarray, ({names}))")  # not all losses take NumPy's
    if "each(" in call:
        lines.append(loss.defining_each)
    return "\n".join([*lines, f"print({call})  # {says}"])


def derivative(loss: Loss, case: Case, g: Any = None, by: str = "logits") -> tuple[Array, Array]:
    """The losses, and the gradient of `g . losses` by the logits, or by another of the arrays."""
    position = loss.position if by == "logits" else TAKES[loss.kind].index(by)
    arrays = loss.arrays(case)

    def losses(x: Array) -> Array:
        return loss.each(*replaced(arrays, position, x), **case.options)

    with calling(loss, case, gradient_call(loss, case, g, by)):
        value, pull = jax.vjp(losses, arrays[position])
        g = np.ones(value.shape) if g is None else g
        return value, pull(jnp.asarray(g, value.dtype))[0]


def gradient_call(loss: Loss, case: Case, g: Any = None, by: str = "logits") -> str:
    total = loss.call(**case.options) + ("" if g is None else f" * {literal(g)}")
    return grad_of(f"jnp.sum({total})", by)


def grad_of(call: str, by: str = "logits", argnums: str = "0") -> str:
    numbers = "" if argnums == "0" else f", {argnums}"
    return f"jax.grad(lambda {by}: {call}{numbers})({by})"


def answers(
    loss: Loss,
    case: Case,
    bound: Any = ORDINARY,
    scale: Any = None,
    *,
    gradient_bound: Any = ORDINARY,
    by_element: bool = False,
    g: Any = None,
) -> Iterator[Measure]:
    """The losses against the exact ones, relative to themselves, and the gradient of `g . losses` by the
    logits, relative to the largest of each row or to each element."""
    losses, by_logits = derivative(loss, case, g)
    exact = case.exact
    yield measure(loss, case, loss.call(**case.options), losses, exact.loss, bound, scale)
    want = exact.by_logits if g is None else wide(g)[:, None] * exact.by_logits
    gradient_scale = None if by_element else largest_in_row(want)
    call = gradient_call(loss, case, g)
    yield measure(loss, case, call, by_logits, want, gradient_bound, gradient_scale)


def largest_in_row(x: np.ndarray) -> np.ndarray:
    largest = np.abs(x).max(-1, keepdims=True)
    return np.where(largest == 0, 1, largest)
