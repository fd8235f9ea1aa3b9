"""The head, of any shape, dtypes, values and options, against `contract.py`.

Its logits are products that are rounded on the way, so that the contract is that of the exact products,
each with the error that a float's sum of them may have. An example of Hypothesis is a compiled program,
which gives the loss, the aux, the derivatives by some of the floats, and in forward mode the tangents;
it is run with several batches. `--hypothesis-profile=thorough` draws many more of them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from contract import (
    DTYPES,
    EVENLY,
    IGNORED,
    INF,
    NAN,
    OPTIONS,
    Batch,
    assert_near,
    draw_cotangent,
    draw_labels,
    draw_options,
    draw_tangent,
    exactly,
    nothing,
    precision_of,
    some_of,
    what_is_not_finite,
)
from hypothesis import given, settings
from support import wide

from jax_sce import linear_softmax_cross_entropy

ROWS = 96  # of a program, in batches of up to 24
FLOATS = ("hidden", "kernel", "bias", "labels", *OPTIONS)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is compiled, and the seed of what is run."""

    kind: str
    dtypes: tuple[str, str]  # of the hidden states, and of the kernel and its bias
    batch: tuple[int, ...]
    features: int
    num_classes: int
    reduction: str
    options: frozenset[str]
    moving: frozenset[
        str
    ]  # what is differentiated, if it is there; without any of it, hidden and kernel
    chunk_size: int | None
    return_aux: bool
    forward_mode: bool
    seed: int

    @property
    def size(self):
        return math.prod(self.batch), self.num_classes

    @property
    def dtype(self):
        """Of the products."""
        return max(map(jnp.dtype, self.dtypes), key=lambda dtype: dtype.itemsize)

    @property
    def precision(self):
        return precision_of(self.dtype)

    @property
    def ignore_index(self):
        used = "ignore_index" in self.options and self.kind == "integer"
        return IGNORED if used else None


def problem_of(random):
    pairs = [(dtype, dtype) for dtype in DTYPES]
    pairs += [("float32", "float32"), ("bfloat16", "float32"), ("float32", "float16")]
    return Problem(
        kind=random.choice(["integer", "integer", "dense"]),
        dtypes=random.choice(pairs),
        batch=random.choice([(24,), (4, 6), (23,), (1,)]),
        # Of one feature XLA multiplies anew wherever a logit is read, with another rounding each time.
        features=random.choice([2, 3, 8, 33]),
        # From 2048 on, the gradient is made in tiles.
        num_classes=random.choice([1, 2, 3, 7, 41, 300, 2051]),
        reduction=random.choice(["mean", "none", "sum"]),
        options=some_of(random, *OPTIONS, "ignore_index", "bias"),
        moving=random.choice([frozenset(FLOATS), some_of(random, *FLOATS)]),
        chunk_size=random.choice([None, 1, 5, 8, 16, 100]),
        return_aux=random.random() < 0.5,
        forward_mode=random.random() < 0.5,
        seed=random.getrandbits(32),
    )


# -- inputs ------------------------------------------------------------------------------------------


def draw(problem, r):
    """Arguments by name, [N, D] hidden states. Logits of the kinds of `test_properties.draw_logits`: all
    products are exact in a head of whole numbers, and ties are ties."""
    (n, v), d = problem.size, problem.features
    tied, spoils = r.random() < 0.25, r.random() < 0.3
    if tied:
        kernel, bias, hidden = (r.integers(-2, 3, s).astype(float) for s in ((d, v), v, (n, d)))
    else:
        kernel, bias = r.normal(size=(d, v)) / math.sqrt(d), r.normal(size=v)
        hidden = r.normal(size=(n, d)) * 2.5
        offsets = d > 1 and r.random() < 0.5  # by a feature that all classes share
        kernel[0] = 1 if offsets else kernel[0]
        for i in range(n):
            family = r.choice(["ordinary", "wide", "offset", "confident"])
            if family == "wide":
                hidden[i] *= 10.0 ** r.integers(-6, 4)
            elif family == "offset" and offsets:
                hidden[i, 0] += r.choice([-1, 1]) * 10.0 ** r.integers(1, 5)
            elif family == "confident":
                column = kernel[:, r.integers(v)]
                hidden[i] += column / (column @ column) * r.choice([10.0, 20.0, 40.0])
    if spoils:
        hidden[r.random(n) < 0.2, r.integers(d)] = r.choice([NAN, INF, -INF])
        bias[r.random(v) < 0.2] = -INF
    of_hidden, of_kernel = map(jnp.dtype, problem.dtypes)
    with np.errstate(over="ignore"):
        arguments = {"hidden": hidden.astype(of_hidden), "kernel": kernel.astype(of_kernel)}
    if "bias" in problem.options:
        arguments["bias"] = bias.astype(of_kernel)
    bad = [-1, v, IGNORED, 2**31 - 1] if spoils else [IGNORED] * (problem.ignore_index is not None)
    arguments["labels"] = draw_labels(r, problem.kind, n, v, problem.dtype, bad)
    return arguments | draw_options(r, problem.options, n, v, problem.precision.dtype)


# -- the contract of a head --------------------------------------------------------------------------


class Head:
    """Its exact logits, and the batch of losses that they have."""

    def __init__(self, problem, arguments):
        self.problem, self.precision = problem, problem.precision
        self.dtypes = {k: arguments[k].dtype for k in ("hidden", "labels")}
        self.hidden, self.kernel = (
            wide(arguments[k]).astype(np.longdouble) for k in ("hidden", "kernel")
        )
        bias = wide(arguments.get("bias", np.zeros(problem.num_classes)))
        self.logits = self.hidden @ self.kernel + bias
        sizes = np.abs(self.hidden) @ np.abs(self.kernel) + np.abs(bias)
        sizes = np.where(np.isfinite(sizes), sizes, 0)
        # A sum of D products and a bias rounds each of them D + 1 times, in whatever order.
        self.blur = (problem.features + 1) * sizes.max(-1)
        whole = [np.round(x) == x for x in (self.kernel, bias[np.isfinite(bias)])]
        if all(map(np.all, whole)):
            self.blur *= (np.round(self.hidden) != self.hidden).any(-1)
        # A weight of 0 leaves out a hidden state that is not finite, for the derivative by it, too.
        weights = arguments.get("weights", np.ones(len(self.hidden)))
        left_out = (weights == 0) & ~np.isfinite(self.hidden).all(-1)
        self.batch = Batch(
            self.logits,
            arguments,
            problem.ignore_index,
            problem.reduction,
            self.precision,
            self.blur,
            left_out,
        )
        # The hidden state of an example that does not count goes nowhere, whatever it is.
        self.hidden = np.where(self.batch.counts[:, None], self.hidden, 0)

    def pull(self, name, g, g_normalizers):
        if name not in ("hidden", "kernel", "bias"):
            near = self.batch.pull(name, g, g_normalizers)
        else:
            near = self.batch.pull("logits", g, g_normalizers)
            if name == "bias":
                return near.sum(0)
            near = near.rounded(self.problem.dtype, self.precision)  # to multiply it by such
            if name == "kernel" and self.problem.forward_mode:  # rounds the product of each chunk
                products = near[:, None] * self.hidden[..., None]
                return products.rounded(self.problem.dtype, self.precision).sum(0)
            if name == "kernel":
                return (near.T @ self.hidden).T
            near = near @ self.kernel.T
        # Until the backward pass what an example has of its own is kept in its dtype.
        return near.rounded(self.dtypes[name], self.precision) if name in self.dtypes else near

    def push(self, tangents):
        tangents = {k: wide(t) for k, t in tangents.items()}
        dots = exactly(np.zeros(self.logits.shape))
        if "hidden" in tangents:
            dots += exactly(tangents.pop("hidden")) @ self.kernel
        if "kernel" in tangents:
            dots += exactly(self.hidden) @ tangents.pop("kernel")
        if "bias" in tangents:
            dots += exactly(np.broadcast_to(tangents.pop("bias"), dots.value.shape))
        return self.batch.push(tangents | {"logits": dots})

    def assert_predicts(self, got):
        """The largest logit, before a cap, or one that is as near as two roundings of logits are; the
        first of several."""
        counts = self.batch.counts
        assert (got[~counts] == -1).all()
        for z, blur, at in zip(self.logits[counts], self.blur[counts], got[counts], strict=True):
            if np.isnan(z).any() or np.isinf(z.max()):
                continue
            assert z[at] >= z.max() - 2 * blur * self.precision.u
            assert blur or at == z.argmax()


# -- the test ----------------------------------------------------------------------------------------


@settings(max_examples=settings.default.max_examples // 6)  # twice as dear
@given(problem=EVENLY.map(problem_of))
def test_the_contract(problem):
    r, run = np.random.default_rng(problem.seed), program(problem)
    n = problem.size[0]
    for _ in range(ROWS // max(n, 8)):
        arguments = draw(problem, r)
        floats = {k: x for k, x in arguments.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        moving = {k: x for k, x in floats.items() if k in problem.moving}
        moving = moving or {k: arguments[k] for k in ("hidden", "kernel")}
        rest = {k: x for k, x in arguments.items() if k not in moving}
        tangents = {k: draw_tangent(r, x) for k, x in moving.items()}
        g = draw_cotangent(r, n) if problem.reduction == "none" else 0.25
        g_normalizers = draw_cotangent(r, n) if problem.return_aux else None
        # Of two dtypes a strict JAX has no products.
        promotion = jax.numpy_dtype_promotion(
            "strict" if len({*problem.dtypes}) == 1 else "standard"
        )
        with jax.enable_x64(problem.dtype == "float64"), promotion:
            got = jax.tree.map(np.asarray, run(moving, rest, (g, g_normalizers), tangents))
        compare(problem, arguments, (g, g_normalizers), tangents, *got)


@np.errstate(all="ignore")
def compare(problem, arguments, g, tangents, values, prediction, gradients, moved):
    precision, head = problem.precision, Head(problem, arguments)
    batch = head.batch
    wanted = (batch.value(), batch.normalizers())
    for what, got, want in zip(("loss", "log-normalizer"), values, wanted, strict=False):
        assert got.dtype == precision.dtype
        assert_near(what, got, want, precision)
    if prediction is not None:
        head.assert_predicts(prediction)
    for name, got in gradients.items():
        assert got.dtype == arguments[name].dtype
        loud = name in ("hidden", "kernel", "bias")
        excused = np.isnan if name == "labels" else nothing if loud else what_is_not_finite
        assert_near(f"by {name}", got, head.pull(name, *g), precision, excused)
    if moved is not None:
        excused = nothing if set(tangents) <= {"hidden", "kernel", "bias"} else what_is_not_finite
        for got, want in zip(moved, head.push(tangents), strict=False):
            assert_near("tangent", got, want, precision, excused)


def program(problem):
    """Ours: values, prediction, the gradients by what moves, and in forward mode the tangents."""
    loss = functools.partial(
        linear_softmax_cross_entropy,
        ignore_index=problem.ignore_index,
        reduction=problem.reduction,
        chunk_size=problem.chunk_size,
        return_aux=problem.return_aux,
        forward_mode=problem.forward_mode,
    )

    def placed(arguments):
        """Of each example in the batch's shape."""
        each = {"hidden", "labels", "weights", "temperature"}
        return {k: x.reshape(*problem.batch, *x.shape[1:]) if k in each else x
                for k, x in arguments.items()}  # fmt: skip

    @jax.jit
    def run(moving, rest, g, tangents):
        def fn(moving):
            """The loss, and with the aux the log-normalizers, [N]; the prediction has no derivative."""
            out = loss(**placed(moving), **placed(rest))
            value, aux = out if problem.return_aux else (out, None)
            value = value.reshape(-1) if problem.reduction == "none" else value
            if aux is None:
                return (value,), None
            return (value, aux.log_normalizer.reshape(-1)), aux.prediction.reshape(-1)

        values, pull, prediction = jax.vjp(fn, moving, has_aux=True)
        cotangents = [jnp.asarray(x, v.dtype) for x, v in zip(g, values, strict=False)]
        gradients = pull(tuple(cotangents))[0]
        moved = None
        if problem.forward_mode:
            moved = jax.jvp(fn, (moving,), (tangents,), has_aux=True)[1]
        return values, prediction, gradients, moved

    return run
