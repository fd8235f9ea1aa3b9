"""The seam: which code a program is compiled with, on one device and on many."""

import functools
import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from support import DENSE, INTEGER, TOLERANCE, covering, exact_loss, rng

from jax_sce import _backend, _chunks, _partition, native
from jax_sce._backend import Backend
from jax_sce.testing import collectives

N, V = 16, 512
LOGITS = rng(60).normal(0, 2, (N, V)).astype(np.float32)
LABELS = rng(61).integers(0, V, N, dtype=np.int32)
LOSSES = exact_loss(LOGITS, LABELS)
HIGHEST = 64.0  # above them all

# -- which code is chosen -----------------------------------------------------------------------------


class Marked:
    """An implementation of `label_statistics` by which every loss is that number. It keeps the
    shapes of the logits that it was lowered for."""

    def __init__(self, loss):
        self.loss, self.shapes = loss, []

    def __call__(self, rows, labels):
        self.shapes.append(rows.logits.shape)
        zeros = jnp.zeros(rows.row_shape, rows.dtype)
        return zeros + HIGHEST, zeros, zeros + HIGHEST - self.loss


def step(z, y):
    return jax.value_and_grad(lambda z: INTEGER(z, y, reduction="mean"))(z)


@pytest.fixture
def kernel():
    return Marked(5.0)


@pytest.fixture
def form():
    return Marked(7.0)


@pytest.fixture
def use(monkeypatch):
    """Have a platform compute `label_statistics` by these functions, and all else in plain JAX."""

    def use(kernel=None, form=None, supports=lambda *_: True, platform="cpu"):
        kernels, forms = ({"label_statistics": f} if f else {} for f in (kernel, form))
        is_known = platform in _backend.BACKENDS
        backend = Backend(kernels, supports, forms, _chunks.LOOP)
        monkeypatch.setitem(_backend.BACKENDS, platform, backend)
        if not is_known:
            forget()

    def forget():
        """The primitives, which know the platforms, and the traces in which they are."""
        _backend._primitive.cache_clear()
        jax.clear_caches()

    known = set(_backend.BACKENDS)
    yield use
    forgets = set(_backend.BACKENDS) != known
    monkeypatch.undo()
    if forgets:
        forget()


def fresh(fn):
    """A function that nothing has compiled before."""
    return jax.jit(lambda *args: fn(*args))


def losses(z=LOGITS, y=LABELS, **options):
    return fresh(functools.partial(INTEGER, **options))(z, y)


def test_a_kernel_is_called_for_its_operation_alone(use, kernel, form):
    use(kernel, form)
    value, gradient = fresh(step)(LOGITS, LABELS)
    assert value == 5
    assert kernel.shapes == [(N, V)]
    assert form.shapes == []
    # The cotangent is of plain JAX, given those statistics.
    elsewhere = np.arange(V) != LABELS[:, None]
    want = np.exp(LOGITS - HIGHEST) / N
    np.testing.assert_allclose(gradient[elsewhere], want[elsewhere], rtol=1e-5)


def test_a_kernel_is_asked_what_it_computes(use, kernel, form):
    """With the arguments of the operation, which are only shapes yet."""
    asked = []

    def supports(operation, rows, *args):
        asked.append((operation, rows.logits.shape, rows.softcap is None))
        return rows.softcap is None

    use(kernel, form, supports)
    np.testing.assert_array_equal(losses(), 5)
    np.testing.assert_array_equal(losses(softcap=30.0), 7)
    assert asked == [
        ("label_statistics", (N, V), True),
        ("label_statistics", (N, V), False),
    ]


@pytest.mark.parametrize("what", ["neither", "declined", "no such platform"])
def test_where_there_is_nothing_else_it_is_the_plain_form(use, kernel, what, monkeypatch):
    use(kernel if what == "declined" else None, supports=lambda *_: False)
    if what == "no such platform":
        monkeypatch.delitem(_backend.BACKENDS, "cpu")
    np.testing.assert_allclose(losses(), LOSSES, rtol=TOLERANCE["loss"])
    assert kernel.shapes == []


@pytest.mark.parametrize("declined", [False, True])
def test_a_form_is_used_where_there_is_no_kernel(use, kernel, form, declined):
    use(kernel if declined else None, form, lambda *_: not declined)
    np.testing.assert_array_equal(losses(), 7)


def test_each_platform_has_its_own(use, kernel, form):
    """In one program for both, too. Nothing is known of a third."""
    use(form=form)
    use(kernel, platform="tpu")
    traced = fresh(INTEGER).trace(LOGITS, LABELS)
    traced.lower(lowering_platforms=("cpu", "tpu"))
    assert (len(kernel.shapes), len(form.shapes)) == (1, 1)
    traced.lower(lowering_platforms=("rocm",))
    assert (len(kernel.shapes), len(form.shapes)) == (1, 1)


def test_vmap_is_one_call_of_more_rows(use, kernel):
    use(kernel)
    z = np.stack([LOGITS, LOGITS])
    np.testing.assert_array_equal(fresh(jax.vmap(lambda z: INTEGER(z, LABELS)))(z), 5)
    assert kernel.shapes == [(2, N, V)]


def test_an_exported_program_has_the_form(use, kernel, form):
    """For it must run where there is no kernel."""
    use(kernel, form)
    exported = jax.export.export(fresh(INTEGER))(LOGITS, LABELS)
    np.testing.assert_array_equal(exported.call(LOGITS, LABELS), 7)
    assert kernel.shapes == []


# -- which code is chosen on many devices -------------------------------------------------------------


def make_mesh(sizes, axis_type=AxisType.Auto):
    names = ("data", "model", "more")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes))


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def test_each_device_calls_the_kernel_for_its_own_rows(use, kernel, form):
    use(kernel, form)
    np.testing.assert_array_equal(losses(put(LOGITS, make_mesh((4, 2)), "data")), 5)
    assert (N // 4, V) in kernel.shapes
    assert form.shapes == []


def test_where_the_classes_are_split_the_form_computes_each_part(use, kernel, form):
    """By the marks every part is one class, and that of the label e^-7."""
    use(kernel, form)
    got = losses(put(LOGITS, make_mesh((4, 2)), "data", "model"))
    np.testing.assert_allclose(got, 7 + np.log(2), rtol=TOLERANCE["rounded"])
    assert (N // 4, V // 2) in form.shapes


def test_inside_shard_map_each_device_calls_the_kernel(use, kernel, form):
    use(kernel, form)
    spec = P(("data", "model"))
    split = jax.shard_map(INTEGER, mesh=make_mesh((4, 2)), in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(fresh(split)(LOGITS, LABELS), 5)
    assert kernel.shapes == [(N // 8, V)]


def test_inside_a_shard_map_over_some_axes_it_is_the_form(use, kernel, form):
    use(kernel, form)
    split = jax.shard_map(
        INTEGER,
        mesh=make_mesh((4, 2)),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    np.testing.assert_array_equal(fresh(split)(LOGITS, LABELS), 7)
    assert kernel.shapes == []


def test_on_explicit_axes_it_is_no_kernel(use, kernel):
    use(kernel)
    mesh = make_mesh((4, 2), AxisType.Explicit)
    with jax.set_mesh(mesh):
        got = losses(put(LOGITS, mesh, "data"), put(LABELS, mesh, "data"))
    np.testing.assert_allclose(got, LOSSES, rtol=TOLERANCE["loss"])
    assert kernel.shapes == []


def test_classes_on_several_axes_are_not_split_by_a_kernel(use, kernel, form):
    use(kernel, form)
    z = put(LOGITS.reshape(N, 8, 64), make_mesh((4, 2)), "data")
    np.testing.assert_array_equal(losses(z, axis=(1, 2)), 7)
    assert kernel.shapes == []


@pytest.mark.parametrize("where", ["one device", "explicit axes", "second derivatives"])
def test_long_rows_keep_their_digits_everywhere(where):
    """Summed in turn, as XLA for CPU reduces, 8192 equal logits give a loss that is off by 100u."""
    z = np.full((8, 8192), 1.3, np.float32)
    if where == "explicit axes":
        z = put(z, make_mesh((8,), AxisType.Explicit), "data")

    def value_and_gradient(z):
        return jax.value_and_grad(lambda z: INTEGER(z, np.zeros(8, np.int32), reduction="sum"))(z)

    if where == "second derivatives":
        value = jax.jit(lambda z: jax.jvp(value_and_gradient, (z,), (z,))[0][0])(z)
    else:
        value = jax.jit(value_and_gradient)(z)[0]
    np.testing.assert_allclose(value, 8 * np.log(8192), rtol=TOLERANCE["loss"])


# -- what a later JAX may have moved ------------------------------------------------------------------


class Without:
    """An object, and what belongs to it, without that attribute."""

    def __init__(self, x, name):
        self._x, self._name = x, name

    def __getattr__(self, name):
        if name == self._name:
            raise AttributeError(name)
        x = getattr(self._x, name)
        inner = ("module_context", "lowering_parameters", "axis_context")
        return Without(x, self._name) if name in inner else x


@pytest.fixture
def hide(monkeypatch):
    """What the seam asks of the program that it compiles, without an attribute."""

    def hide(name):
        def without(choose, what, platform, context, tree):
            return choose(what, platform, Without(context, name), tree)[0], context

        for module in (_backend, _partition):
            hidden = functools.partial(without, module._choose)
            monkeypatch.setattr(module, "_choose", hidden)

    return hide


@functools.cache
def on_one_device():
    return jax.jit(step)(LOGITS, LABELS)


def assert_right(*args):
    """And return the lowered program."""
    lowered = fresh(step).lower(*args)
    assert_close(lowered.compile()(*args), on_one_device())
    return lowered.as_text()


def assert_close(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-9)


def arguments(split):
    if not split:
        return LOGITS, LABELS
    mesh = make_mesh((8,))
    return put(LOGITS, mesh, "data"), put(LABELS, mesh, "data")


@pytest.mark.parametrize("split", [False, True], ids=["one device", "many"])
@pytest.mark.parametrize(
    "name", ["module_context", "lowering_parameters", "for_export", "axis_context", "num_devices"]
)
def test_without_what_jax_does_not_tell_in_public_it_is_plain_jax(name, split, hide):
    on_one_device()
    hide(name)
    assert "custom_call" not in assert_right(*arguments(split))


def test_without_devices_to_split_over_it_is_plain_jax(monkeypatch):
    monkeypatch.setattr(_backend, "with_devices", lambda *_: None)
    assert "custom_call" not in assert_right(*arguments(split=True))


@pytest.mark.parametrize("split", [False, True], ids=["one device", "many"])
def test_if_the_mesh_is_not_told_the_compiler_splits_plain_jax(monkeypatch, split):
    def get_mesh():
        raise ValueError("not here")

    monkeypatch.setattr(jax.sharding, "get_mesh", get_mesh)
    text = assert_right(*arguments(split))
    assert not split or "custom_call" not in text


# -- split by the compiler ----------------------------------------------------------------------------

LONG = 4 * V
LONG_LOGITS = rng(62).normal(0, 2, (N, LONG)).astype(np.float32)
SPLITS = {
    (8,): [("data",), (None, "data")],
    (2, 4): [("data",), ("data", "model"), ("model", "data"), (None, ("model", "data"))],
    (4, 2): [("model",), ("data", "model"), ("model", "data"), (("model", "data"),)],
    (2, 2, 2): [
        ("more", "data"),
        (("data", "more"), "model"),
        ("model", ("more", "data")),
        (("more", "model", "data"),),
    ],
}


@functools.cache
def problem(kind):
    """A loss, and what it takes beside the logits, of the examples or of the logits' shape."""
    if kind == "dense":
        targets = rng(64).dirichlet(np.ones(LONG), N).astype(np.float32)
        return lambda z, y: DENSE(z, y, reduction="mean"), targets
    if kind == "ids":
        return lambda z, y: INTEGER(z, y, reduction="mean"), LABELS * 4
    mask = rng(63).random((N, LONG)) < 0.7
    mask[np.arange(N), LABELS] = True
    mask[3] = False
    options = {"label_smoothing": 0.1, "reduction": "mean"}
    return lambda z, mask: INTEGER(z, LABELS, where=mask, **options), mask


@functools.cache
def gradients_on_one_device(kind):
    loss, other = problem(kind)
    return jax.jit(jax.value_and_grad(loss))(LONG_LOGITS, other)


def assert_split(kind, mesh, spec, other_spec):
    loss, other = problem(kind)
    args = put(LONG_LOGITS, mesh, *spec), put(other, mesh, *other_spec)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    got = compiled(*args)
    assert_close(got, gradients_on_one_device(kind))
    assert got[1].sharding.is_equivalent_to(args[0].sharding, 2)
    # Of each example a few numbers; and without kernels the block of 64 that holds its maximum. A
    # device has 256 logits of each, and more.
    has_kernels = native.status().available
    few = 8 if has_kernels else 8 + 64
    assert max((x.bytes for x in collectives(compiled)), default=0) <= N * few * 4
    calls_kernels = has_kernels and (len(spec) == 1 or spec[1] is None)
    assert compiled.as_text().count('custom_call_target="jax_sce') == 2 * calls_kernels


@pytest.mark.parametrize(
    ("split", "kind"),
    covering(
        [(sizes, spec) for sizes, specs in SPLITS.items() for spec in specs],
        ["ids", "masked", "dense"],
        strength=1,
    ),
    ids=str,
)
def test_split_in_any_way_it_is_what_it_is_on_one_device(split, kind):
    """And nothing of the logits' size crosses: if the classes are split, numbers of each row do."""
    sizes, spec = split
    assert_split(kind, make_mesh(sizes), spec, spec[:1] if kind == "ids" else spec)


@pytest.mark.parametrize("which", ["reversed", "the last"])
def test_any_devices_in_any_order(which):
    devices = jax.devices()[::-1] if which == "reversed" else jax.devices()[4:]
    sizes = (4, 2) if which == "reversed" else (2, 2)
    mesh = Mesh(np.array(devices).reshape(sizes), ("data", "model"))
    for spec in (("model",), ("model", "data")):
        assert_split("ids", mesh, spec, spec[:1])


SIX = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_sce import softmax_cross_entropy_with_integer_labels as loss

draws = np.random.default_rng(0)
z = draws.normal(size=(12, 60)).astype(np.float32)
y = draws.integers(0, 60, 12, dtype=np.int32)
want = loss(z, y)
for sizes in ((6,), (2, 3), (3, 2)):
    names = ("data", "model")[:len(sizes)]
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    for spec in ((names,), ("data",), (None, "data"), names, names[::-1], (names[::-1],)):
        split = jax.device_put(z, NamedSharding(mesh, P(*spec)))
        np.testing.assert_allclose(jax.jit(loss)(split, y), want, rtol=1e-6)
"""


def test_six_devices_in_any_mesh():
    """Their number is no power of a prime: meshes of 3 x 2 and 2 x 3 split in different ways."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=6"}
    out = subprocess.run([sys.executable, "-c", SIX], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P("model", "data")], ids=str)
@pytest.mark.parametrize("kind", ["dense", "smoothed", "masked"])
def test_on_explicit_axes_targets_may_be_laid_out_otherwise(kind, spec):
    """Here every device has all of the targets and of the mask."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    draw = np.random.default_rng(7)
    z, y = draw.normal(size=(8, 40)).astype(np.float32), draw.integers(0, 13, 8, dtype=np.int32)
    p = draw.dirichlet(np.ones(40), 8).astype(np.float32)
    where = np.arange(40)[None] % 3 < 2

    def loss(z):
        if kind == "smoothed":
            return INTEGER(z, 3 * y, label_smoothing=0.1, softcap=5.0, reduction="mean")
        return DENSE(z, p, where=where if kind == "masked" else None, reduction="mean")

    step = jax.jit(jax.value_and_grad(loss))
    want = step(z)
    with jax.set_mesh(mesh):
        got = step(jax.device_put(z, NamedSharding(mesh, spec)))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-8)
