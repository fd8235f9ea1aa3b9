"""Every JAX transformation gives what it gives of the naive formula."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from support import (
    BOTH,
    TOLERANCE,
    cotangents,
    covering,
    exact_gradient,
    lax_rules,
    one_hot,
    rng,
)

from jax_sce import linear_softmax_cross_entropy, shard

N, V = 8, 6
LOGITS = rng(40).normal(size=(N, V))
LABELS = rng(41).integers(0, V, N, dtype=np.int32)
TARGETS = rng(42).random((N, V))  # sums are not one


def labels_for(kind):
    return jnp.asarray(LABELS) if kind == "integer" else jnp.asarray(TARGETS)


@functools.partial(jax.jit, static_argnums=0)
def naive(kind, logits, labels):
    y = jax.nn.one_hot(labels, V, dtype=logits.dtype) if kind == "integer" else labels
    return jnp.sum(y * (jax.nn.logsumexp(logits, axis=-1, keepdims=True) - logits), axis=-1)


@pytest.fixture(params=BOTH)
def kind(request, x64):
    return request.param


@pytest.fixture(params=[False, True], ids=["reverse", "forward"])
def loss(request, kind):
    return functools.partial(BOTH[kind], forward_mode=request.param)


def assert_close(got, want, rtol=TOLERANCE["float64"]):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=TOLERANCE["float64"])


def gradient(fn, logits, labels):
    losses, pull = jax.vjp(lambda z: fn(z, labels), logits)
    return pull(jnp.asarray(cotangents(losses.shape), losses.dtype))[0]


def test_value_and_gradient_are_those_of_jax_grad_of_the_naive_formula(kind, loss):
    labels = labels_for(kind)

    def mean_of_rows(z):
        return jnp.mean(jax.vmap(loss)(z, labels))

    want = jax.value_and_grad(lambda z: jnp.mean(naive(kind, z, labels)))(LOGITS)
    for fn in (functools.partial(loss, labels=labels, reduction="mean"), mean_of_rows):
        got = jax.jit(jax.value_and_grad(fn))(LOGITS)
        chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-15)


# -- vectorized and compiled ---------------------------------------------------------------------


def test_vmap_over_rows(kind, loss):
    labels = labels_for(kind)
    want = naive(kind, LOGITS, labels)
    assert_close(jax.vmap(loss)(LOGITS, labels), want)
    assert_close(jax.jit(jax.vmap(loss, in_axes=(1, -1)))(LOGITS.T, labels.T), want)


def test_vmap_of_grad_and_grad_of_vmap(kind, loss):
    labels = labels_for(kind)
    want = gradient(functools.partial(naive, kind), LOGITS, labels)
    by_row = jax.vmap(jax.grad(loss))(LOGITS, labels)
    assert_close(by_row * cotangents(N)[:, None], want)
    assert_close(gradient(jax.vmap(loss), LOGITS, labels), want)


def test_an_axis_of_models_shares_the_labels(kind, loss):
    models = jnp.asarray(rng(43).normal(size=(3, N, V)))
    labels = labels_for(kind)
    mean = functools.partial(loss, reduction="mean")
    values, gradients = jax.vmap(jax.value_and_grad(mean), in_axes=(0, None))(models, labels)
    for model, value, got in zip(models, values, gradients, strict=True):
        want_value, want = jax.value_and_grad(lambda z: naive(kind, z, labels).mean())(model)
        assert_close(value, want_value)
        assert_close(got, want)


def test_vmap_over_options(kind, loss):
    smoothing = jnp.array([0.0, 0.1, 0.5])
    labels = labels_for(kind)
    got = jax.vmap(lambda e: loss(LOGITS, labels, label_smoothing=e))(smoothing)
    for e, losses in zip(smoothing, got, strict=True):
        assert_close(losses, loss(LOGITS, labels, label_smoothing=float(e)))


def test_checkpoint_and_scan(kind, loss):
    labels = labels_for(kind)
    want = jax.grad(lambda z: naive(kind, z, labels).sum())(LOGITS)
    rows = jax.checkpoint(loss)

    def total(logits):
        chunks = logits.reshape(4, 2, V), labels.reshape(4, 2, *labels.shape[1:])
        return jax.lax.scan(lambda sum, x: (sum + rows(*x).sum(), None), 0.0, chunks)[0]

    assert_close(jax.jit(jax.grad(total))(LOGITS), want)


def test_donated_logits(kind, loss):
    labels = labels_for(kind)
    fn = functools.partial(loss, reduction="mean")
    want = jax.grad(fn)(LOGITS, labels)
    donated = jnp.asarray(LOGITS)
    assert_close(jax.jit(jax.grad(fn), donate_argnums=0)(donated, labels), want)


def test_arguments_are_not_changed(kind, loss):
    logits, labels = jnp.asarray(LOGITS), labels_for(kind)
    gradient(loss, logits, labels)
    np.testing.assert_array_equal(logits, LOGITS)
    np.testing.assert_array_equal(labels, labels_for(kind))


# -- second derivatives and forward mode ---------------------------------------------------------


ORDERS = {
    "forward over reverse": (jax.jacfwd, jax.jacrev, False),
    "reverse over reverse": (jax.jacrev, jax.jacrev, False),
    "forward over reverse, forward_mode": (jax.jacfwd, jax.jacrev, True),
    "reverse over forward, forward_mode": (jax.jacrev, jax.jacfwd, True),
    "forward over forward, forward_mode": (jax.jacfwd, jax.jacfwd, True),
}


@functools.cache
def naive_hessian(kind, with_options):
    """At a tie, a confident row, and any row."""
    rows = np.array([[1.0, 1.0, 0.0, -1.0, 0.5, 1.0], [30.0, 0, 1, 2, 0, 1], LOGITS[0]])
    labels = labels_for(kind)[:3]
    where = ~np.eye(3, V, 1, bool) if with_options else np.ones((3, V), bool)

    def f(z):
        y = jax.nn.one_hot(labels, V) if kind == "integer" else labels
        if with_options:
            z = 2.0 * jnp.tanh(z / 2.0)
            y = 0.9 * y + 0.1 / (V - 1)
        normalizer = jax.nn.logsumexp(z, axis=-1, where=where)
        losses = jnp.sum(y * (normalizer[:, None] - z), -1, where=where)
        return jnp.vdot(cotangents(3), losses + (0.1 if with_options else 0.0) * normalizer**2)

    return rows, labels, where, jax.jit(jax.hessian(f))(rows)


@pytest.mark.parametrize(
    ("order", "kind", "with_options"),
    covering(list(ORDERS), list(BOTH), [False, True]),
)
def test_hessians(order, kind, with_options, x64):
    """By all orders of the modes that the rules allow."""
    rows, labels, where, want = naive_hessian(kind, with_options)
    outer, inner, forward_mode = ORDERS[order]
    options = {}
    if with_options:
        options = {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.1, "where": where}

    def f(z):
        return jnp.vdot(cotangents(3), BOTH[kind](z, labels, forward_mode=forward_mode, **options))

    assert_close(jax.jit(outer(inner(f)))(rows), want, rtol=1e-11)


@pytest.mark.parametrize("by", ["logits", "labels", "kernel"])
def test_a_weight_of_zero_has_its_second_derivative(by, kind, loss):
    """As when examples are weighted by what a step on them would gain, from weights of 0."""
    labels = labels_for(kind)
    if by == "labels" and kind == "integer":
        pytest.skip("class ids are not differentiated")
    weights = jnp.asarray(np.arange(N) % 3, jnp.float64)
    kernel, direction = jnp.asarray(rng(50).normal(size=(V, V))), rng(51).normal(size=(N, V))
    at = {"logits": jnp.asarray(LOGITS), "labels": labels, "kernel": kernel}[by]
    direction = jnp.asarray(direction[: len(at)])

    def gain(fn, weights):
        def total(x):
            if by == "kernel":
                return jnp.sum(fn(jnp.asarray(LOGITS) @ x, labels, weights) ** 2)
            return jnp.sum(fn(*((x, labels) if by == "logits" else (LOGITS, x)), weights) ** 2)

        return jnp.vdot(jax.grad(total)(at), direction)

    def ours(logits, labels, weights):
        return loss(logits, labels, weights=weights, z_loss=0.1) + weights

    def want(logits, labels, weights):
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        return weights * (naive(kind, logits, labels) + 0.1 * normalizer**2) + weights

    got, want = (jax.jit(jax.grad(functools.partial(gain, fn)))(weights) for fn in (ours, want))
    assert_close(got, want, rtol=1e-11)


def test_forward_mode(kind):
    labels = labels_for(kind)
    loss = functools.partial(BOTH[kind], labels=labels, forward_mode=True)
    direction = jnp.asarray(rng(44).normal(size=(N, V)))
    reference = functools.partial(naive, kind, labels=labels)
    want = jax.jvp(reference, (LOGITS,), (direction,))
    assert_close(jax.jvp(loss, (LOGITS,), (direction,)), want)
    assert_close(jax.linearize(loss, LOGITS)[1](direction), want[1])
    assert_close(jax.jit(jax.jacfwd(loss))(LOGITS), jax.jit(jax.jacrev(reference))(LOGITS))
    if kind == "dense":
        tangent = jax.jvp(lambda y: BOTH[kind](LOGITS, y, forward_mode=True), (labels,), (labels,))
        assert_close(tangent[1], tangent[0])  # linear in the labels


# -- both outputs of the rules -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "kind", "forward_mode"),
    covering(["loss", "log_normalizer", "entropy", "all"], list(BOTH), [False, True]),
)
def test_the_rules_honour_a_cotangent_of_each_output(which, kind, forward_mode, x64):
    labels = labels_for(kind)
    g = {
        name: jnp.asarray(cotangents(N)[::step] * (which in (name, "all")))
        for name, step in (("loss", 1), ("log_normalizer", -1), ("entropy", 1))
    }

    def ours(logits, labels):
        loss, aux = BOTH[kind](logits, labels, return_aux=True, forward_mode=forward_mode)
        return {"loss": loss, "log_normalizer": aux.log_normalizer, "entropy": aux.entropy}

    @lax_rules()
    def reference(logits, labels):
        log_softmax = jax.nn.log_softmax(logits)
        return {
            "loss": naive(kind, logits, labels),
            "log_normalizer": jax.nn.logsumexp(logits, axis=-1),
            "entropy": -jnp.sum(jnp.exp(log_softmax) * log_softmax, axis=-1),
        }

    for argnum in (0, 1) if kind == "dense" else (0,):
        at = (jnp.asarray(LOGITS), labels)

        def pulled(fn, at=at, argnum=argnum):
            def partial(x):
                return fn(*(x if i == argnum else a for i, a in enumerate(at)))

            return jax.vjp(partial, at[argnum])[1](g)[0]

        assert_close(*jax.jit(lambda: (pulled(ours), pulled(reference)))())
    jax.tree.map(assert_close, *jax.jit(lambda x: (ours(x, labels), reference(x, labels)))(LOGITS))


# -- other platforms and many devices ------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("name", BOTH)
def test_export_lowers_for_every_platform(name, platform):
    logits = jax.ShapeDtypeStruct(
        (4, 256), jnp.bfloat16
    )  # long enough for the form of its own on CPU
    labels = jax.ShapeDtypeStruct((4,) if name == "integer" else (4, 256), jnp.int32)
    for forward_mode in (False, True):
        fn = functools.partial(BOTH[name], forward_mode=forward_mode, reduction="mean", softcap=9.0)
        exported = jax.export.export(jax.jit(jax.value_and_grad(fn)), platforms=[platform])(
            logits, labels
        )
        assert exported.platforms == (platform,)


def test_an_exported_loss_runs():
    logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
    exported = jax.export.export(jax.jit(BOTH["integer"]), platforms=["cpu", "cuda"])(
        logits, labels
    )
    np.testing.assert_allclose(
        exported.call(logits, labels), BOTH["integer"](logits, labels), rtol=TOLERANCE["loss"]
    )


def mesh(axis_type):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


@pytest.mark.parametrize("num_classes", [6, 256])
@pytest.mark.parametrize("name", BOTH)
def test_sharded_rows_stay_where_they_are(name, num_classes):
    """Under plain jit with rows split over devices, only the mean crosses them."""
    split = NamedSharding(mesh(AxisType.Auto), P("data"))
    logits = rng(45).normal(size=(16, num_classes)).astype(np.float32)
    ids = rng(46).integers(0, num_classes, 16, dtype=np.int32)
    labels = ids if name == "integer" else one_hot(ids, num_classes)
    fn = jax.jit(jax.value_and_grad(functools.partial(BOTH[name], reduction="mean")))
    args = jax.device_put((logits, labels), split)
    compiled = fn.lower(*args).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    value, got = compiled(*args)
    assert got.sharding.is_equivalent_to(split, 2)
    np.testing.assert_allclose(got, exact_gradient(logits, ids) / 16, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(value, np.mean(BOTH[name](logits, labels)), rtol=1e-6)


@pytest.mark.parametrize("num_classes", [6, 256])
@pytest.mark.parametrize("name", BOTH)
def test_shard_map_over_the_batch(name, num_classes):
    logits = rng(47).normal(size=(16, num_classes)).astype(np.float32)
    ids = rng(48).integers(0, num_classes, 16, dtype=np.int32)
    labels = ids if name == "integer" else one_hot(ids, num_classes)
    for forward_mode in (False, True):
        split = jax.shard_map(
            functools.partial(BOTH[name], forward_mode=forward_mode),
            mesh=mesh(AxisType.Auto),
            in_specs=P("data"),
            out_specs=P("data"),
        )
        losses, pull = jax.vjp(jax.jit(lambda z, split=split: split(z, labels)), logits)
        np.testing.assert_allclose(losses, BOTH[name](logits, labels), rtol=1e-6)
        got = pull(jnp.asarray(cotangents(16), jnp.float32))[0]
        want = exact_gradient(logits, ids) * cotangents(16)[:, None]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_vmap_over_an_axis_of_the_mesh():
    """Two models' heads by `jax.vmap` around `jax.shard_map`; the axis "models" splits the models over
    devices."""
    mesh = jax.make_mesh((2, 2, 2), ("models", "data", "model"), axis_types=(AxisType.Auto,) * 3)
    hidden = jnp.asarray(rng(52).normal(size=(2, N, 3)), jnp.float32)
    kernel = jnp.asarray(rng(53).normal(size=(3, V)), jnp.float32)
    head = functools.partial(linear_softmax_cross_entropy, reduction="sum", chunk_size=2)
    split = shard(head.func, mesh, batch="data", classes="model")

    def on_each(*args):
        return jax.lax.psum(head(*args), "data")

    own = jax.shard_map(on_each, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P())
    want = jax.vmap(jax.value_and_grad(head), (0, None, None))(hidden, kernel, LABELS)
    for loss in (functools.partial(split, **head.keywords), own):
        of_models = jax.vmap(jax.value_and_grad(loss), (0, None, None), spmd_axis_name="models")
        got = jax.jit(of_models)(hidden, kernel, LABELS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("kind", [*BOTH, "linear"])
def test_an_eager_call_is_one_program(kind):
    loss = BOTH.get(kind, lambda z, y: linear_softmax_cross_entropy(z, z.T, y))
    labels = LOGITS if kind == "dense" else jnp.asarray(LABELS)
    (*_, last) = jax.make_jaxpr(loss)(LOGITS, labels).eqns
    assert last.primitive.name == "jit"


@pytest.mark.parametrize("kind", BOTH)
def test_a_program_has_no_more_than_twice_the_equations(kind):
    """With the gradient too, counted through all nested programs."""
    z = jax.ShapeDtypeStruct((8, 10), jnp.float32)
    y = jax.ShapeDtypeStruct((8,), jnp.int32) if kind == "integer" else z

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            total += 1
            for value in equation.params.values():
                if isinstance(value, ClosedJaxpr | Jaxpr):
                    total += count(getattr(value, "jaxpr", value))
        return total

    def equations(fn):
        return count(jax.make_jaxpr(fn)(z, y).jaxpr)

    theirs = {
        "integer": optax.softmax_cross_entropy_with_integer_labels,
        "dense": optax.softmax_cross_entropy,
    }[kind]
    ours = BOTH[kind]
    for transform in (lambda fn: fn, jax.value_and_grad):
        want = equations(transform(lambda z, y: theirs(z, y).mean()))
        assert equations(transform(lambda z, y: ours(z, y, reduction="mean"))) <= 2 * want


def test_forward_mode_of_logits_that_the_program_computes():
    """At the largest of them, which is not the label: its distance to itself is 0, not a rounding."""
    x, t = np.full((1, 300), 1000, np.float32), np.float32(1 / 0.7)
    x[0, 7] = 1013.3
    z = (x * t).astype(np.float64)
    exponentials = np.exp(z - z.max())
    want = float(t) * exponentials[0, 7] / exponentials.sum()

    def loss(x):
        return jnp.sum(BOTH["integer"](x * t, np.array([3]), forward_mode=True))

    x_dot = np.zeros_like(x)
    x_dot[0, 7] = 1
    got = jax.jit(lambda x: jax.jvp(loss, (x,), (x_dot,))[1])(x)
    np.testing.assert_allclose(got, want, rtol=16 * 2.0**-24)
