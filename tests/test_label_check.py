"""`checkify` says which label was bad, in every transformation, and costs nothing elsewhere."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec
from support import INTEGER

from jax_sce import linear_softmax_cross_entropy, native

N, D, V = 4, 3, 5
BAD = np.array([0, 1, 7, -3], np.int32)
LOGITS, HIDDEN, KERNEL = jnp.ones((N, V)), jnp.ones((N, D)), jnp.ones((D, V))


def said(fn, *args, errors=checkify.user_checks):
    error, _ = jax.jit(checkify.checkify(fn, errors=errors))(*args)
    return error.get()


def total(logits, labels, **options):
    return INTEGER(logits, labels, reduction="sum", **options)


def scanned(logits, labels):
    step = jax.checkpoint(lambda carry, _: (carry + total(logits, labels), None))
    return jax.lax.scan(step, 0.0, length=2)[0]


def head(hidden, labels):
    return linear_softmax_cross_entropy(hidden, KERNEL, labels, reduction="mean")


PROGRAMS = {
    "value": INTEGER,
    "jit": jax.jit(INTEGER),
    "gradient": jax.grad(total),
    "forward mode": lambda z, y: jax.jacfwd(lambda z: total(z, y, forward_mode=True))(z),
    "hessian": jax.hessian(total),
    "vmap": jax.vmap(INTEGER),
    "vmap of logits": lambda z, y: jax.vmap(INTEGER, (0, None))(z[None], y),
    "scan of checkpoint": jax.grad(scanned),
    "smoothing": lambda z, y: INTEGER(z, y, label_smoothing=0.1),
    "head": lambda z, y: head(HIDDEN, y),
    "head's gradient": lambda z, y: jax.grad(head)(HIDDEN, y),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_first_bad_label_is_named(program):
    message = said(PROGRAMS[program], LOGITS, BAD)
    assert message.startswith("labels must lie in [0, 5), got 7 at (2)")
    assert said(PROGRAMS[program], LOGITS, BAD % V) is None


def test_index_checks_pass_a_head():
    """However it is differentiated: of a scatter under `jax.vmap` or `jax.checkpoint`, and of one that
    drops what lies outside, checkify makes an error."""

    def mean(hidden, **options):
        labels = np.array([0, 1, 2, 3])
        options |= {"reduction": "mean", "ignore_index": 0, "chunk_size": 3}
        return linear_softmax_cross_entropy(hidden, KERNEL, labels, **options)

    def differentiated(hidden):
        forward = jax.grad(functools.partial(mean, forward_mode=True))(hidden)
        return forward, jax.vmap(jax.grad(mean))(hidden[None])

    assert said(differentiated, HIDDEN, errors=checkify.index_checks) is None


def test_its_place_has_all_axes():
    message = said(INTEGER, LOGITS.reshape(2, 2, V), BAD.reshape(2, 2))
    assert message.startswith("labels must lie in [0, 5), got 7 at (1, 0)")
    assert said(INTEGER, LOGITS[2], BAD[2]).startswith("labels must lie in [0, 5), got 7 (")


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": 7},
        {"weights": np.array([1, 1, 0, 1], np.float32)},
        {"where": np.array([True, True, False, True])},
        {"where": np.array([True, True, False, True])[:, None] & np.ones(V, bool)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_examples_that_do_not_count_are_passed_over(options):
    message = said(lambda z, y: INTEGER(z, y, **options), LOGITS, BAD)
    assert message.startswith("labels must lie in [0, 5), got -3 at (3)")


def test_inside_vmap_of_weights_each_has_its_own():
    weights = jnp.ones((2, N)).at[0, 2:].set(0).at[1, 2].set(0)
    message = said(jax.vmap(lambda w: INTEGER(LOGITS, BAD, weights=w)), weights)
    assert message.startswith("labels must lie in [0, 5), got -3 at (1, 3)")


def test_inside_shard_map_the_device_is_named():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = jax.shard_map(INTEGER, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    message = said(sharded, LOGITS, BAD)
    assert "at mapped index 1: labels must lie in [0, 5), got 7 at (0)" in message


def test_it_stands_beside_other_checks():
    def step(logits, labels):
        checkify.check(logits[0, 0] < 0, "mine")
        return INTEGER(logits, labels)

    assert said(step, LOGITS, BAD % V).startswith("mine")
    assert said(step, -LOGITS, BAD).startswith("labels must lie")
    assert said(step, -LOGITS, BAD, errors=checkify.div_checks) is None
    assert said(INTEGER, LOGITS, BAD % V, errors=checkify.index_checks) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_narrow_labels_do_not_wrap(dtype):
    assert said(INTEGER, jnp.ones((1, 1000)), np.array([100], dtype)) is None
    assert said(INTEGER, jnp.ones((0, 1000)), np.zeros(0, dtype)) is None


@pytest.mark.parametrize("fn", [INTEGER, lambda z, y: head(HIDDEN, y)])
def test_it_costs_nothing(fn):
    """No effect, for which JAX would leave its fast dispatch, and no operation in the program (but the
    native kernels)."""
    assert not jax.make_jaxpr(fn)(LOGITS, BAD).effects
    lowered = jax.jit(fn).lower(LOGITS, BAD)
    assert "checked" not in lowered.as_text()
    calls = set(re.findall(r"custom_call @([\w.]+)", lowered.as_text()))
    assert calls <= {f"jax_sce.{target}" for target in native.TARGETS}
