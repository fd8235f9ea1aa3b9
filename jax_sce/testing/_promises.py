"""The promises of a softmax cross-entropy, and how each one is tested.

The inputs would have caught the faults of published losses: small logits, so that every class counts;
odd sizes; cotangents and targets that are not uniform; rows that hold rubbish.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from .._targets import Teacher
from ._oracle import exact as exactly, wide
from ._trial import (
    KINDS,
    ORDINARY,
    Case,
    Loss,
    Measure,
    NotApplicable,
    Raised,
    answers,
    calling,
    derivative,
    distributions,
    flag,
    grad_of,
    gradient_call,
    largest_in_row,
    literal,
    measure,
    normal,
    rows,
    run,
    what_raised,
    zeros,
)

Check = Callable[[Loss], Iterator[Measure]]

# The bounds besides ORDINARY, and why.
EXACT = 1e-6  # of the loss itself: some sixteen roundings of 2^-24 where nothing cancels
GRADIENT = 2.0**-22  # (6 + the distance to the largest logit) times this, of the element itself
# Of a row's largest element: one rounding to bfloat16, and two to float16.
HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-10}


@dataclasses.dataclass(frozen=True)
class Promise:
    name: str
    says: str
    broken: str  # the consequence for training if it is broken
    check: Check
    kinds: Sequence[str] = KINDS
    needs: Sequence[str] = ()  # keywords that the loss must take


# -- values and gradients ------------------------------------------------------------------------------


def _values(loss: Loss) -> Iterator[Measure]:
    for case in (normal(7, 37), normal(2, 1000, seed=1)):
        with calling(loss, case, loss.call()):
            losses = loss.each(*loss.arrays(case))
        want = case.exact.loss
        yield measure(loss, case, loss.call(), losses, want, ORDINARY, np.maximum(1, want))


def _gradients(loss: Loss) -> Iterator[Measure]:
    for case in (normal(7, 37), normal(2, 1000, seed=1)):
        _, by_logits = answers(loss, case)
        yield by_logits


def _cotangents(loss: Loss) -> Iterator[Measure]:
    g = np.resize([1.0, -0.5, 0.25, 2.0, -1.5, 0.0], 9)
    _, by_logits = answers(loss, normal(9, 37), g=g)
    yield by_logits


def _targets(loss: Loss) -> Iterator[Measure]:
    case = distributions(7, 37)
    scale = (np.abs(case.targets) * case.exact.by_targets).sum(-1)
    yield from answers(loss, case, scale=scale)


def _target_gradients(loss: Loss) -> Iterator[Measure]:
    case = distributions(7, 37)
    g = np.resize([1.0, -0.5, 0.25], 7)
    _, got = derivative(loss, case, g, by="labels")
    call = gradient_call(loss, case, g, by="labels")
    yield measure(loss, case, call, got, g[:, None] * case.exact.by_targets, ORDINARY)


def _head_gradients(loss: Loss) -> Iterator[Measure]:
    """Of real hidden states and a real kernel, unlike the others, whose kernel is the logits; of more
    examples than a chunk may have, and an odd number."""
    n, d, v = 1101, 17, 2049
    recipe = (
        "draw = np.random.default_rng(0)\n"
        f"hidden = draw.standard_normal(({n}, {d})).astype(np.float32)\n"
        f"kernel = draw.standard_normal(({d}, {v})).astype(np.float32) / 2\n"
        f"labels = draw.integers({v}, size={n}, dtype=np.int32)"
    )
    made = run(recipe)
    hidden, kernel, labels = (made[name] for name in ("hidden", "kernel", "labels"))
    mean = _taken(loss, reduction="mean")
    terms = _taken(loss, softcap=2.0, z_loss=0.1)
    for options in ({}, *filter(None, (mean, terms))):
        case = Case(wide(hidden) @ wide(kernel), labels, options, recipe)
        exact = case.exact
        reduces = options.get("reduction", loss.reduces)
        each = np.resize([1.0, -0.5, 0.25, 2.0], n) if not reduces else np.ones(n)
        g = each / n if reduces == "mean" else each

        def total(hidden: Array, kernel: Array, options: Any = options, each: Any = each) -> Array:
            losses = loss.raw(hidden, kernel, jnp.asarray(labels), **options)
            return jnp.sum(losses * jnp.asarray(each[: losses.size], losses.dtype))

        keywords = "".join(f", {k}={x!r}" for k, x in options.items())
        call = f"jnp.sum(loss(hidden, kernel, labels{keywords})"
        call += ")" if reduces else f" * np.resize([1.0, -0.5, 0.25, 2.0], {n}))"
        with calling(loss, case, grad_of(call, "hidden, kernel", "(0, 1)")):
            got, (by_hidden, by_kernel) = jax.value_and_grad(total, (0, 1))(hidden, kernel)
        size = (np.abs(g) * exact.loss).sum()
        yield measure(loss, case, call, got, (g * exact.loss).sum(), ORDINARY, size)
        by_logits = g[:, None] * exact.by_logits
        for name, gradient, want in (
            ("hidden", by_hidden, by_logits @ wide(kernel).T),
            ("kernel", by_kernel, wide(hidden).T @ by_logits),
        ):
            yield measure(
                loss, case, grad_of(call, name), gradient, want, ORDINARY, np.abs(want).max()
            )


def _taken(loss: Loss, **options: Any) -> dict[str, Any]:
    """Those of the options that the loss takes."""
    return {k: x for k, x in options.items() if k in loss.options}


def _check_returns_each(loss: Loss) -> None:
    if loss.reduces:
        raise NotApplicable("it returns a mean or a sum only")


def _confident(loss: Loss) -> Iterator[Measure]:
    case = rows(*([gap, 0.0, -1.0] for gap in (5.0, 10.0, 17.0, 30.0, 80.0)))
    distance = case.logits.max(-1, keepdims=True) - case.logits
    yield from answers(loss, case, EXACT, gradient_bound=GRADIENT * (6 + distance),
                       by_element=True)  # fmt: skip


def _offsets(loss: Loss) -> Iterator[Measure]:
    drifts = ((1e3, 1.0), (1e6, 2.0), (1e8, 0.0), (-1e6, 2.0))
    case = rows(
        *([to + by, to - by] for to, by in drifts), *([to, to - 3 * by] for to, by in drifts)
    )
    yield from answers(loss, case, EXACT, gradient_bound=12 * GRADIENT, by_element=True)


def _ties(loss: Loss) -> Iterator[Measure]:
    case = rows([3.0, 3.0, 3.0, -40.0], [1.0, -2.0, 1.0, 1.0], [0.0] * 4, labels=[1, 1, 3])
    yield from answers(loss, case, EXACT, gradient_bound=50 * GRADIENT, by_element=True)


def _independent(loss: Loss) -> Iterator[Measure]:
    """Of a batch of one size, bit by bit."""
    _check_returns_each(loss)
    is_head = loss.kind == "linear"
    own = "hidden" if is_head else "logits"
    state: dict[str, Any] = {"state": "hidden"} if is_head else {}
    call = loss.call(**state)
    gradient = grad_of(f"jnp.sum({call})", own)
    for n, v in ((7, 37), (601, 2049)):
        case, row = normal(n, v), n // 2
        if is_head:
            case = case.and_then(
                f"hidden = draw.standard_normal(({n}, {n})).astype(np.float32) / 9"
            )
        want: list[Any] = []
        for others in (own, f"3 * {own}[::-1]", "np.nan", "np.inf"):
            line = f"{own} = np.where(np.arange({n})[:, None] == {row}, {own}, {others})"
            case_here = case.and_then(f"{line}.astype(np.float32)")
            made = run(case_here.recipe)
            case_here = dataclasses.replace(case_here, logits=made["logits"])
            with calling(loss, case_here, gradient):
                if is_head:
                    out = _by_hidden(loss, *(made[k] for k in ("hidden", "logits", "labels")))
                else:
                    out = derivative(loss, case_here)
            got = [x[row] for x in out]
            want = want or got
            for x, y, called in zip(got, want, (call, gradient), strict=True):
                yield measure(loss, case_here, f"{called}[{row}]", x, y, 0.0)


def _many_classes(loss: Loss) -> Iterator[Measure]:
    for v in (2049, 50257):
        yield from answers(loss, normal(2, v), by_element=True)


def _uneven(loss: Loss) -> Iterator[Measure]:
    """The batch as it is, by one call also where the loss gives but a number."""
    for n, v in ((1, 2), (131, 37), (5, 257)):
        case = normal(n, v, seed=v)
        arrays = loss.arrays(case)

        def total(z: Array, arrays: Any = arrays) -> Array:
            return jnp.sum(loss.raw(*loss.at_logits(arrays, z)))

        call = f"jnp.sum({loss.call(whole=True)})"
        with calling(loss, case, grad_of(call)):
            got, by_logits = jax.value_and_grad(total)(arrays[loss.position])
        exact = case.exact
        count = n if loss.reduces == "mean" else 1
        yield measure(loss, case, call, got, exact.loss.sum() / count, ORDINARY)
        want = exact.by_logits / count
        yield measure(loss, case, grad_of(call), by_logits, want, ORDINARY, np.abs(want).max())


def _one_class(loss: Loss) -> Iterator[Measure]:
    case = rows([3.0], [-7.0])
    yield from answers(loss, case, 0.0, 1.0, gradient_bound=0.0)


def _no_examples(loss: Loss) -> Iterator[Measure]:
    _check_returns_each(loss)
    for v in (5, 512):
        case = zeros(0, v)
        got, want = tuple(x.shape for x in derivative(loss, case)), ((0,), (0, v))
        call = f"({loss.call()}.shape, {gradient_call(loss, case)}.shape)"
        yield flag(loss, case, call, got == want, f"gives {got}, expected {want}")


# -- rows that are not ordinary -----------------------------------------------------------------------


def _absent(loss: Loss) -> Iterator[Measure]:
    for logits in ([1.0, -np.inf, 0.5], [-np.inf, 0.25, -np.inf]):
        case = rows(logits, labels=[int(np.isneginf(logits[0]))])
        yield from answers(loss, case, scale=1.0)


def _absent_label(loss: Loss) -> Iterator[Measure]:
    case = rows([-np.inf, 1.0, 0.5])
    yield from answers(loss, case)


def _bad_rows(loss: Loss) -> Iterator[Measure]:
    if loss.kind == "linear":
        yield from _bad_states(loss)
        return
    for bad in ([np.nan, 0.0, 0.0], [np.inf, 0.0, 0.0], [-np.inf] * 3):
        case = rows([1.0, 0.0, -1.0], bad, [0.5, 2.0, 0.0])
        losses, by_logits = map(np.array, derivative(loss, case))
        exact = case.exact
        yield measure(loss, case, loss.call(), losses, exact.loss, ORDINARY, 1.0)
        if np.isnan(by_logits[1]).any():  # one of them is loud enough
            by_logits[1] = np.nan
        yield measure(
            loss, case, gradient_call(loss, case), by_logits, exact.by_logits, ORDINARY, 1.0
        )


def _bad_states(loss: Loss) -> Iterator[Measure]:
    """Of a head, hidden states that hold rubbish. The kernel's gradient is everybody's, and may."""
    for bad in (np.nan, np.inf, -np.inf):
        hidden, kernel = np.eye(3, dtype=np.float32), normal(3, 5).logits
        hidden[1] = bad
        labels = np.zeros(3, np.int32)
        with np.errstate(invalid="ignore"):
            exact = Case(hidden @ kernel, labels).exact
        case = _written(normal(3, 5), hidden=hidden, logits=kernel, labels=labels)
        call = loss.call(state="hidden")
        by_hidden_call = grad_of(f"jnp.sum({call})", "hidden")
        with calling(loss, case, by_hidden_call):
            losses, by_hidden = map(np.array, _by_hidden(loss, hidden, kernel, labels))
        yield measure(loss, case, call, losses, exact.loss, ORDINARY)
        want = exact.by_logits @ wide(kernel).T
        by_hidden[1] = want[1] = np.nan  # the bad row's own gradient may be anything
        yield measure(loss, case, by_hidden_call, by_hidden, want, ORDINARY, 1.0)


def _by_hidden(loss: Loss, *arrays: np.ndarray) -> tuple[Array, Array]:
    hidden, kernel, labels = map(jnp.asarray, arrays)
    losses, pull = jax.vjp(lambda hidden: loss.each(hidden, kernel, labels), hidden)
    return losses, pull(jnp.ones_like(losses))[0]


def _bad_labels(loss: Loss) -> Iterator[Measure]:
    for label in (-1, 3, -100, 102):
        case = rows([1.0, 0.0, -1.0], labels=[label])
        losses, by_logits = map(np.asarray, derivative(loss, case))
        why = f"expected nan: there is no class {label}"
        call = f"{loss.call()}[0]"
        yield flag(loss, case, call, bool(np.isnan(losses).all()), f"gives {losses[0]!s}, {why}")
        call = f"{gradient_call(loss, case)}[0].tolist()"
        says = f"gives {by_logits[0].tolist()}, {why}"
        yield flag(loss, case, call, bool(np.isnan(by_logits).any()), says)


def _label_dtypes(loss: Loss) -> Iterator[Measure]:
    case = normal(3, 1000)
    for dtype in (np.uint8, np.int8, np.uint32):
        few = Case(case.logits, np.array([0, 5, 127]).astype(dtype), recipe=(
            f"{case.recipe}\nlabels = np.array([0, 5, 127], np.{np.dtype(dtype).name})"
        ))  # fmt: skip
        yield from answers(loss, few)


def _excused(loss: Loss, options: dict[str, Any], labels: list[int]) -> Iterator[Measure]:
    """The middle example of three counts nowhere, whatever its logits hold."""
    for rubbish in (4.0, np.nan, np.inf, -np.inf):
        case = rows([1.0, 0.0, -1.0], [rubbish, 0.0, rubbish], [0.5, 2.0, 0.0], labels=labels)
        case = case.with_options(**options)
        if loss.kind == "linear":
            yield from _excused_state(loss, case, rubbish)
            continue
        losses, by_logits = derivative(loss, case)
        one = rows(*case.logits[::2], labels=case.labels[::2]).exact
        want = np.insert(one.loss, 1, 0)
        yield measure(loss, case, loss.call(**options), losses, want, ORDINARY, 1.0)
        want = np.insert(one.by_logits, 1, 0, axis=0)
        bound = np.array([[ORDINARY], [0.0], [ORDINARY]])
        yield measure(loss, case, gradient_call(loss, case), by_logits, want, bound, 1.0)


def _excused_state(loss: Loss, case: Case, rubbish: float) -> Iterator[Measure]:
    """In a head the hidden state holds rubbish, which must not reach the kernel's gradient."""
    hidden, kernel = np.eye(3, dtype=np.float32), case.logits.copy()
    hidden[1], kernel[1] = rubbish, 1
    one = rows(*kernel[::2], labels=case.labels[::2]).exact
    case = _written(case, hidden=hidden, logits=kernel, labels=case.labels)
    labels = jnp.asarray(case.labels)

    def total(hidden: Array, kernel: Array) -> Array:
        return jnp.sum(loss.each(hidden, kernel, labels, **case.options))

    call = f"jnp.sum({loss.call(state='hidden', **case.options)})"
    with calling(loss, case, grad_of(call, "hidden, logits", "(0, 1)")):
        got = jax.grad(total, (0, 1))(jnp.asarray(hidden), jnp.asarray(kernel))
    by_hidden = np.insert(one.by_logits @ wide(kernel).T, 1, 0, axis=0)
    by_kernel = np.insert(one.by_logits, 1, 0, axis=0)
    for name, gradient, want in zip(("hidden", "logits"), got, (by_hidden, by_kernel), strict=True):
        yield measure(loss, case, grad_of(call, name), gradient, want, ORDINARY, 1.0)


def _written(case: Case, **arrays: np.ndarray) -> Case:
    """With a recipe that makes those arrays."""
    recipe = "\n".join(f"{name} = {literal(x)}" for name, x in arrays.items())
    logits, labels = arrays["logits"], arrays["labels"]
    return dataclasses.replace(case, logits=logits, labels=labels, recipe=recipe)


def _ignored(loss: Loss) -> Iterator[Measure]:
    yield from _excused(loss, {"ignore_index": -100}, [0, -100, 2])


def _weightless(loss: Loss) -> Iterator[Measure]:
    yield from _excused(loss, {"weights": np.array([1, 0, 1], np.float32)}, [0, 1, 2])


def _masked_rows(loss: Loss) -> Iterator[Measure]:
    yield from _excused(loss, {"where": np.array([[True], [False], [True]])}, [0, 1, 2])


def _masked_classes(loss: Loss) -> Iterator[Measure]:
    case = normal(3, 5)
    logits = case.logits.copy()
    logits[:, 2] = np.nan
    where = np.repeat(np.array([[True, True, False, True, True]]), 3, 0)
    case = Case(logits, np.array([0, 1, 4], np.int32), {"where": where})
    case = case.and_then(f"where = {literal(where)}")
    without = Case(np.delete(logits, 2, 1), np.array([0, 1, 3], np.int32)).exact
    losses, by_logits = derivative(loss, case)
    yield measure(loss, case, loss.call(**case.options), losses, without.loss, ORDINARY)
    yield measure(loss, case, gradient_call(loss, case), by_logits,
                  np.insert(without.by_logits, 2, 0, 1), ORDINARY, 1.0)  # fmt: skip


# -- options ------------------------------------------------------------------------------------------

WEIGHTS = np.array([0.25, 1.0, 0.0, 2.0, 1.5, 3.0, 0.5], np.float32)


def _with(loss: Loss, **options: Any) -> Iterator[Measure]:
    g = np.array([1.0, -0.5, 2.0])
    yield from answers(loss, normal(3, 7).with_options(**options), g=g)


def _smoothing(loss: Loss) -> Iterator[Measure]:
    yield from _with(loss, label_smoothing=0.1)
    if "class_weights" in loss.options and loss.reduces != "mean":
        yield from _with(loss, label_smoothing=0.1, class_weights=WEIGHTS)


def _class_weights(loss: Loss) -> Iterator[Measure]:
    if loss.reduces == "mean":
        raise NotApplicable("it returns a mean, which may or may not divide by the class weights")
    yield from _with(loss, class_weights=WEIGHTS)


def _z_loss(loss: Loss) -> Iterator[Measure]:
    yield from _with(loss, z_loss=0.1)


def _softcap(loss: Loss) -> Iterator[Measure]:
    """Also of many classes and an odd number: capped padding is a class that counts."""
    yield from _with(loss, softcap=3.0)
    yield from answers(loss, normal(2, 2049).with_options(softcap=3.0))


def _temperature(loss: Loss) -> Iterator[Measure]:
    """One of all examples or one of each, after a soft-cap."""
    g = np.array([1.0, -0.5, 2.0], np.float32)
    others = _taken(loss, softcap=3.0)
    for temperature in (np.array(0.75, np.float32), np.array([0.25, 1.0, 3.0], np.float32)):
        if loss.reduces and temperature.ndim:
            continue
        yield from _with(loss, temperature=temperature, **others)
        case = normal(3, 7).with_options(temperature=temperature, **others)
        want = wide(g) * case.exact.by_temperature
        case = case.and_then(f"temperature = {literal(temperature)}")
        arrays = loss.arrays(case)

        def total(temperature: Array, arrays: Any = arrays) -> Array:
            return jnp.sum(g * loss.each(*arrays, temperature=temperature, **others))

        losses = f"{loss.call(**others).removesuffix(')')}, temperature=temperature)"
        call = grad_of(f"jnp.sum({literal(g)} * {losses})", "temperature")
        with calling(loss, case, call):
            got = jax.grad(total)(jnp.asarray(temperature))
        scale = np.abs(want).max()
        yield measure(
            loss, case, call, got, want if temperature.ndim else want.sum(), ORDINARY, scale
        )


def _mean(loss: Loss) -> Iterator[Measure]:
    """Of so many examples that a sum in 16 bits would stop at 256, or 2048."""
    n = 4096
    for dtype in ("float32", "bfloat16"):
        case = normal(n, 4, dtype=dtype)
        losses = case.exact.loss
        weights = np.resize(np.array([1.0, 0.5, 0.0, 3.0, 0.125], np.float32), n)
        case = case.and_then(f"weights = np.resize({literal(weights[:5])}, {n})")
        masks: dict[str, tuple[Any, np.ndarray]] = {"weights": (weights, wide(weights))}
        if loss.kind != "dense":
            masks["ignore_index"] = 2, wide(case.labels != 2)
        masks = {k: x for k, x in masks.items() if k in loss.options}
        for chosen in ({}, masks) if masks else ({},):
            options = {k: x for k, (x, _) in chosen.items()}
            weight = math.prod((x for _, x in chosen.values()), start=np.ones(n))
            want = (losses * weight).sum() / weight.sum()
            call = loss.call(whole=True, reduction="mean", **options)
            with calling(loss, case, call):
                got = loss.raw(*loss.arrays(case), reduction="mean", **options)
            yield measure(loss, case, call, got, want, ORDINARY)


def _mean_of_nothing(loss: Loss) -> Iterator[Measure]:
    if "weights" in loss.options:
        options: dict[str, Any] = {"weights": np.zeros(2, np.float32)}
    elif "ignore_index" in loss.options and loss.kind != "dense":
        options = {"ignore_index": 0}
    else:
        raise NotApplicable("it takes neither weights nor ignore_index")
    options |= {"reduction": "mean"}
    case = rows([1.0, 0.0], [2.0, 3.0]).with_options(**options)
    call, arrays = loss.call(whole=True, **options), loss.arrays(case)
    with calling(loss, case, grad_of(call)):
        got, by_logits = jax.value_and_grad(
            lambda z: loss.raw(*loss.at_logits(arrays, z), **options)
        )(arrays[loss.position])
    yield measure(loss, case, call, got, 0.0, 0.0, 1.0)
    yield measure(loss, case, grad_of(call), by_logits, np.zeros((2, 2)), 0.0, 1.0)


def _every_output(loss: Loss) -> Iterator[Measure]:
    """A head is also tried at sizes for which it works in tiles."""
    _check_returns_each(loss)
    for n, v in ((5, 37), (1101, 2049))[: 2 if loss.kind == "linear" else 1]:
        made = (
            f"g = np.resize(np.array([1.0, -0.5, 0.25, 2.0, -1.5], np.float32), {n})",
            f"h = np.resize(np.array([0.5, 3.0, -1.0, 0.0, 0.25, -2.0], np.float32), {n})",
        )
        names = run("\n".join(made))
        g, h = names["g"], names["h"]
        case = normal(n, v).and_then(*made)
        arrays = loss.arrays(case)

        def total(z: Array, arrays: Any = arrays, g: Any = g, h: Any = h) -> Array:
            losses, aux = loss.fn(*loss.at_logits(arrays, z), return_aux=True)
            return jnp.sum(g * losses) + jnp.sum(h * aux[0])

        exact = case.exact
        want = wide(g)[:, None] * exact.by_logits + wide(h)[:, None] * exact.softmax
        outputs = loss.call(whole=True, return_aux=True)
        call = grad_of(f"(lambda x, aux: g @ x + h @ aux[0])(*{outputs})")
        with calling(loss, case, call):
            got = jax.grad(total)(arrays[loss.position])
        yield measure(loss, case, call, got, want, ORDINARY, largest_in_row(want))


def _entropy(loss: Loss) -> Iterator[Measure]:
    confident = rows(*([gap, 0.0, -1.0] for gap in (5.0, 10.0, 17.0, 30.0)))
    uniform = rows([1.0, 1.001, 0.999], [0.0, 1e-6, 0.0], [2.0] * 3)
    absent = rows([1.0, -np.inf, 0.5])
    for case in (normal(5, 37), normal(2, 2049), confident, uniform, absent):
        arrays = loss.arrays(case)
        g = np.resize(np.array([1.0, -0.5, 0.25], np.float32), len(case.logits))

        def entropy(z: Array, arrays: Any = arrays) -> Array:
            return loss.fn(*loss.at_logits(arrays, z), return_aux=True)[1].entropy

        call = f"{loss.call(whole=True, return_aux=True)}[1].entropy"
        gradient = grad_of(f"jnp.sum({literal(g)} * {call})")
        with calling(loss, case, gradient):
            aux = loss.fn(*arrays, return_aux=True)[1]
            if getattr(aux, "entropy", None) is None:
                break
            got, pull = jax.vjp(entropy, arrays[loss.position])
            (by_logits,) = pull(jnp.asarray(g, got.dtype))
        yield measure(loss, case, call, got, case.exact.entropy, ORDINARY)
        want = wide(g)[:, None] * case.exact.entropy_by_logits
        yield measure(loss, case, gradient, by_logits, want, ORDINARY, largest_in_row(want))
    else:
        return
    raise NotApplicable("it returns no entropy beside the losses")


def _divergence(loss: Loss) -> Iterator[Measure]:
    """The student is far from its teacher, near it, and the same."""
    _check_returns_each(loss)
    ones = jnp.ones((1, 1), jnp.float32)
    labels: Any = Teacher(ones, ones, divergence=True)
    try:
        loss.raw(ones, ones, labels)
    except Exception as error:
        raise NotApplicable("it takes no jax_sce.Teacher for labels") from error
    apart = (
        "2.5 * draw.standard_normal(logits.shape)", "draw.standard_normal(logits.shape) / 1024", "0",
    )  # fmt: skip
    tempered = _taken(loss, temperature=2.0)
    for n, v in ((5, 37), (3, 2049)):
        for distance in apart:
            case = normal(n, v).and_then(f"teacher = (logits + {distance}).astype(np.float32)",
                                         "import jax_sce")  # fmt: skip
            teacher = run(case.recipe)["teacher"]
            for options in ({}, *filter(None, (tempered,))):
                yield from _diverges(loss, case.with_options(**options), teacher)


def _diverges(loss: Loss, case: Case, teacher: np.ndarray) -> Iterator[Measure]:
    of_teacher = exactly(teacher, np.zeros(teacher.shape), **case.options)
    of_student = exactly(case.logits, np.zeros(teacher.shape), **case.options)
    degrees = case.options.get("temperature", 1.0)
    softmax, others = (x.softmax * degrees for x in (of_student, of_teacher))
    want = (others * (of_student.by_targets - of_teacher.by_targets)).sum(-1)
    eye, kernel = jnp.eye(len(teacher), dtype=jnp.float32), jnp.asarray(case.logits)
    labels: Any = Teacher(eye, jnp.asarray(teacher), divergence=True, **case.options)
    keywords = "".join(f", {k}={x!r}" for k, x in case.options.items())
    made = (
        f"jax_sce.Teacher(jnp.eye({len(teacher)}), jnp.asarray(teacher){keywords}, divergence=True)"
    )
    call = loss.call(**case.options).replace(", labels", f", {made}", 1)
    g = np.resize(np.array([1.0, -0.5, 0.25], np.float32), len(teacher))

    def losses(kernel: Array) -> Array:
        return loss.raw(eye, kernel, labels, **case.options)

    gradient = grad_of(f"jnp.sum({literal(g)} * {call})")
    with calling(loss, case, gradient):
        got, pull = jax.vjp(losses, kernel)
        (by_logits,) = pull(jnp.asarray(g))
    yield measure(loss, case, call, got, want, ORDINARY)
    want = wide(g)[:, None] * (softmax - others) / degrees
    yield measure(loss, case, gradient, by_logits, want, ORDINARY, largest_in_row(want))


# -- dtypes -------------------------------------------------------------------------------------------


def _half(dtype: str) -> Check:
    def check(loss: Loss) -> Iterator[Measure]:
        """Against the exact loss of the very 16-bit logits."""
        for case in (normal(7, 37, dtype=dtype), normal(3, 2049, seed=3, dtype=dtype)):
            losses, by_logits = derivative(loss, case)
            exact, call = case.exact, gradient_call(loss, case)
            says = f"gives {by_logits.dtype}, expected {dtype}"
            yield flag(loss, case, f"{call}.dtype", by_logits.dtype == case.logits.dtype, says)
            yield measure(loss, case, loss.call(), losses, exact.loss, ORDINARY, 1.0)
            yield measure(loss, case, call, by_logits, exact.by_logits, HALF[dtype],
                          largest_in_row(exact.by_logits))  # fmt: skip

    return check


def _accumulation(loss: Loss) -> Iterator[Measure]:
    """One large contribution among thousands that vanish if they are added to it in bfloat16: in the
    kernel's gradient of examples, and in the hidden states' of classes."""
    n, d, large = 32768, 8, 2.0**20
    big = f"[{n // 2}] = {large}"
    many = "hidden = np.ones(({0}, {1}), jnp.bfloat16)\nlogits = np.zeros(({1}, 2), jnp.bfloat16)"
    wide_kernel = (
        "hidden = np.zeros((2, {1}), jnp.bfloat16)\nlogits = np.ones(({1}, {0}), jnp.bfloat16)"
    )
    total = large + n - 1
    examples, classes = np.array([[-0.5, 0.5]] * d) * total, np.full((2, d), (total - 1) / n)
    if loss.reduces == "mean":
        examples, classes = examples / n, classes / 2
    for by, recipe, want in (
        ("logits", f"{many}\nhidden{big}\nlabels = np.zeros({{0}}, np.int32)", examples),
        ("hidden", f"{wide_kernel}\nlogits[:, {n // 2}] = {large}\nlogits[:, 1] = 0\n"
                   "labels = np.ones(2, np.int32)", classes),
    ):  # fmt: skip
        recipe = recipe.format(n, d)
        made = run(recipe)
        case = Case(made["logits"], made["labels"], recipe=recipe)
        arrays = [jnp.asarray(made[name]) for name in ("hidden", "logits", "labels")]
        at = 1 if by == "logits" else 0

        def summed(x: Array, arrays: Any = tuple(arrays), at: int = at) -> Array:
            return jnp.sum(loss.raw(*arrays[:at], x, *arrays[at + 1 :]))

        call = grad_of(f"jnp.sum({loss.call(state='hidden', whole=True)})", by)
        with calling(loss, case, call):
            got = jax.grad(summed)(arrays[at])
        yield measure(loss, case, call, got, want, HALF["bfloat16"])


def _head_gradient(n: int, d: int, v: int, dtype: str) -> str:
    """Python for that of a head's mean loss, and for the shapes of its arguments: to be compiled, and
    not run."""
    return (
        f"hidden, kernel = (jax.ShapeDtypeStruct(x, jnp.{dtype}) for x in [({n}, {d}), ({d}, {v})])\n"
        f"labels = jax.ShapeDtypeStruct(({n},), jnp.int32)\n"
        "gradient = jax.jit(jax.grad(lambda *arrays: jnp.mean(loss(*arrays)), (0, 1)))"
    )


@dataclasses.dataclass(frozen=True)
class _Inspection:
    """Lines of Python that make a program, which is not run, and the answer that is read from it."""

    loss: Loss
    lines: str
    answer: str

    def names(self) -> dict[str, Any]:
        """What the lines define, and the `answer`."""
        try:
            return run(f"{self.lines}\nanswer = {self.answer}", loss=self.loss.raw)
        except Exception as error:
            raise Raised(error, self._reproduction(what_raised(error))) from error

    def measure(self, got: Any, expected: str, error: float, bound: float = 0.0) -> Measure:
        says = f"gives {got}, expected {expected}"
        return Measure(error, bound, self._reproduction(says), says)

    def _reproduction(self, says: str) -> str:
        return f"{self.loss.source}\n{self.lines}\nprint({self.answer})  # {says}"


def _products(loss: Loss) -> Iterator[Measure]:
    """Of the program for a TPU before XLA sees it, which needs none: a CPU has its reasons to widen."""
    lines = (
        f"{_head_gradient(1024, 128, 4096, 'bfloat16')}\n"
        "program = gradient.trace(hidden, kernel, labels)"
        ".lower(lowering_platforms=('tpu',)).as_text()\n"
        "import re\n"
        f"products = re.findall({_MATRICES!r}, program)"
    )
    answer = "[types for types in products if not {*types} <= {'bf16', 'f16'}]"
    inspection = _Inspection(loss, lines, answer)
    try:
        names = inspection.names()
    except Raised as error:
        raise NotApplicable("it cannot be lowered for a TPU from here") from error
    if not names["products"]:
        raise NotApplicable("its matrix products are in kernels of its own, which hide them")
    widened = names["answer"]
    expected = "[]: all matrix products take 16-bit numbers"
    yield inspection.measure(widened, expected, float(len(widened)))


_MATRICES = r"dot_general.*: \(tensor<(?:\d+x){2,}(\w+)>, tensor<(?:\d+x){2,}(\w+)>\)"


def _double(loss: Loss) -> Iterator[Measure]:
    with jax.enable_x64(True):
        case = normal(5, 37, dtype="float64")
        case = case.and_then("jax.config.update('jax_enable_x64', True)")
        yield from answers(loss, case, 1e-12, gradient_bound=1e-12)


# -- transformations ----------------------------------------------------------------------------------


def _function(loss: Loss, case: Case, **options: Any) -> tuple[Callable[..., Array], Array]:
    """The losses as a function of the logits, and the logits."""
    arrays = loss.arrays(case)
    return lambda z: loss.each(*loss.at_logits(arrays, z), **options), arrays[loss.position]


def _jit(loss: Loss) -> Iterator[Measure]:
    """Of all that it is called with."""
    case = normal(5, 37)
    arrays = loss.arrays(case)

    def total(*arrays: Array) -> Array:
        return jnp.sum(loss.each(*arrays))

    call = f"jax.jit(lambda logits, labels: {loss.call()})(logits, labels)"
    with calling(loss, case, call):
        losses = jax.jit(lambda *arrays: loss.each(*arrays))(*arrays)
    yield measure(loss, case, call, losses, case.exact.loss, ORDINARY)
    want = case.exact.by_logits
    call = f"jax.jit(jax.grad(lambda logits, labels: jnp.sum({loss.call()})))(logits, labels)"
    with calling(loss, case, call):
        got = jax.jit(jax.grad(total, loss.position))(*arrays)
    yield measure(loss, case, call, got, want, ORDINARY, np.abs(want).max())


def _vmap(loss: Loss) -> Iterator[Measure]:
    """Over examples, in both orders with `jax.grad`."""
    case = normal(5, 37)
    exact = case.exact
    logits, labels = jnp.asarray(case.logits), jnp.asarray(case.labels)

    def one(z: Array, y: Array) -> Array:
        if loss.kind == "dense":
            y = jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)
        state = (jnp.ones((1, 1), z.dtype),) if loss.kind == "linear" else ()
        return jnp.sum(loss.raw(*state, z[None], y[None]))

    scale = np.abs(exact.by_logits).max()
    state = "jnp.ones((1, 1), z.dtype), " if loss.kind == "linear" else ""
    each = f"lambda z, y: jnp.sum(loss({state}z[None], y[None]))"
    call = f"jax.vmap({each})(logits, labels)"
    with calling(loss, case, call):
        got = jax.vmap(one)(logits, labels)
    yield measure(loss, case, call, got, exact.loss, ORDINARY)
    call = f"jax.vmap(jax.grad({each}))(logits, labels)"
    with calling(loss, case, call):
        got = jax.vmap(jax.grad(one))(logits, labels)
    yield measure(loss, case, call, got, exact.by_logits, ORDINARY, scale)
    for axes, z, y, repeated in (
        ((0, None), logits, labels[0], {"labels": case.labels[:1].repeat(5)}),
        ((None, 0), logits[0], labels, {"logits": case.logits[:1].repeat(5, axis=0)}),
    ):
        of_one = ["logits[0]", "labels"] if axes[0] is None else ["logits", "labels[0]"]
        call = f"jax.vmap({each}, {axes})({', '.join(of_one)})"
        with calling(loss, case, call):
            got = jax.vmap(one, axes)(z, y)
        want = dataclasses.replace(case, **repeated).exact.loss
        yield measure(loss, case, call, got, want, ORDINARY)
    call = f"jax.grad(lambda z: jnp.sum(jax.vmap({each})(z, labels)))(logits)"
    with calling(loss, case, call):
        got = jax.grad(lambda z: jnp.sum(jax.vmap(one)(z, labels)))(logits)
    yield measure(loss, case, call, got, exact.by_logits, ORDINARY, scale)


def _hessian_of(case: Case) -> np.ndarray:
    o = case.exact.softmax[0]
    return np.diag(o) - np.outer(o, o)


def _hessian(loss: Loss) -> Iterator[Measure]:
    for case in (normal(1, 5), rows([4.0, 1.0, 4.0])):
        fn, z = _function(loss, case)
        call = f"jax.jacrev(jax.grad(lambda logits: jnp.sum({loss.call()})))(logits)[0, :, 0]"
        with calling(loss, case, call):
            got = jax.jacrev(jax.grad(lambda z, fn=fn: jnp.sum(fn(z))))(z)[0, :, 0]
        yield measure(loss, case, call, got, _hessian_of(case), ORDINARY, 1.0)


def _forward_mode(loss: Loss) -> Iterator[Measure]:
    options: dict[str, Any] = {"forward_mode": True} if "forward_mode" in loss.options else {}
    tangent = np.resize(np.array([1.0, -0.5, 0.25, 2.0], np.float32), (3, 5))
    case = normal(3, 5).and_then(f"tangent = np.resize({literal(tangent[0, :4])}, (3, 5))")
    fn, z = _function(loss, case, **options)
    exact = case.exact
    call = f"jax.jvp(lambda logits: {loss.call(**options)}, (logits,), (tangent,))[1]"
    with calling(loss, case, call):
        _, got = jax.jvp(fn, (z,), (jnp.asarray(tangent),))
    yield measure(loss, case, call, got, (exact.by_logits * tangent).sum(-1), ORDINARY, 1.0)
    case = normal(1, 5)
    fn, z = _function(loss, case, **options)
    call = f"jax.hessian(lambda logits: jnp.sum({loss.call(**options)}))(logits)[0, :, 0]"
    with calling(loss, case, call):
        got = jax.hessian(lambda z: jnp.sum(fn(z)))(z)[0, :, 0]
    yield measure(loss, case, call, got, _hessian_of(case), ORDINARY, 1.0)


def _checkpoint_and_scan(loss: Loss) -> Iterator[Measure]:
    case = normal(4, 37)
    fn, z = _function(loss, case)
    want = 3 * case.exact.by_logits

    def total(z: Array) -> Array:
        step = jax.checkpoint(lambda total, _: (total + jnp.sum(fn(z)), None))
        return jax.lax.scan(step, jnp.zeros((), jnp.float32), None, length=3)[0]

    step = f"jax.checkpoint(lambda total, _: (total + jnp.sum({loss.call()}), None))"
    call = grad_of(f"jax.lax.scan({step}, 0.0, None, length=3)[0]")
    with calling(loss, case, call):
        got = jax.jit(jax.grad(total))(z)
    yield measure(loss, case, call, got, want, ORDINARY, np.abs(want).max())


def _shard_map(loss: Loss) -> Iterator[Measure]:
    """The examples over two devices."""
    if len(jax.devices()) < 2:
        raise NotApplicable(
            "there is one device; jax.config.update('jax_num_cpu_devices', 2) makes two"
        )
    _check_returns_each(loss)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2],
                         axis_types=(jax.sharding.AxisType.Auto,))  # fmt: skip
    split = PartitionSpec("data")
    specs = (split, PartitionSpec(), split) if loss.kind == "linear" else (split, split)
    shown = "split, PartitionSpec(), split" if loss.kind == "linear" else "split, split"
    g = np.resize(np.array([1.0, -0.5, 0.25, 2.0], np.float32), 6)
    case = normal(6, 37).and_then(
        f"g = np.resize({literal(g[:4])}, 6)",
        "from jax.sharding import AxisType, PartitionSpec",
        "mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))",
        "split = PartitionSpec('data')",
        f"loss = jax.shard_map(loss, mesh=mesh, in_specs=({shown}), out_specs=split)",
    )
    two_devices = 'import os; os.environ["JAX_NUM_CPU_DEVICES"] = "2"'
    loss = dataclasses.replace(loss, source=f"{two_devices}\n{loss.source}")
    arrays = loss.arrays(case)
    fn = jax.shard_map(loss.raw, mesh=mesh, in_specs=specs, out_specs=split)

    def total(z: Array) -> Array:
        return jnp.sum(g * fn(*loss.at_logits(arrays, z)))

    exact = case.exact
    want = wide(g)[:, None] * exact.by_logits
    call = f"jnp.sum(g * {loss.call()})"
    with calling(loss, case, grad_of(call)):
        got, by_logits = jax.jit(jax.value_and_grad(total))(arrays[loss.position])
    yield measure(loss, case, call, got, (wide(g) * exact.loss).sum(), ORDINARY, 1.0)
    yield measure(loss, case, grad_of(call), by_logits, want, ORDINARY, np.abs(want).max())


# -- memory and errors --------------------------------------------------------------------------------


def _residuals(loss: Loss) -> Iterator[Measure]:
    """The arrays of the logits' size that reverse mode keeps beside its arguments; nothing is run."""
    n, d, v = 2048, 8, 8192
    logits = f"logits = jax.ShapeDtypeStruct(({n}, {v}), jnp.float32)"
    arrays, floats, rest = {
        "integer": (f"{logits}\nlabels = jnp.zeros({n}, jnp.int32)", "logits", ", labels"),
        "dense": (f"{logits}\nlabels = logits", "logits, labels", ""),
        "linear": (
            f"hidden = jax.ShapeDtypeStruct(({n}, {d}), jnp.float32)\n"
            f"kernel = jax.ShapeDtypeStruct(({d}, {v}), jnp.float32)\n"
            f"labels = jnp.zeros({n}, jnp.int32)",
            "hidden, kernel",
            ", labels",
        ),
    }[loss.kind]
    lines = (
        f"{arrays}\n"
        f"pull = lambda {floats}: "
        f"jax.vjp(lambda {floats}: loss({floats}{rest}), {floats})[1]\n"
        f"jaxpr = jax.make_jaxpr(lambda *x: jax.tree.leaves(pull(*x)))({floats}).jaxpr\n"
        "kept = [x.aval for x in jaxpr.outvars if x not in jaxpr.invars]"
    )
    inspection = _Inspection(loss, lines, f"[x for x in kept if x.size >= {n} * {v}]")
    kept = inspection.names()["answer"]
    expected = "[]: reverse mode keeps no array of the logits' size beside its arguments"
    yield inspection.measure(kept, expected, float(len(kept)))


def _head_memory(loss: Loss) -> Iterator[Measure]:
    """Temporary memory of the compiled gradient, in arrays of logits."""
    n, v = 1024, 65536
    lines = (
        f"{_head_gradient(n, 8, v, 'float32')}\n"
        "memory = gradient.lower(hidden, kernel, labels).compile().memory_analysis()"
    )
    answer = f"memory and memory.temp_size_in_bytes / (4 * {n} * {v})"
    inspection = _Inspection(loss, lines, answer)
    share = inspection.names()["answer"]
    if share is None:
        raise NotApplicable("this platform does not report the memory of a program")
    expected = "0.5 at most: temporary memory, in arrays of float32 logits"
    yield inspection.measure(share, expected, share, 0.5)


def _bad_input(loss: Loss) -> Iterator[Measure]:
    *_, logits, labels = loss.arrays(normal(3, 5))
    bad = {
        "labels for four examples, logits of three": (
            logits,
            jnp.zeros((4, *labels.shape[1:]), labels.dtype),
        ),
        "labels of shape (3, 1)": (logits, jnp.zeros((3, 1), labels.dtype)),
        "integer logits": (jnp.ones((3, 5), jnp.int32), labels),
    }
    if loss.kind != "dense":
        bad["float labels"] = logits, labels.astype(jnp.float32)
        bad["bool labels"] = logits, labels > 0
    for what, (logits, labels) in bad.items():
        state = (jnp.eye(3, dtype=logits.dtype),) if loss.kind == "linear" else ()
        arrays = (*state, logits, labels)
        try:
            loss.raw(*arrays)
        except Exception:
            continue  # whatever it is, it is loud
        shown = ", ".join(literal(np.asarray(x)) for x in arrays)
        says = f"{what}: accepted, expected an error"
        yield Measure(np.inf, 0.0, f"{loss.source}\nprint(loss({shown}))  # {says}", says)


# -- the list -----------------------------------------------------------------------------------------

_IDS = ("integer", "linear")

PROMISES = (
    Promise("values", "the loss of ordinary rows is right",
            "the reported loss is not the loss", _values),
    Promise("gradients", "the gradient by the logits is softmax - y",
            "the weights move in another direction than the loss needs", _gradients),
    Promise("cotangents", "each example's gradient is scaled by its own cotangent",
            "weighted and masked losses train as if all examples had the same weight", _cotangents),
    Promise("targets", "targets need not sum to one",
            "mixed, masked or weighted targets get a wrong gradient", _targets, ("dense",)),
    Promise("gradients by targets", "the targets are differentiated",
            "distillation into learned targets trains on a wrong gradient", _target_gradients,
            ("dense",)),
    Promise("hidden states and kernel", "both gradients of a real head are right, at uneven sizes",
            "the head, or all layers below it, train on a wrong gradient", _head_gradients, ("linear",)),
    Promise("confident rows", "small losses and their gradients keep their digits",
            "examples that are nearly learned report a loss of 0 or a noisy one, and stop learning",
            _confident),
    Promise("large offsets", "a constant added to all logits changes nothing",
            "when logits drift, the loss loses digits", _offsets),
    Promise("ties", "rows with several largest logits are right",
            "an untrained head starts off wrong", _ties),
    Promise("independent rows", "a row gives the same bits whatever its neighbours hold",
            "the loss of an example depends on its batch", _independent),
    Promise("many classes", "large vocabularies of odd size count each class once",
            "padded or repeated classes enter the normalizer and every loss is off", _many_classes),
    Promise("uneven batches", "any number of examples and classes works",
            "the last, smaller batch is wrong", _uneven),
    Promise("one class", "with one class, loss and gradient are 0",
            "a head with one class changes the weights", _one_class),
    Promise("no examples", "an empty batch gives empty losses", "an empty shard stops the run",
            _no_examples),
    Promise("absent classes", "a logit of -inf removes its class",
            "masking classes by -inf makes the loss NaN", _absent),
    Promise("absent labels", "a label with a logit of -inf has the loss +inf and a finite gradient",
            "one such example makes all weights NaN", _absent_label),
    Promise("bad rows", "NaN or infinite logits give NaN in their own row only",
            "a bad example goes unseen, or spoils its neighbours", _bad_rows),
    Promise("bad labels", "a label outside the classes gives NaN",
            "a wrong label trains another class, and nobody sees it", _bad_labels, _IDS),
    Promise("label dtypes", "class ids may have any integer dtype",
            "labels stored in 8 bits wrap to other classes", _label_dtypes, _IDS),
    Promise("ignored labels", "ignore_index leaves out an example, whatever its logits hold",
            "padding enters the loss, or its NaN the weights", _ignored, _IDS, ("ignore_index",)),
    Promise("weights of zero", "a weight of 0 leaves out an example, whatever its logits hold",
            "masked examples turn the weights into NaN", _weightless, needs=("weights",)),
    Promise("masked rows", "`where` leaves out an example, whatever its logits hold",
            "masked examples turn the weights into NaN", _masked_rows, ("integer", "dense"),
            ("where",)),
    Promise("masked classes", "`where` leaves out a class, whatever its logits hold",
            "invalid actions or padded classes enter the loss", _masked_classes,
            ("integer", "dense"), ("where",)),
    Promise("label smoothing", "label_smoothing is right, with class weights too",
            "the smoothed loss or its gradient is wrong", _smoothing,
            needs=("label_smoothing",)),
    Promise("class weights", "class_weights weigh the loss and its gradient",
            "rare classes count more or less than asked", _class_weights, needs=("class_weights",)),
    Promise("z-loss", "z_loss adds z_loss * log-normalizer**2 and its gradient",
            "the normalizer drifts although a penalty is reported", _z_loss, needs=("z_loss",)),
    Promise("soft-cap", "softcap is differentiated with the loss",
            "large logits get too large a gradient", _softcap, needs=("softcap",)),
    Promise("temperature", "temperature divides the logits, and is differentiated",
            "distillation and calibration learn a wrong temperature", _temperature,
            needs=("temperature",)),
    Promise("mean", "a mean divides by the exact total weight of the examples that count",
            "the step size depends on the padding, or on rounding", _mean,
            needs=("reduction",)),
    Promise("mean of nothing", "a mean over no example is 0, and so is its gradient",
            "a batch of padding makes all weights NaN", _mean_of_nothing, needs=("reduction",)),
    Promise("every output", "the returned log-normalizer is differentiated",
            "a z-loss made of it is reported but never trained on", _every_output,
            needs=("return_aux",)),
    Promise("entropy", "the returned entropy is exact, and differentiated",
            "an entropy bonus or penalty pushes in a wrong direction", _entropy,
            needs=("return_aux",)),
    Promise("divergence",
            "a student's divergence and gradient are right, also where it equals its teacher",
            "distillation stalls or drifts once the student is close to its teacher", _divergence,
            ("linear",)),
    Promise("bfloat16", "16-bit logits cost only one rounding, of their gradient",
            "losses are quantised to steps of a per cent", _half("bfloat16")),
    Promise("float16", "16-bit logits cost only one rounding, of their gradient",
            "losses are quantised to steps of a thousandth", _half("float16")),
    Promise("accumulation", "16-bit gradients of a head are summed in more than 16 bits",
            "small gradients of many examples or classes are lost to rounding", _accumulation,
            ("linear",)),
    Promise("products", "a 16-bit head multiplies 16-bit numbers, in the backward pass too",
            "the numbers are right, and each backward product takes twice as long or more", _products,
            ("linear",)),
    Promise("float64", "float64 stays float64", "numerical gradient checks fail", _double),
    Promise("jit", "the result is the same under jax.jit",
            "the compiled step computes something else", _jit),
    Promise("vmap", "the result is the same under jax.vmap, in both orders with jax.grad",
            "per-example gradients are wrong or raise", _vmap),
    Promise("second derivatives", "the gradient is differentiated exactly, by reverse mode",
            "meta-learning and curvature see a wrong Hessian", _hessian),
    Promise("forward mode", "jax.jvp and jax.hessian work",
            "Hessian-vector products by forward mode raise", _forward_mode),
    Promise("checkpoint and scan", "the result is the same in jax.lax.scan over jax.checkpoint",
            "rematerialised training is wrong or raises", _checkpoint_and_scan),
    Promise("shard_map", "the result is the same inside jax.shard_map over examples",
            "data-parallel training is wrong or raises", _shard_map),
    Promise("residuals", "reverse mode keeps no array of the logits' size besides its arguments",
            "unless the compiler removes it, another array of that size is kept until the backward pass",
            _residuals),
    Promise("memory", "the gradient of a head never holds its logits",
            "the vocabulary limits the batch size", _head_memory, ("linear",)),
    Promise("bad input", "wrong shapes and dtypes raise, instead of being broadcast or cast",
            "a mistake in the input pipeline goes unnoticed", _bad_input),
)  # fmt: skip
