"""A head under plain `jax.jit` splits itself, however its operands are laid out on a mesh."""

import functools
import os
import socket
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from support import (
    assert_close_to_largest as assert_close,
    cotangents,
    covering,
    rng,
)

from jax_sce import _backend, linear_softmax_cross_entropy as head, shard
from jax_sce.testing import collectives

BATCH, D, V, CHUNK = (8, 4), 16, 48, 8
IGNORED = -100
KERNELS = [P(None, "model"), P("data", "model"), P(None, ("data", "model")), P("data", None)]
HIDDEN = [P("data"), P(("data", "model"))]


@functools.cache
def make_mesh(sizes=(2, 4), axis_type=AxisType.Auto):
    names = ("data", "model", "expert")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes))


def put(x, spec, mesh=None):
    return jax.device_put(x, NamedSharding(mesh or make_mesh(), spec))


def problem(dtype=np.float32, num_classes=V, full=False):
    """Floats by name, and labels: the first half of the examples, a device's, is ignored."""
    r = rng(80)
    floats = {
        "hidden": jnp.asarray(r.normal(size=(*BATCH, D)), dtype),
        "kernel": jnp.asarray(r.normal(size=(D, num_classes)), dtype),
    }
    if full:
        floats |= {
            "bias": r.normal(size=num_classes).astype(np.float32),
            "class_weights": r.uniform(0, 2, num_classes).astype(np.float32),
            "weights": r.choice([0, 0.5, 2], BATCH).astype(np.float32),
            "z_loss": np.float32(0.1),
            "softcap": np.float32(6),
            "label_smoothing": np.float32(0.1),
        }
    labels = r.integers(0, num_classes - 3, BATCH, dtype=np.int32)
    labels[:4] = IGNORED
    return floats, labels


def derivatives(loss, floats, labels, **static):
    """The values, and the gradients by all floats with different cotangents of the losses."""

    def total(floats):
        out = loss(**floats, labels=labels, chunk_size=CHUNK, **static)
        losses, aux = out if static.get("return_aux") else (out, None)
        g = jnp.asarray(cotangents(losses.shape) if losses.ndim else 1.0, jnp.float32)
        of_aux = 0 if aux is None else jnp.sum(aux.log_normalizer * jnp.float32(0.3))
        return jnp.sum(losses * g) + of_aux, out

    (_, out), gradients = jax.value_and_grad(total, has_aux=True)(floats)
    return out, gradients


def compiled(fn, *args, out_shardings=None):
    return jax.jit(fn, out_shardings=out_shardings).lower(*args).compile()


def in_loops(program):
    return max((x.bytes for x in collectives(program) if x.in_loop), default=0)


# -- every layout -------------------------------------------------------------------------------------


@functools.cache
def on_one_device(reduction):
    return jax.device_get(jax.jit(step(reduction))(*problem()))


def step(reduction, loss=head, **static):
    return functools.partial(derivatives, loss, reduction=reduction, ignore_index=IGNORED, **static)


def place(floats, hidden, kernel, mesh=None):
    specs = {"hidden": hidden, "kernel": kernel}
    return {name: put(x, specs.get(name, P()), mesh) for name, x in floats.items()}


def where_they_are(placed):
    """Shardings of the results of `derivatives`: of the gradients those of the arguments."""
    return None, jax.tree.map(lambda x: x.sharding, placed)


@pytest.mark.parametrize(
    ("kernel", "hidden", "reduction"), covering(KERNELS, HIDDEN, ["mean", "none"]), ids=str
)
def test_it_computes_and_sends_what_shard_does(kernel, hidden, reduction):
    """The gradients are asked for where the arguments are. In the loop, row statistics alone cross."""
    floats, labels = problem()
    placed = place(floats, hidden, kernel)
    labels = put(labels, P(*hidden))
    ours = compiled(step(reduction), placed, labels, out_shardings=where_they_are(placed))
    assert_close(ours(placed, labels), on_one_device(reduction))
    rows = CHUNK * 4 * 5  # five numbers of each example of a chunk
    assert in_loops(ours) <= rows
    if reduction == "none":  # `tests/test_compiled.py` compares that, too
        return
    classes = (kernel[1],) if isinstance(kernel[1], str) else tuple(kernel[1] or ())
    split = (hidden[0],) if isinstance(hidden[0], str) else hidden[0]
    batch = tuple(axis for axis in split if axis not in classes)
    loss = shard(head, make_mesh(), batch=batch or None, classes=classes or None)
    shards = compiled(step(reduction, loss), placed, labels, out_shardings=where_they_are(placed))
    sent = [sum(x.sent for x in collectives(program)) for program in (ours, shards)]
    assert sent[0] <= 1.2 * sent[1] + 2 * 4 * rows  # some are sent by JAX outside of shard's loop


@pytest.mark.parametrize(
    ("sizes", "kernel", "hidden", "turned"),
    [
        ((2, 2, 2), P(("data", "expert"), "model"), P(("data", "expert")), 0),
        ((2, 2, 2), P("expert", "model"), P("data", "expert"), 0),
        ((2, 2, 2), P(None, ("expert", "model")), P("data", None, "model"), 0),
        ((2, 4), P("model", None), P("data"), 2),
        ((2, 4), P(("model", "data"), None), P("data"), 0),
        ((2, 4), P(("data", "model"), None), P("data"), 2),
        ((2, 4), P(), P(None, "data"), 0),
        ((2, 4), P("data", "model"), P(), 2),
        ((8, 1), P("data", "model"), P("data"), 0),
    ],
    ids=str,
)
def test_other_layouts(sizes, kernel, hidden, turned):
    """Where devices with the same examples split the features of the kernel, an all-to-all turns them
    into classes. Another turns those of the gradient back."""
    floats, labels = problem()
    mesh = make_mesh(sizes)
    placed = place(floats, hidden, kernel, mesh)
    fn = step("mean")
    program = compiled(fn, placed, labels)
    assert_close(program(placed, labels), on_one_device("mean"))
    assert in_loops(program) <= CHUNK * 4 * 5
    assert sum(x.kind == "all-to-all" for x in collectives(program)) == turned


def test_with_more_examples_than_classes_the_kernel_is_gathered():
    """What both are split over: here the kernel is the smaller array, and no example travels."""
    floats, labels = problem()
    few = {"hidden": floats["hidden"], "kernel": floats["kernel"][:, :16]}
    labels = np.where(labels == IGNORED, labels, labels % 16)
    placed = place(few, P("data"), P(None, "data"))
    program = compiled(step("sum"), placed, labels, out_shardings=where_they_are(placed))
    want = jax.jit(step("sum"))(few, labels)
    assert_close(program(placed, labels), want)
    assert max(x.bytes for x in collectives(program)) <= D * 16 * 4 + 4  # and the loss


# -- every option -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reduction"),
    covering(["integer", "padded dense", "padded", "dense"], ["mean", "none"], strength=1),
)
def test_options(kind, reduction):
    """With the aux and its gradient. Padded: neither classes nor examples divide over the devices."""
    floats, labels = problem(full=True)
    if "dense" in kind:
        labels = rng(81).dirichlet(np.ones(V), BATCH).astype(np.float32)
    static = {} if "dense" in kind else {"ignore_index": IGNORED}

    def fn(floats, labels):
        if "padded" in kind:  # of arrays that are split evenly, the last parts are cut
            of_classes = {"kernel", "bias", "class_weights"}
            cut = {k: x[..., : V - 3] if k in of_classes else x for k, x in floats.items()}
            cut = {k: x[:7] if k in ("hidden", "weights") else x for k, x in cut.items()}
            floats, labels = cut, labels[:7] if "dense" not in kind else labels[:7, :, : V - 3]
        return derivatives(head, floats, labels, reduction=reduction, return_aux=True, **static)

    want = jax.jit(fn)(floats, labels)
    specs = {"hidden": P("data"), "kernel": P("data", "model"), "weights": P(None, "model")}
    placed = {k: put(x, specs.get(k, P())) for k, x in floats.items()}
    program = compiled(fn, placed, put(labels, P("data")))
    assert_close(program(placed, put(labels, P("data"))), want)
    assert in_loops(program) <= CHUNK * 4 * 5


def test_padding_may_hold_nan():
    floats, labels = problem(full=True)
    floats["class_weights"][-3:] = floats["bias"][-3:] = np.nan

    def fn(floats, labels):
        of_classes = {"kernel", "bias", "class_weights"}
        cut = {k: x[..., : V - 3] if k in of_classes else x for k, x in floats.items()}
        return derivatives(head, cut, labels, reduction="mean", ignore_index=IGNORED)

    split = {"kernel": P(None, "model"), "bias": P("model"), "class_weights": P("model")}
    placed = {k: put(x, split.get(k, P())) for k, x in floats.items()}
    assert_close(jax.jit(fn)(placed, labels), jax.jit(fn)(floats, labels))


def test_padded_classes_and_a_gradient_whose_features_their_devices_split():
    floats, labels = problem()
    fn = step("mean", lambda **args: head(**args | {"kernel": args["kernel"][:, : V - 3]}))
    placed = place(floats, P("data"), P(None, "model"))
    _, layout = where_they_are(place(floats, P(), P("model")))
    program = compiled(fn, placed, labels, out_shardings=(None, layout))
    assert_close(program(placed, labels), jax.jit(fn)(floats, labels))


def test_bad_labels_are_nan_and_no_other_is():
    floats, labels = problem()
    labels[5, 1], labels[6, 2] = V, -1
    fn = step("none")
    placed = place(floats, P("data"), P(None, "model"))
    (losses, gradients), want = jax.jit(fn)(placed, labels), jax.jit(fn)(floats, labels)
    assert np.isnan(losses).sum() == 2
    assert_close((losses, gradients["hidden"]), (want[0], want[1]["hidden"]))
    assert np.all(np.isnan(gradients["kernel"]))


def test_16_bit_arrays_are_summed_in_their_own_type():
    """A device's part of a gradient is rounded, and then their sum."""
    floats, labels = problem(jnp.bfloat16)
    fn = step("mean")
    want = jax.jit(fn)(jax.tree.map(lambda x: x.astype(jnp.float32), floats), labels)
    placed = place(floats, P("data"), P("data", "model"))
    program = compiled(fn, placed, labels)
    got = program(placed, labels)
    assert got[1]["kernel"].dtype == jnp.bfloat16
    assert_close(got, want, rtol=3 * 2.0**-8)


@pytest.mark.parametrize(
    ("kernel", "reduction"),
    covering([P(None, "model"), P("data", "model"), P("data", None)], ["mean", "none"], strength=1),
    ids=str,
)
def test_a_wide_kernel_has_a_wide_gradient(kernel, reduction):
    floats, labels = problem(jnp.bfloat16)
    floats["kernel"] = floats["kernel"].astype(jnp.float32) * 1.001
    fn = step(reduction, dtype=jnp.bfloat16)
    want = jax.jit(fn)(floats, labels)
    placed = place(floats, P("data"), kernel)
    program = compiled(fn, placed, labels, out_shardings=where_they_are(placed))
    got = program(placed, labels)
    assert got[1]["kernel"].dtype == jnp.float32
    assert_close(got, want, rtol=3 * 2.0**-8)


# -- every transformation -----------------------------------------------------------------------------


def mean(hidden, kernel, labels, **static):
    return head(hidden, kernel, labels, chunk_size=CHUNK, reduction="mean", **static)


def each(hidden, kernel, labels):
    losses = head(hidden, kernel, labels, chunk_size=CHUNK)
    return jnp.sum(losses * jnp.asarray(cotangents(losses.shape), jnp.float32))


TRANSFORMED = {
    "two heads": lambda h, w, y: jax.grad(lambda w: mean(h, w, y) + each(2 * h, w, y))(w),
    "forward over reverse": lambda h, w, y: jax.jvp(
        lambda h: jax.grad(mean, 1)(h, w, y), (h,), (jnp.ones_like(h),)
    ),
    "reverse over reverse": lambda h, w, y: jax.grad(
        lambda h: jnp.sum(jnp.square(jax.grad(each)(h, w, y)))
    )(h),
    "forward mode": lambda h, w, y: jax.jvp(
        lambda h: mean(h, w, y, forward_mode=True), (h,), (jnp.ones_like(h),)
    ),
    "vmap": lambda h, w, y: jax.vmap(lambda w: jax.value_and_grad(each, (0, 1))(h, w, y))(
        jnp.stack([w, 2 * w])
    ),
    "scan": lambda h, w, y: jax.lax.scan(
        lambda total, x: (total + jax.grad(mean, 1)(x[0], w, x[1]), None), jnp.zeros_like(w), (h, y)
    )[0],
    "checkpoint": lambda h, w, y: jax.value_and_grad(
        jax.checkpoint(lambda h, w: each(jnp.tanh(h), w, y)), (0, 1)
    )(h, w),
    "tied": lambda h, w, y: jax.grad(lambda e: mean(h, e.T, y))(w.T),
    "one example": lambda h, w, y: jax.value_and_grad(mean, (0, 1))(h[0, 0], w, y[5, 0]),
}


@pytest.mark.parametrize("how", TRANSFORMED)
def test_transformations(how):
    floats, labels = problem()
    labels = np.maximum(labels, 0)
    hidden, kernel = floats["hidden"], floats["kernel"]
    fn = TRANSFORMED[how]
    want = jax.jit(fn)(hidden, kernel, labels)
    got = jax.jit(fn)(put(hidden, P("data")), put(kernel, P("data", "model")), labels)
    assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_of_the_kernel_is_scattered_where_it_is_asked_for(reduction):
    """Though the kernel is not split so, as an optimizer's state often is."""
    floats, labels = problem()
    placed = place(floats, P("data"), P(None, "model"))
    _, layout = where_they_are(place(floats, P(), P("data", "model")))
    program = compiled(step(reduction), placed, labels, out_shardings=(None, layout))
    assert_close(program(placed, labels), on_one_device(reduction))
    assert "reduce-scatter" in {x.kind for x in collectives(program)}
    assert in_loops(program) <= CHUNK * 4 * 5


def test_donated_arguments():
    floats, labels = problem()
    labels = np.maximum(labels, 0)
    fn = jax.grad(mean, (0, 1))
    want = jax.jit(fn)(floats["hidden"], floats["kernel"], labels)
    placed = put(floats["hidden"], P("data")), put(floats["kernel"], P("data", "model"))
    layout = tuple(x.sharding for x in placed)
    run = jax.jit(fn, donate_argnums=(0, 1), out_shardings=layout)
    assert_close(run(*placed, labels), want)
    assert all(x.is_deleted() for x in placed)


# -- where the compiler does not tell the layout ------------------------------------------------------


def assert_layout_is_kept(program):
    """In the loop numbers of each row are gathered, no kernel and no logits. Summed are a chunk's hidden
    gradient and, by XLA for CPU, a device's part of the kernel's gradient."""
    for x in collectives(program):
        limit = max(CHUNK * D, D * V // 4) if x.kind == "all-reduce" else 4 * 4 * CHUNK
        assert not x.in_loop or x.bytes <= 4 * limit, x


@pytest.mark.parametrize(
    ("kernel", "reduction"),
    covering([P(None, "model"), P("data", "model")], ["mean", "none"], strength=1),
    ids=str,
)
def test_in_plain_jax_the_layout_is_kept(kernel, reduction, monkeypatch):
    """As on TPUs, which know no `custom_partitioning`."""
    monkeypatch.setattr(_backend, "with_devices", lambda *_: None)
    floats, labels = problem()
    placed = place(floats, P("data"), kernel)
    fn = step(reduction)
    labels = put(labels, P("data"))
    program = compiled(fn, placed, labels, out_shardings=where_they_are(placed))
    assert_close(program(placed, labels), on_one_device(reduction))
    assert_layout_is_kept(program)


def test_an_exported_program_keeps_the_layout():
    floats, labels = problem()
    placed = place(floats, P("data"), P("data", "model"))
    fn = step("mean")
    labels = put(labels, P("data"))
    exported = jax.export.export(jax.jit(fn))(placed, labels)
    program = compiled(exported.call, placed, labels)
    assert_close(program(placed, labels), on_one_device("mean"))
    assert_layout_is_kept(program)


def test_inside_a_shard_map_over_some_axes():
    floats, labels = problem()
    labels = np.maximum(labels, 0)
    specs = {"in_specs": (P("data"), P(), P("data")), "out_specs": P(), "axis_names": {"data"}}
    fn = jax.shard_map(
        lambda h, w, y: jax.lax.pmean(mean(h, w, y), "data"), mesh=make_mesh(), **specs
    )
    want = jax.jit(jax.value_and_grad(mean, (0, 1)))(floats["hidden"], floats["kernel"], labels)
    got = jax.jit(jax.value_and_grad(fn, (0, 1)))(
        put(floats["hidden"], P("data")), put(floats["kernel"], P(None, "model")), labels
    )
    assert_close(got, want)


@pytest.mark.parametrize(
    ("kernel", "reduction"),
    covering([*KERNELS, P(("model", "data"))], ["mean", "none"], strength=1),
    ids=str,
)
def test_on_explicit_axes(kernel, reduction):
    """There JAX tells the layout while it traces; the gradients have that of the arguments."""
    floats, labels = problem()
    mesh = make_mesh((2, 4), AxisType.Explicit)
    fn = step(reduction)
    with jax.set_mesh(mesh):
        placed = place(floats, P("data"), kernel, mesh)
        labels = put(labels, P("data"), mesh)
        program = compiled(fn, placed, labels)
        got = program(placed, labels)
    assert_close(got, on_one_device(reduction))
    assert got[1]["kernel"].sharding.is_equivalent_to(placed["kernel"].sharding, 2)
    assert in_loops(program) <= CHUNK * 4 * 5


def test_on_explicit_axes_each_device_has_its_own_examples():
    floats, labels = problem()
    mesh, split = make_mesh((2, 4), AxisType.Explicit), P("data", "model")
    with jax.set_mesh(mesh):
        hidden, labels = put(floats["hidden"], split, mesh), put(labels, split, mesh)
        kernel = put(floats["kernel"], P(), mesh)
        program = jax.make_jaxpr(head)(hidden, kernel, labels)
    (specs,) = [e.params["in_specs"] for e in program.eqns if "in_specs" in e.params]
    assert specs == (P("data", "model", None), P(None, None), split)


# -- other numbers of devices, and of processes -------------------------------------------------------

SCRIPT = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_sce import linear_softmax_cross_entropy as head

if len(sys.argv) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
draws = np.random.default_rng(0)
h, w = (draws.normal(size=size).astype(np.float32) for size in ((24, 12), (12, 48)))
y = draws.integers(0, 48, 24, dtype=np.int32)
step = jax.value_and_grad(lambda h, w, y: head(h, w, y, reduction="mean", chunk_size=6), (0, 1))
with jax.default_device(jax.local_devices()[0]):
    want = jax.device_get(jax.jit(step)(h, w, y))
devices = jax.device_count()
for sizes in ((devices // 2, 2), (2, devices // 2)):
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    def put(x, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
    whole = NamedSharding(mesh, P())
    for spec in ((None, "model"), ("data", "model")):
        run = jax.jit(step, out_shardings=whole)
        got = run(put(h, "data"), put(w, *spec), put(y, "data"))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-5 * np.abs(b).max())
print("right on", devices)
"""


def run_script(num_devices, *arguments):
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)  # fmt: skip


def test_six_devices():
    """Their number is no power of a prime, and the mesh cannot be told from it: plain JAX."""
    output, _ = run_script(6).communicate(timeout=300)
    assert "right on 6" in output, output


def test_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    runs = [run_script(2, port, str(i)) for i in range(2)]
    for run in runs:
        output, _ = run.communicate(timeout=300)
        assert "right on 4" in output, output
