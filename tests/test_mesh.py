"""Classes and examples split over devices: values and gradients as on one, and little crosses."""

import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from support import (
    BOTH,
    DENSE,
    INTEGER,
    assert_close_to_largest as assert_close,
    cotangents,
    covering,
    rng,
)

import jax_sce
from jax_sce import _partition, linear_softmax_cross_entropy, shard
from jax_sce.testing import collectives, conformance

N, D, V = 8, 8, 16
IGNORED = 7
FUNCTIONS = {**BOTH, "linear": linear_softmax_cross_entropy}

MESHES = {
    "8": ((8,), ("data",), None),
    "1x8": ((1, 8), ("data", "model"), "model"),
    "2x4": ((2, 4), ("data", "model"), "model"),
    "4x2": ((4, 2), ("data", "model"), "model"),
    "2x2x2": ((2, 2, 2), ("data", "expert", "model"), ("expert", "model")),
}


def make_mesh(name, axis_type=AxisType.Auto):
    sizes, names, classes = MESHES[name]
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes)), classes


def two_types():
    types = AxisType.Auto, AxisType.Explicit
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=types)


def logits():
    z = rng(1).normal(size=(N, V)).astype(np.float32) * 4
    z[0, -1] += 20  # a confident row
    z[1, [3, 9]] = z[1].max() + 1  # ties on two devices
    return z


def labels(kind):
    ids = np.array([V - 1, 3, 8, 0, 4, IGNORED, 12, 11], np.int32)
    return rng(2).uniform(0, 1, (N, V)).astype(np.float32) if kind == "dense" else ids


def arguments(kind, *, plain=False):
    """Floats by name, and the rest."""
    r = rng(3)
    floats = {"logits": logits()}
    if kind == "linear":
        floats = {
            "hidden": r.normal(size=(N, D)).astype(np.float32),
            "kernel": r.normal(size=(D, V)).astype(np.float32),
            "bias": r.normal(size=V).astype(np.float32),
        }
    if not plain:
        floats |= {
            "class_weights": r.uniform(0, 2, V).astype(np.float32),
            "weights": np.array([1, 0.5, 2, 1, 1, 0.5, 0, 3], np.float32),
            "z_loss": np.float32(0.1),
            "softcap": np.float32(6),
        }
    rest = {"labels": labels(kind)}
    if kind != "dense":
        rest["ignore_index"] = IGNORED
    return floats, rest


def derivatives(loss, floats, rest, **static):
    """The value, and the gradients by all floats, of losses with different cotangents."""

    def total(floats):
        out = loss(**floats, **rest, **static)
        g = cotangents(out.shape).astype(np.float32) if out.ndim else 1
        return jnp.sum(out * g), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(floats)
    return out, gradients


@functools.cache
def on_one_device(kind, reduction):
    return derivatives(FUNCTIONS[kind], *arguments(kind), reduction=reduction)


# -- shard --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "kind", "reduction", "axis_type"),
    [
        ("8", "linear", "mean", AxisType.Auto),
        ("1x8", "integer", "mean", AxisType.Auto),
        ("2x4", "linear", "none", AxisType.Explicit),
        ("2x4", "dense", "mean", AxisType.Explicit),
        ("4x2", "linear", "sum", AxisType.Auto),
        ("4x2", "integer", "none", AxisType.Explicit),
        ("2x2x2", "linear", "mean", AxisType.Explicit),
        ("2x2x2", "dense", "none", AxisType.Auto),
    ],
)
def test_shard_is_the_function_of_one_device(mesh, kind, reduction, axis_type):
    mesh, classes = make_mesh(mesh, axis_type)
    floats, rest = arguments(kind)
    want = on_one_device(kind, reduction)
    with jax.set_mesh(mesh):
        loss = shard(FUNCTIONS[kind], classes=classes)  # on the ambient mesh
        got = derivatives(loss, floats, rest, reduction=reduction)
    assert_close(got, want)


def test_the_ambient_mesh_may_change():
    loss, want = shard(INTEGER, classes="model"), INTEGER(logits(), labels("integer"))
    for name in ("2x4", "4x2", "2x4"):
        with jax.set_mesh(make_mesh(name)[0]):
            assert_close(loss(logits(), labels("integer")), want)


@pytest.mark.parametrize("kind", ["integer", "linear"])
def test_every_class_is_some_label(kind):
    """The first and the last of each device's among them."""
    mesh, classes = make_mesh("1x8")
    z = rng(9).normal(size=(V, V)).astype(np.float32)
    floats = (
        {"logits": z} if kind == "integer" else {"hidden": np.eye(V, dtype=np.float32), "kernel": z}
    )
    rest = {"labels": rng(10).permutation(V).astype(np.int32)}
    want = derivatives(FUNCTIONS[kind], floats, rest)
    assert_close(derivatives(shard(FUNCTIONS[kind], mesh, classes=classes), floats, rest), want)


@pytest.mark.parametrize(
    ("kind", "reduction"), covering(list(FUNCTIONS), ["sum", "mean"], strength=1)
)
def test_no_examples(kind, reduction):
    mesh, classes = make_mesh("2x4")
    floats, rest = arguments(kind, plain=True)
    name = "hidden" if kind == "linear" else "logits"
    floats[name], rest["labels"] = floats[name][:0], rest["labels"][:0]
    loss = shard(FUNCTIONS[kind], mesh, classes=classes)
    value, gradients = jax.value_and_grad(lambda x: loss(**x, **rest, reduction=reduction))(floats)
    assert value == 0
    jax.tree.map(np.testing.assert_array_equal, gradients, jax.tree.map(np.zeros_like, floats))


@pytest.mark.parametrize("axis", [0, 1, (2, 0)])
def test_classes_on_any_axis(axis):
    mesh, classes = make_mesh("2x4")
    z = rng(5).normal(size=(8, 8, 4)).astype(np.float32)
    batch = (8, 4) if axis != (2, 0) else (8,)
    ids = rng(6).integers(0, 8 if axis != (2, 0) else 32, batch, dtype=np.int32)
    mask = rng(7).random((1, 8, 1)) < 0.7
    rest = {"labels": ids, "axis": axis, "where": mask}
    want = derivatives(INTEGER, {"logits": z}, rest)
    assert_close(derivatives(shard(INTEGER, mesh, classes=classes), {"logits": z}, rest), want)


@pytest.mark.parametrize("kind", ["integer", "linear"])
def test_a_single_example_is_on_all_devices_of_the_batch(kind):
    mesh, classes = make_mesh("2x4")
    r = rng(11)
    floats = {"logits": r.normal(size=V).astype(np.float32)}
    if kind == "linear":  # whose number of features two devices do not divide
        sizes = {"hidden": 7, "kernel": (7, V)}
        floats = {k: r.normal(size=size).astype(np.float32) for k, size in sizes.items()}
    rest = {"labels": np.int32(3)}
    want = derivatives(FUNCTIONS[kind], floats, rest)
    assert_close(derivatives(shard(FUNCTIONS[kind], mesh, classes=classes), floats, rest), want)


def test_a_mean_divides_by_the_weight_of_the_whole_batch():
    """However unevenly the ignored examples fall: here all on one device."""
    mesh, classes = make_mesh("2x4")
    floats, rest = arguments("linear", plain=True)
    rest["labels"] = np.where(np.arange(N) < N // 2, IGNORED, rest["labels"])
    want = derivatives(FUNCTIONS["linear"], floats, rest, reduction="mean")
    loss = shard(FUNCTIONS["linear"], mesh, classes=classes)
    assert_close(derivatives(loss, floats, rest, reduction="mean"), want)


def test_an_eager_call_with_a_kernel_that_lives_split():
    """FSDP: where the kernel is known to be split over the batch's axis, it is gathered and its gradient
    comes back split."""
    mesh, classes = make_mesh("2x4")
    floats, rest = arguments("linear")
    want = derivatives(FUNCTIONS["linear"], floats, rest, reduction="mean")
    loss = functools.partial(shard(FUNCTIONS["linear"], mesh, classes=classes), reduction="mean")
    floats = jax.tree.map(jnp.asarray, floats)
    for spec in (P(), P("data"), P("data", "model")):
        split = NamedSharding(mesh, spec)
        floats["kernel"] = jax.device_put(floats["kernel"], split)
        assert_close(loss(**floats, **rest), want[0])
    explicit, _ = make_mesh("2x4", AxisType.Explicit)
    floats["kernel"] = jax.device_put(floats["kernel"], NamedSharding(explicit, split.spec))
    with jax.set_mesh(explicit):
        got = derivatives(
            shard(FUNCTIONS["linear"], classes=classes), floats, rest, reduction="mean"
        )
    assert got[1]["kernel"].sharding.spec == split.spec
    assert_close(got, want)


def test_bfloat16():
    mesh, classes = make_mesh("2x4")
    floats, rest = arguments("linear", plain=True)
    floats = {k: jnp.asarray(x, jnp.bfloat16) for k, x in floats.items()}
    want = derivatives(FUNCTIONS["linear"], floats, rest, reduction="mean")
    got = derivatives(shard(FUNCTIONS["linear"], mesh, classes=classes), floats, rest,
                      reduction="mean")  # fmt: skip
    assert {k: g.dtype for k, g in got[1].items()} == dict.fromkeys(floats, jnp.bfloat16)
    # The hidden states' gradient is rounded on each device, before it is summed over them.
    assert_close(got, want, rtol=4 * 2.0**-8)


def test_the_aux_is_of_whole_rows():
    mesh, classes = make_mesh("1x8")
    hidden, ids = jnp.eye(N), np.array([3, 9, 0, 1, 2, IGNORED, 4, 5], np.int32)
    kernel = logits()
    fn = functools.partial(FUNCTIONS["linear"], return_aux=True, ignore_index=IGNORED)
    loss = functools.partial(
        shard(FUNCTIONS["linear"], mesh, classes=classes), return_aux=True, ignore_index=IGNORED
    )
    want, got = fn(hidden, kernel, ids), loss(hidden, kernel, ids)
    np.testing.assert_array_equal(got[1].prediction, want[1].prediction)
    assert got[1].prediction[1] == 3  # the lower of two that tie
    assert_close(got, want)

    def normalizers(fn, kernel):
        return jnp.sum(fn(hidden, kernel, ids)[1].log_normalizer * cotangents(N).astype(np.float32))

    gradients = [jax.grad(functools.partial(normalizers, f))(kernel) for f in (loss, fn)]
    assert_close(*gradients)


@pytest.mark.parametrize("fn", [INTEGER, DENSE])
def test_padded_classes_are_masked_exactly(fn):
    """13 classes on 8 devices, of which the last has none."""
    mesh, classes = make_mesh("1x8")
    z, there = logits(), np.arange(V) < 13
    ids = np.minimum(labels("integer"), 12)
    y = ids if fn is INTEGER else labels("dense")
    want = fn(z[:, :13], y if fn is INTEGER else y[:, :13], label_smoothing=0.1)
    got = shard(fn, mesh, classes=classes)(z, y, where=there[None], label_smoothing=0.1)
    assert_close(got, want)


def test_a_bias_of_minus_infinity_pads_a_head():
    mesh, classes = make_mesh("1x8")
    floats, _ = arguments("linear", plain=True)
    ids = np.minimum(labels("integer"), 12)
    rest = {"labels": ids}
    short = floats | {"kernel": floats["kernel"][:, :13], "bias": floats["bias"][:13]}
    want = derivatives(FUNCTIONS["linear"], short, rest, reduction="mean")
    floats["bias"] = np.where(np.arange(V) < 13, floats["bias"], -np.inf).astype(np.float32)
    loss = shard(FUNCTIONS["linear"], mesh, classes=classes)
    value, gradients = derivatives(loss, floats, rest, reduction="mean")
    gradients = gradients | {k: gradients[k][..., :13] for k in ("kernel", "bias")}
    assert_close((value, gradients), want)


def test_a_bad_label_and_a_bad_row_are_loud_on_all_devices():
    mesh, classes = make_mesh("1x8")
    z = logits()
    z[2, 5], z[3], z[4, 8:] = np.nan, -np.inf, -np.inf
    ids = np.array([V, -1, 0, 0, 9, 1, 2, 3], np.int32)
    loss = shard(INTEGER, mesh, classes=classes)
    got, want = (derivatives(fn, {"logits": z}, {"labels": ids}) for fn in (loss, INTEGER))
    assert_close(got, want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: shard(jnp.sum, m), ValueError, "loss must be one of softmax_cross_entropy, "),
        (lambda m: shard([], m), ValueError, "loss must be one of softmax_cross_entropy, "),
        (lambda m: shard(INTEGER, "data"), TypeError, "mesh must be a jax.sharding.Mesh or None, got"),
        (lambda m: shard(INTEGER, m, batch=3), TypeError, "batch must be a mesh axis"),
        (lambda m: shard(INTEGER, m, classes="data"), ValueError,
         "batch and classes must not name an axis twice, got 'data' and 'data'"),
        (lambda m: shard(INTEGER, two_types())(logits(), labels("integer")), ValueError,
         r"mesh must have only Auto or only Explicit axes, got \(Auto, Explicit\)"),
        (lambda m: jax.shard_map(shard(INTEGER), mesh=m, in_specs=P("data"), out_specs=P("data"))(
            logits(), labels("integer")), ValueError, "mesh must not be manual over 'data'"),
        (lambda m: shard(INTEGER, m, batch="dat")(logits(), labels("integer")), ValueError,
         r"batch must name axes of the mesh, \('data', 'model'\), got 'dat'"),
        (lambda m: shard(INTEGER)(logits(), labels("integer")), ValueError, "mesh must be given"),
        (lambda m: shard(INTEGER, m)(logits()[:7], labels("integer")[:7]), ValueError,
         "the size of the first batch axis must be a multiple of the 2 devices along data, got 7"),
        (lambda m: shard(INTEGER, m, classes="model")(logits()[:, :14], labels("integer")),
         ValueError, "the number of classes must be a multiple of the 4 devices along model, got 14"),
        (lambda m: shard(INTEGER, m)(np.zeros((3, 8, V)), np.zeros((3, 8), int)), ValueError,
         "the size of the first batch axis must be a multiple of the 2 devices along data, got 3"),
        (lambda m: shard(INTEGER, m, classes="model")(
            np.zeros((8, 3, 4)), np.zeros(8, int), axis=(1, 2)), ValueError,
         "the size of the first class axis must be a multiple of the 4 devices along model, got 3"),
        (lambda m: shard(INTEGER, m)(logits(), labels("integer"), axis_name="model"), ValueError,
         "axis_name must be None"),
        (lambda m: shard(INTEGER, m)(logits(), logits()), TypeError, "labels must have an integer"),
    ],
)  # fmt: skip
def test_mistakes_with_shard_are_named(call, error, message):
    mesh, _ = make_mesh("2x4")
    with pytest.raises(error, match=message):
        call(mesh)


@pytest.mark.parametrize("kind", ["integer", "linear"])
def test_of_several_axes_of_examples_the_first_is_split(kind):
    """The devices divide no other. The labels of a head are distributions here."""
    mesh, classes = make_mesh("4x2")
    r = rng(13)
    floats = {"logits": r.normal(size=(4, 3, 6)).astype(np.float32)}
    rest = {"labels": r.integers(0, 6, (4, 3), dtype=np.int32)}
    if kind == "linear":
        sizes = {"hidden": (4, 3, 8), "kernel": (8, 6), "labels": (4, 3, 6)}
        floats, rest = {k: r.normal(size=x).astype(np.float32) for k, x in sizes.items()}, {}
    want = derivatives(FUNCTIONS[kind], floats, rest)
    assert_close(derivatives(shard(FUNCTIONS[kind], mesh, classes=classes), floats, rest), want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mass_on_a_device_without_classes_costs_infinity(dtype, x64):
    """All of its logits are -inf: no classes, to which no mass may go. By the kernel and without it."""
    mesh, classes = make_mesh("1x8")
    z, y = (x[:3].astype(dtype) for x in (logits(), labels("dense")))
    z[:, :2], y[0, :2], y[1, 1] = -np.inf, 0, 0
    losses = shard(DENSE, mesh, classes=classes)(z, y)
    np.testing.assert_array_equal(losses[1:], np.inf)
    assert_close(losses, DENSE(z, y))


def test_an_eager_call_is_compiled_once():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    logits, labels = jnp.zeros((8, 3)), jnp.zeros(8, jnp.int32)
    call = lambda: shard(FUNCTIONS["integer"], mesh)(logits, labels)  # noqa: E731
    first = call()
    with jax.no_tracing():
        np.testing.assert_array_equal(call(), first)


def test_a_function_of_shard_has_the_name_and_the_signature_of_the_loss():
    for loss in FUNCTIONS.values():
        sharded = shard(loss)
        assert (sharded.__name__, sharded.__doc__) == (loss.__name__, loss.__doc__)
        assert inspect.signature(sharded) == inspect.signature(loss)


# -- the promises of the conformance suite, at any size -----------------------------------------------

# Those that a split can break; other tests of this file have shown the rest.
PROMISED = (
    "cotangents", "hidden states and kernel", "confident rows", "ties", "one class", "no examples",
    "absent classes", "absent labels", "bad rows", "bad labels",
)  # fmt: skip


def fill(x, *multiples):
    """With zeros, until its sizes are multiples of these."""
    return jnp.pad(x, [(0, -n % m) for n, m in zip(x.shape, multiples, strict=True)])


def at_any_size(kind):
    """On 2 x 4 devices, of any number of examples and classes: more are added that do not count."""
    mesh, classes = make_mesh("2x4")
    loss = shard(FUNCTIONS[kind], mesh, classes=classes)

    def adapted(*arrays):
        *arrays, labels = arrays
        n, v = len(arrays[0]), arrays[-1].shape[-1]
        labels = labels.astype(jnp.int32)
        labels = fill(jnp.where((labels >= 0) & (labels < v), labels, -1), 2)
        options = {"weights": fill(jnp.ones(n), 2)}
        there = jnp.arange(v + -v % 4) < v
        if kind == "linear":
            arrays = fill(arrays[0], 2, 1), fill(arrays[1], 1, 4)
            options["bias"] = jnp.where(there, 0, -jnp.inf)
        else:
            arrays = (fill(*arrays, 2, 4),)
            options["where"] = there[None]
        return loss(*arrays, labels, **options)[:n]

    return adapted


@pytest.mark.thorough
@pytest.mark.usefixtures("lax_promotion")
@pytest.mark.parametrize("kind", ["integer", "linear"])
def test_shard_keeps_the_promises(kind):
    report = conformance(at_any_size(kind), kind, promises=PROMISED)
    assert report.holds, str(report)


# -- axis_name ----------------------------------------------------------------------------------------


SPECS = {
    "logits": P("data", "model"),
    "hidden": P("data"),
    "kernel": P(None, "model"),
    "bias": P("model"),
    "class_weights": P("model"),
    "weights": P("data"),
}


def inside(fn, floats, rest, check_vma, **static):
    """`fn` with `axis_name`, on 2 x 4 devices, as a function of the floats by name."""
    mesh, _ = make_mesh("2x4")
    ids = {k: x for k, x in rest.items() if k != "ignore_index"}
    static |= {k: x for k, x in rest.items() if k == "ignore_index"}
    specs = {k: SPECS.get(k, P()) for k in floats}
    of_labels = {k: P("data", "model") if np.ndim(x) == 2 else P("data") for k, x in ids.items()}

    def local(floats, ids):
        return fn(**floats, **ids, axis_name="model", **static)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs, of_labels), out_specs=P("data"),
                           check_vma=check_vma)  # fmt: skip
    return lambda **floats: mapped(floats, ids)


@pytest.mark.parametrize(
    ("kind", "check_vma", "forward_mode"),
    covering(list(FUNCTIONS), [True, False], [False, True]),
)
def test_axis_name(kind, check_vma, forward_mode):
    floats, rest = arguments(kind)
    if kind == "dense":
        floats["label_smoothing"] = np.float32(0.1)
    want = derivatives(FUNCTIONS[kind], floats, rest)
    loss = inside(FUNCTIONS[kind], floats, rest, check_vma, forward_mode=forward_mode)
    assert_close(derivatives(loss, floats, {}), want)


@pytest.mark.parametrize(
    ("by", "check_vma"),
    covering(
        ["integer logits", "dense logits", "linear kernel", "linear hidden"], [True, False],
        strength=1),
)  # fmt: skip
def test_second_derivatives(by, check_vma):
    """Reverse over reverse mode: the derivative of a gradient's product with a vector."""
    kind, name = by.split()
    floats, rest = arguments(kind, plain=True)
    direction = rng(8).normal(size=floats[name].shape).astype(np.float32)

    def second(loss):
        def slope(x):
            def total(x):
                return jnp.vdot(loss(**(floats | {name: x})), cotangents(N).astype(np.float32))

            return jnp.vdot(jax.grad(total)(x), direction)

        return jax.jit(jax.grad(slope))(floats[name])

    want = second(functools.partial(FUNCTIONS[kind], **rest))
    assert_close(second(inside(FUNCTIONS[kind], floats, rest, check_vma)), want)


@pytest.mark.parametrize(("check_vma", "times"), [(True, 1), (False, 4)])
def test_a_gradient_that_is_taken_inside(check_vma, times):
    """Unchecked, JAX differentiates the sum of the losses of the four devices."""
    mesh, _ = make_mesh("2x4")

    def gradient(z, ids, **options):
        return jax.grad(lambda z: INTEGER(z, ids, reduction="sum", **options))(z)

    specs = P("data", "model"), P("data")
    inside = jax.shard_map(functools.partial(gradient, axis_name="model"), mesh=mesh, in_specs=specs,
                           out_specs=specs[0], check_vma=check_vma)  # fmt: skip
    want = times * gradient(logits(), labels("integer"))
    assert_close(inside(logits(), labels("integer")), want)


def test_an_axis_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="axis_name must name a mesh axis of the enclosing"):
        INTEGER(logits(), labels("integer"), axis_name="model")
    with pytest.raises(TypeError, match="axis_name must be a mesh axis"):
        INTEGER(logits(), labels("integer"), axis_name=0)


@pytest.mark.parametrize("kind", ["integer", "linear"])
def test_classes_that_are_not_split_over_axis_name_are_named(kind):
    """Each device would count them again: the loss would be off by the logarithm of their number."""
    name = "kernel" if kind == "linear" else "logits"
    floats, rest = arguments(kind, plain=True)
    ids = rest["labels"]

    def trace(mesh, spec, axes, of_loss=lambda loss: loss, check_vma=True):
        def local(x):
            if kind == "linear":
                return linear_softmax_cross_entropy(floats["hidden"], x, ids, axis_name=axes)
            return INTEGER(x, ids, axis_name=axes)

        out = spec if of_loss is differentiated else P()
        run = jax.shard_map(
            of_loss(local),
            mesh=make_mesh(mesh)[0],
            in_specs=spec,
            out_specs=out,
            check_vma=check_vma,
        )
        return jax.eval_shape(run, floats[name])

    def differentiated(loss):
        return jax.jit(jax.grad(lambda x: jnp.sum(loss(x))))

    def mapped(loss):
        return lambda x: jax.vmap(loss)(x[None])[0]

    def computed(loss):
        """Makes an array that varies over "model" of one that does not."""
        return lambda x: loss(x * jax.lax.axis_index("model").astype(x.dtype))

    split, both = P(None, "model"), ("data", "model")
    same = r"\(see axis_name\), got the same array on all its devices"
    for of_loss in (lambda loss: loss, differentiated, mapped):
        with pytest.raises(ValueError, match=f"{name} must be split .* 'model' {same}"):
            trace("2x4", P(), "model", of_loss)
        trace("2x4", split, "model", of_loss)
    with pytest.raises(ValueError, match=f"{name} must be split .* 'data' {same}"):
        trace("2x4", split, both)
    trace("1x8", split, both)  # one device is the whole axis
    trace("2x4", P(), "model", computed)
    trace("2x4", P(), "model", check_vma=False)  # where JAX does not know


def test_the_readers_recipes(capsys):
    """README.md's, and those of examples/meshes.md: under plain jit, and with `shard`."""
    root = Path(__file__).parents[1]

    def blocks(page):
        return re.findall(r"```python\n(.*?)```", (root / page).read_text(), re.DOTALL)

    (ten_lines,) = [block for block in blocks("README.md") if "make_mesh" in block]
    exec(ten_lines, {})
    assert capsys.readouterr().out.strip() == re.findall(r"print.*  # (.*)", ten_lines)[0]

    def transformer(params, tokens):
        return jax.nn.one_hot(tokens, N) @ params["embedding"]

    plain, with_shard = blocks("examples/meshes.md")
    names = {"jax": jax, "jax_sce": jax_sce, "transformer": transformer}
    floats, ids = arguments("linear", plain=True)[0], labels("integer")
    params = {"embedding": floats["hidden"], "head": floats["kernel"]}
    loss = functools.partial(linear_softmax_cross_entropy, reduction="mean")
    want = jax.jit(jax.value_and_grad(lambda p: loss(p["embedding"], p["head"], ids)))(params)

    exec(plain, names)
    mesh, _ = make_mesh("2x4")
    split = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (np.arange(N), ids))
    head = jax.device_put(params["head"], NamedSharding(mesh, P(None, "model")))
    assert_close(names["value_and_gradient"](params | {"head": head}, *split), want)

    exec(with_shard, names)
    by_shard = jax.jit(functools.partial(names["loss"], reduction="mean"))
    assert_close(by_shard(params["embedding"], params["head"], ids), want[0])


# -- what crosses -------------------------------------------------------------------------------------


def compiled(fn, *arrays):
    """A value and its gradients by the float arrays, which come back as they are laid out."""
    floats = tuple(i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating))
    out = (None, tuple(arrays[i].sharding for i in floats))
    return jax.jit(jax.value_and_grad(fn, floats), out_shardings=out).lower(*arrays).compile()


def laid_out(mesh, dtype, shape, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize("kernel_spec", [(None, "model"), ("data", "model")])
def test_of_a_head_row_statistics_cross_and_each_gradient_once(kernel_spec):
    n, d, v, chunk = 256, 32, 1024, 32
    mesh, classes = make_mesh("2x4")
    hidden = laid_out(mesh, jnp.float32, (n, d), "data")
    kernel = laid_out(mesh, jnp.float32, (d, v), *kernel_spec)
    loss = shard(linear_softmax_cross_entropy, mesh, classes=classes)
    fn = functools.partial(loss, reduction="mean", chunk_size=chunk)
    sent = collectives(compiled(fn, hidden, kernel, laid_out(mesh, jnp.int32, (n,), "data")))
    in_loop = [(x.kind, x.bytes) for x in sent if x.in_loop]
    # The maximum; and the tail, the leaders and the label's distance.
    assert sorted(in_loop) == [("all-reduce", chunk * 4), ("all-reduce", 3 * chunk * 4)]
    of_kernel, of_hidden = d * v // 4 * 4, n // 2 * d * 4
    rest = [(x.kind, x.bytes) for x in sent if not x.in_loop]
    gathers = [("all-gather", of_kernel)] if kernel_spec[0] else []
    assert [x for x in rest if x[0] == "all-gather"] == gathers
    sums = [size for kind, size in rest if kind == "all-reduce"]
    assert len(rest) == len(gathers) + len(sums)
    # The gradients, and the sum of the losses, which XLA may send with one of them.
    assert len(sums) in (2, 3)
    assert sum(sums) == of_hidden + of_kernel + 4


def test_a_chunk_on_a_mesh_is_as_small_as_asked():
    """Of 8 examples on each of 8 devices: the shard of one device is not laid out for eight."""
    mesh, classes = make_mesh("1x8")
    arrays = (
        laid_out(mesh, jnp.float32, (8, 4)),
        laid_out(mesh, jnp.float32, (4, 64), None, "model"),
        laid_out(mesh, jnp.int32, (8,)),
    )
    loss = shard(linear_softmax_cross_entropy, mesh, classes=classes)
    sent = collectives(compiled(functools.partial(loss, reduction="mean", chunk_size=2), *arrays))
    assert sorted(x.bytes for x in sent if x.in_loop) == [2 * 4, 3 * 2 * 4]


@pytest.mark.parametrize(("axes", "devices"), [((), 8), (("model",), 2), (("data", "model"), 1)])
def test_a_loop_in_plain_jax_has_a_shard_for_each_device_that_the_compiler_may_use(axes, devices):
    mesh, _ = make_mesh("2x4")
    found = set()

    def look(loop, x):
        found.add(loop.devices)
        return x

    run = functools.partial(_partition.by_loop, look)
    if axes:
        run = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=set(axes))
    jax.jit(run).lower(jnp.ones(16))
    assert found == {devices}


@pytest.mark.parametrize(
    ("meshes", "kernel_spec"),
    [
        ([(2, 1), (4, 1), (8, 1)], (None, "model")),
        ([(1, 2), (1, 4), (1, 8)], (None, "model")),
        ([(2, 2), (4, 2), (2, 4)], (None, "model")),
        ([(2, 2), (4, 2), (2, 4)], ("data", "model")),
    ],
)
def test_what_a_device_holds_and_sends_does_not_grow_with_the_mesh(meshes, kernel_spec):
    """As many examples and classes on each device, on more and more devices."""
    n, d, v, chunk = 64, 32, 128, 16

    def held_and_sent(shape):
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
        arrays = (
            laid_out(mesh, jnp.float32, (n * shape[0], d), "data", None),
            laid_out(mesh, jnp.float32, (d, v * shape[1]), *kernel_spec),
            laid_out(mesh, jnp.int32, (n * shape[0],), "data"),
        )
        loss = shard(linear_softmax_cross_entropy, mesh, classes="model")
        fn = compiled(functools.partial(loss, reduction="mean", chunk_size=chunk), *arrays)
        memory = fn.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        sent = sum(x.bytes * (n // chunk if x.in_loop else 1) for x in collectives(fn))
        return held + memory.temp_size_in_bytes, sent

    held, sent = zip(*map(held_and_sent, meshes), strict=True)
    # The devices' numbers are a few bytes more; an array that were whole on each, of [n, d], 8 KiB.
    assert max(held) <= held[0] + 1024
    assert max(sent) <= sent[0]


def test_each_device_sums_its_part_of_a_kernel_whose_layout_is_known():
    n, d, v = 256, 32, 1024
    mesh, classes = make_mesh("2x4", AxisType.Explicit)
    hidden = laid_out(mesh, jnp.float32, (n, d), "data", None)
    kernel = laid_out(mesh, jnp.float32, (d, v), "data", "model")
    with jax.set_mesh(mesh):
        loss = functools.partial(
            shard(linear_softmax_cross_entropy, classes=classes), reduction="sum"
        )
        program = compiled(loss, hidden, kernel, laid_out(mesh, jnp.int32, (n,), "data"))
    of_kernel = d * v // 4 * 4
    crossing = sorted(x.kind for x in collectives(program) if x.bytes == of_kernel)
    assert crossing == ["all-gather", "reduce-scatter"]


def test_of_logits_row_statistics_cross_in_the_forward_pass_and_nothing_in_the_backward_pass():
    n, v = 256, 1024
    mesh, classes = make_mesh("2x4")
    fn = functools.partial(shard(INTEGER, mesh, classes=classes), reduction="mean")
    z = laid_out(mesh, jnp.float32, (n, v), "data", "model")
    sent = collectives(compiled(fn, z, laid_out(mesh, jnp.int32, (n,), "data")))
    assert sorted(x.bytes for x in sent) == [4, n // 2 * 4, 3 * n // 2 * 4]


@pytest.mark.parametrize("spec", [("data", "model"), ("data", None), (None, "model")])
def test_plain_jit_gathers_no_logits(spec):
    n, v = 256, 4096
    mesh, _ = make_mesh("2x4")
    z = laid_out(mesh, jnp.float32, (n, v), *spec)
    fn = functools.partial(INTEGER, reduction="mean")
    sent = collectives(compiled(fn, z, laid_out(mesh, jnp.int32, (n,), spec[0])))
    assert sum(x.bytes for x in sent) < n * v * 4 / 8 / 4  # of the logits on each device
