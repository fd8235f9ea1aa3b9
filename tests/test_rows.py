"""The statistics of a row are a commutative monoid, and exact."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support import BOTH, TOLERANCE, one_hot, rng, targets_of

from jax_sce import _backend, _cpu, _cross_entropy, _rows
from jax_sce._rows import Rows, Statistics

# As one reduction, in the forms that CPU has without kernels, and as the losses have them.
FORMS = {
    "one pass": _rows.label_statistics,
    "on CPU": _cpu.FORMS["label_statistics"],
    "seam": _backend.label_statistics,
}
OF_TARGETS = {
    "one pass": _rows.target_statistics,
    "on CPU": _cpu.FORMS["target_statistics"],
    "seam": _backend.target_statistics,
}
# XLA's compiler for CPU reduces one class after the other, and the bounds are for sums in pairs or
# blocks. So many equal terms keep to them in turn too, and some hundred that differ.
IN_TURN = 32


def of_sizes(*sizes, in_turn=IN_TURN):
    """Of each form and number of classes."""
    cases = [(form, n) for form in FORMS for n in sizes if form != "one pass" or n <= in_turn]
    return pytest.mark.parametrize(("form", "num_classes"), cases)


of_forms = pytest.mark.parametrize("form", FORMS)

EMPTY = jnp.array([-jnp.inf]), jnp.array([0.0])

# Few distinct values, so that ties within and across sets are common; and any others.
logit = st.one_of(st.integers(-3, 3).map(float), st.floats(-80, 80, width=32))
logits = st.lists(logit, min_size=4, max_size=4).map(lambda z: np.array([z], np.float32))
by_hypothesis = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def rows(z, softcap=None, mask=None, axes=(-1,), temperature=None):
    softcap = None if softcap is None else jnp.float32(softcap)
    view = _cross_entropy.rows_of(jnp.asarray(z), axes, None, softcap, temperature)
    return dataclasses.replace(view, mask=mask)


@functools.cache
def compiled(function):
    return jax.jit(lambda *args: function(*args))


def statistics(form, z, labels=0, **view):
    """The maximum and the tail, and the logit at the label, [N...] each."""
    view = rows(z, **view)
    labels = jnp.broadcast_to(jnp.asarray(labels, jnp.int32), view.row_shape)
    out = compiled(FORMS[form])(view, labels)
    return tuple(jnp.squeeze(x, view.axes) for x in out[:3])


merge = jax.jit(_rows.merge)


@jax.jit
def elements(z):
    """`(max, others)` of the classes on the last axis: each is a set, and `merge` reduces them."""
    neutral = np.float32(-np.inf), np.float32(0)
    return jax.lax.reduce((z, jnp.zeros_like(z)), neutral, _rows.merge, (z.ndim - 1,))


def tail_of(element):
    highest, others = element
    return highest, others * jnp.exp(_rows.reference(highest) - highest)


def exact(z):
    """(max, tail) in float64, the tail summed without one entry at the maximum."""
    z = np.asarray(z, np.float64)
    highest = z.max(-1)
    exponentials = np.exp(z - highest[..., None])
    np.put_along_axis(exponentials, z.argmax(-1)[..., None], 0.0, -1)
    return highest, exponentials.sum(-1)


def assert_same(got, want, rtol=TOLERANCE["rounded"]):
    """The maximum is a logit, so it is equal; the tail is relatively close, however small.

    (Each class that underflows may be missing from it: there are up to 131072 of them.)
    """
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=rtol, atol=1e5 * TOLERANCE["underflow"])


# -- merge ---------------------------------------------------------------------------------------


@by_hypothesis
@given(logits, logits)
def test_merge_is_commutative(a, b):
    a, b = elements(a), elements(b)
    assert_same(merge(a, b), merge(b, a))


@by_hypothesis
@given(logits, logits, logits)
def test_merge_is_associative(a, b, c):
    a, b, c = elements(a), elements(b), elements(c)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


@by_hypothesis
@given(logits)
def test_merge_with_the_empty_set_changes_nothing(a):
    a = elements(a)
    for merged in (merge(a, EMPTY), merge(EMPTY, a)):
        np.testing.assert_array_equal(merged[0], a[0])
        # What is below the smallest normal number may be flushed to zero.
        np.testing.assert_allclose(merged[1], a[1], rtol=0, atol=TOLERANCE["underflow"])


def test_two_empty_sets_are_empty():
    assert_same(merge(EMPTY, EMPTY), EMPTY, rtol=0)


@by_hypothesis
@given(logits, logits)
def test_chunks_merge_to_the_whole(a, b):
    whole = np.concatenate([a, b], -1)
    merged = tail_of(merge(elements(a), elements(b)))
    assert_same(merged, exact(whole), rtol=2 * _exponent_error(whole))


def test_chunks_of_any_size_in_any_order_merge_to_the_whole():
    z = rng(1).normal(0, 10, (5, 60)).astype(np.float32)
    z[:, [3, 17, 59]] = z.max()  # ties across the chunks
    for cuts in ([20, 40], [5, 25, 45], list(range(1, 60))):
        chunks = np.split(z, cuts, -1)
        for order in (chunks, chunks[::-1]):
            merged = tail_of(functools.reduce(merge, map(elements, order)))
            assert_same(merged, exact(z), rtol=2 * _exponent_error(z))


@pytest.mark.usefixtures("x64", "lax_promotion")
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
def test_roundings_of_rescaling_do_not_pile_up(order):
    """Each class is hardly above the one before, so that the maximum moves 8192 times. The sums are
    in float64, to leave what the merges round. (Rescaled to every maximum, that would be 400u.)"""
    z = np.arange(8192, dtype=np.float32) * np.float32(1e-3)
    z = {"rising": z, "falling": z[::-1], "random": rng(13).permutation(z)}[order]

    @jax.jit
    def merged(z):
        def step(element, x):
            return _rows.merge(element, (x, jnp.zeros_like(element[1]))), None

        return jax.lax.scan(step, (jnp.float32(-jnp.inf), jnp.float64(0)), z)[0]

    assert_same(tail_of(merged(z)), exact(z), rtol=TOLERANCE["loss"])


@of_forms
def test_a_single_class_is_its_own_maximum_with_nothing_beside_it(form):
    assert_same(statistics(form, np.array([[3.0]], np.float32)), ([3.0], [0.0]), rtol=0)


# -- statistics ----------------------------------------------------------------------------------


def _exponent_error(z):
    """An exponent of size d is rounded to d * 2^-24, and the rest is a few roundings."""
    finite = np.where(np.isfinite(z), z, 0)
    return (6 + min(np.ptp(finite), 90)) * 2.0**-24


@of_sizes(2, 3, 16, 32, 33, 64, 65, 127, 128, 1000, 50257, 131072, in_turn=1000)
def test_statistics_are_exact_at_any_number_of_classes(form, num_classes):
    z = rng(num_classes).normal(0, 2, (3, num_classes)).astype(np.float32)
    z[1, num_classes // 2] = 60.0  # confident: a tail of 1e-22
    assert_same(statistics(form, z), exact(z), rtol=_exponent_error(z[0]) + 60 * 2.0**-24)


@of_sizes(2, 3, 16, 32, 33, 64, 128, 255, 256, 1000, 4096, 50257, 131072, in_turn=128)
@pytest.mark.parametrize(
    "order", ["random", "rising", "falling", "hardly rising", "hardly falling"]
)
def test_the_bound_holds_in_any_order_of_the_classes(form, num_classes, order):
    random = rng(num_classes).normal(0, 2, (3, num_classes))
    steps = np.arange(num_classes) * 1e-3 + rng(14).uniform(-1, 1, (3, 1))
    z = {
        "random": random,
        "rising": np.sort(random),
        "falling": np.sort(random)[:, ::-1],
        "hardly rising": steps,
        "hardly falling": steps[:, ::-1],
    }[order].astype(np.float32)
    assert_same(statistics(form, z), exact(z), rtol=TOLERANCE["loss"])


@of_forms
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, -1e6, 1e8, -1e8])
def test_a_common_offset_costs_nothing(form, offset):
    z = (offset + rng(2).normal(0, 30, (4, 33))).astype(np.float32)
    assert_same(statistics(form, z), exact(z), rtol=_exponent_error(z - np.float32(offset)))


@of_sizes(2, 32, 512)
def test_the_rounding_of_long_distances_is_not_in_the_tail(form, num_classes):
    """The maximum is anywhere, and the others so far below it that the distances are rounded."""
    top = rng(10).uniform(-40, 40, (500, 1))
    z = np.concatenate([top, top - rng(11).uniform(20, 80, (500, num_classes - 1))], -1)
    z = z.astype(np.float32)
    assert_same(statistics(form, z), exact(z), rtol=TOLERANCE["loss"])


@of_sizes(7, 256, in_turn=256)
@pytest.mark.parametrize("ties", [2, 3, 7])
def test_ties_are_each_counted(form, num_classes, ties):
    z = np.full((2, num_classes), -100.0, np.float32)
    z[0, :ties] = 5.0
    z[1, -ties:] = 5.0
    highest, tail, _ = statistics(form, z)
    np.testing.assert_array_equal(highest, 5.0)
    np.testing.assert_allclose(tail, ties - 1, rtol=1e-7)


@of_forms
def test_all_classes_tied_at_any_size(form):
    highest, tail, _ = statistics(form, np.full((3, 131072), 1e8, np.float32))
    np.testing.assert_array_equal(highest, np.float32(1e8))
    np.testing.assert_array_equal(tail, 131071.0)


@of_forms
def test_absent_classes_add_nothing(form):
    z = np.array([[-np.inf, 1.0, -np.inf, 0.5]], np.float32)
    assert_same(statistics(form, z), exact(z[:, [1, 3]]))


@of_sizes(32, 65, 257, 1024, in_turn=65)
def test_absent_classes_add_nothing_wherever_they_are(form, num_classes):
    """At the end, as those that pad a vocabulary, at the start, or all but one."""
    z = rng(9).normal(size=(5, num_classes)).astype(np.float32)
    z[0, -1] = z[1, num_classes // -2 :] = z[2, :-1] = z[3, : num_classes // 2] = z[4, 1:] = -np.inf
    assert_same(statistics(form, z), exact(z), rtol=TOLERANCE["loss"])


@of_sizes(5, 32, 256)
def test_masked_classes_add_nothing_whatever_they_hold(form, num_classes):
    """Not a larger logit, NaN or infinity; if the mask is one for all rows, or each has its own."""
    z = rng(15).normal(size=(3, num_classes)).astype(np.float32)
    own = rng(16).random(z.shape) < 0.7
    own[:, :2], own[:, 2] = True, False
    for mask in (own, own[:1]):
        full = np.broadcast_to(mask, z.shape)
        hidden = np.where(full, z, np.float32(np.resize([np.nan, np.inf, 99, -np.inf], z.shape)))
        for axis in (-1, -2):
            hidden, mask = (np.moveaxis(x, -1, axis) for x in (hidden, mask))
            got = statistics(form, hidden, 1, mask=jnp.asarray(mask), axes=(axis,))
            assert_same(got, exact(np.where(full, z, -np.inf)), rtol=TOLERANCE["loss"])
            np.testing.assert_array_equal(got[2], z[:, 1])
            got = statistics(form, hidden, 2, mask=jnp.asarray(mask), axes=(axis,))
            np.testing.assert_array_equal(got[2], -np.inf)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("axis", [-1, -2])
@of_sizes(5, 40, 100, 300, in_turn=100)
def test_a_bad_logit_spoils_its_row_alone(form, num_classes, axis, bad):
    """Wherever it stands."""
    z = rng(3).normal(size=(num_classes + 2, num_classes)).astype(np.float32)
    np.fill_diagonal(z[:num_classes], bad)
    tail = statistics(form, z if axis == -1 else z.T, axes=(axis,))[1]
    assert np.all(np.isnan(tail[:num_classes]))
    np.testing.assert_allclose(
        tail[num_classes:], exact(z[num_classes:])[1], rtol=TOLERANCE["loss"]
    )


@of_sizes(5, 256, in_turn=256)
def test_a_row_of_absent_classes_has_no_statistics(form, num_classes):
    z = rng(17).normal(size=(3, num_classes)).astype(np.float32)
    z[1] = -np.inf
    highest, tail, _ = statistics(form, z)
    np.testing.assert_array_equal(np.isneginf(highest), [False, True, False])
    np.testing.assert_array_equal(np.isnan(tail), [False, True, False])


@pytest.mark.parametrize("num_classes", [1009, 1024])
@pytest.mark.parametrize(
    ("dtype", "softcap"), [(jnp.float32, None), (jnp.bfloat16, None), (jnp.bfloat16, 3.0)]
)
def test_rows_read_in_blocks_and_at_once_agree(dtype, softcap, num_classes):
    z = jnp.asarray(rng(4).normal(0, 5, (5, num_classes)), dtype)
    z = z.at[1, 7].set(70.0).at[2, :].set(0.0).at[3, [0, 500, 1023]].set(50.0)
    z = z.at[4, :1000].set(-jnp.inf)
    at_once, largest = compiled(_cpu._at_once)(rows(z, softcap))
    in_blocks, largest_too = compiled(_cpu._in_blocks)(rows(z, softcap))
    assert_same(in_blocks, at_once, rtol=TOLERANCE["loss"])
    np.testing.assert_array_equal(largest, largest_too)
    np.testing.assert_array_equal(largest, jnp.max(z, -1).astype(jnp.float32))


@of_forms
@pytest.mark.parametrize("option", ["softcap", "temperature"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_classes", [32, 33])
def test_the_statistics_are_of_capped_and_tempered_logits(form, num_classes, masked, option):
    """And the label's logit is at the maximum if it was so before, however the cap is rounded."""
    z = rng(18).normal(0, 5, (64, num_classes)).astype(np.float32)
    labels = np.where(np.arange(64) % 2, z.argmax(-1), 0).astype(np.int32)
    logits, view = z, {option: 3.0 if option == "softcap" else jnp.full(64, 3.0)}
    if masked:  # the largest class, and the label of the first row
        logits = np.concatenate([z, np.full((64, 1), 99, z.dtype)], axis=-1)
        view["mask"] = jnp.arange(num_classes + 1)[None] < num_classes
        labels[0] = num_classes
    out = statistics(form, logits, labels[:, None], **view)
    if masked:
        assert np.isneginf(out[2][0])
        *out, z, labels = (x[1:] for x in (*out, z, labels))
    highest, tail, at_label = out
    want = z.astype(np.float64) / 3
    want = 3 * np.tanh(want) if option == "softcap" else want
    # The cap is rounded some five times, a quotient once.
    error = (5 if option == "softcap" else 1) * np.abs(want).max() * 2.0**-24
    np.testing.assert_allclose(highest, want.max(-1), rtol=0, atol=error)
    np.testing.assert_allclose(tail, exact(want)[1], rtol=TOLERANCE["loss"] + 2 * error)
    picked = np.take_along_axis(want, labels[:, None], -1)[:, 0]
    np.testing.assert_allclose(at_label, picked, rtol=0, atol=error)
    is_largest = labels == z.argmax(-1)
    np.testing.assert_array_equal(at_label[is_largest], highest[is_largest])
    assert np.all(at_label <= highest)


@of_forms
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_long_rows_of_any_rank(form, batch):
    num_classes = IN_TURN if form == "one pass" else 1009
    z = rng(12).normal(0, 5, (*batch, num_classes)).astype(np.float32)
    assert_same(statistics(form, z), exact(z), rtol=TOLERANCE["loss"])


@of_forms
def test_the_log_normalizer_is_within_2_to_the_minus_22_of_the_larger_of_it_and_one(form):
    z = np.stack([scale * rng(5).normal(size=100) for scale in (1e-3, 1.0, 100.0)])
    z = np.concatenate([z, z - z.max(-1, keepdims=True), z + 1e6]).astype(np.float32)
    highest, tail = exact(z)
    want = highest + np.log1p(tail)
    got = Statistics(*statistics(form, z)[:2]).log_normalizer()
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    np.testing.assert_array_less(error, 2.0**-22)


@of_forms
@pytest.mark.parametrize("axes", [(-1,), (-3,), (-2, -1), (-1, -3), (-3, -2, -1)], ids=str)
def test_classes_on_several_axes_are_flattened_in_the_order_given(form, axes):
    z = rng(6).normal(size=(2, 3, 4)).astype(np.float32)
    batch = [a for a in (-3, -2, -1) if a not in axes]
    flat = z.transpose(*batch, *axes).reshape(*(z.shape[a] for a in batch), -1)
    labels = rng(19).integers(0, flat.shape[-1], flat.shape[:-1])
    got = statistics(form, z, np.expand_dims(labels, axes), axes=axes)
    assert_same(got, exact(flat), rtol=TOLERANCE["loss"])
    picked = np.take_along_axis(flat, labels[..., None], -1)[..., 0]
    np.testing.assert_array_equal(got[2], picked)
    ids = np.broadcast_to(rows(z, axes=axes).classes(), z.shape).transpose(*batch, *axes)
    np.testing.assert_array_equal(ids.reshape(flat.shape), np.indices(flat.shape)[-1])


def test_statistics_differentiate_as_the_sum_of_exponentials_does(x64):
    z = jnp.asarray(rng(7).normal(size=(2, 3, 6)))
    z_dot = jnp.asarray(rng(8).normal(size=(2, 3, 6)))
    labels = rng(20).integers(0, 6, (2, 3))
    stats, stats_dot = jax.jvp(lambda z: statistics("seam", z, labels[..., None]), (z,), (z_dot,))
    # d log S = o . dz, whatever part of it `max` and `tail` each carry.
    got = stats_dot[0] + stats_dot[1] / (1 + stats[1])
    want = np.sum(jax.nn.softmax(z) * z_dot, -1)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE["float64"])
    # And of the distance z_y - max likewise, where `max` is held constant.
    picked = np.take_along_axis(np.asarray(z_dot), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(stats_dot[2] - stats_dot[0], picked, rtol=TOLERANCE["float64"])


@pytest.mark.parametrize("form", ["one pass", "on CPU"])
def test_the_label_stays_at_the_maximum_where_its_soft_cap_is_rounded_otherwise(form, monkeypatch):
    """As a compiler may round it, simulated: smaller for the logit of the label alone."""

    def of_raw(self, x):
        return x * (0.5 if x.shape[-1] > 1 else 0.499)

    monkeypatch.setattr(Rows, "of_raw", of_raw)
    view = rows(np.array([[1, 2, 2], [1, 2, 2]], np.float32), softcap=3.0)
    highest, _, at_label, *_ = FORMS[form](view, jnp.array([[0], [1]], jnp.int32))
    np.testing.assert_array_equal(highest, [[1], [1]])
    np.testing.assert_allclose(at_label, [[0.499], [1]], rtol=TOLERANCE["rounded"])
    assert at_label[1] == highest[1]


# -- distributions -------------------------------------------------------------------------------


@of_sizes(2, 32, 64, 300)
@pytest.mark.parametrize("kind", ["dense", "ids", "smoothed"])
def test_the_sums_of_targets_are_exact(form, num_classes, kind):
    """In rows whose maximum is the last, and in others. Absent classes without mass add nothing."""
    z = rng(21).normal(0, 4, (6, num_classes))
    z[:3] = np.sort(z[:3])
    z = z.astype(np.float32)
    y = rng(22).random(z.shape).astype(np.float32)
    if kind != "smoothed":
        z[0, 0] = -np.inf
        y[0, 0] = 0
    if kind != "dense":
        labels = rng(23).integers(1, num_classes, 6)
        y = one_hot(labels, num_classes)
    smoothing = jnp.full((1, 1), 0.1) if kind == "smoothed" else None
    given = jnp.asarray(y) if kind == "dense" else jnp.asarray(labels[:, None], jnp.int32)
    targets = targets_of(given, smoothing, jnp.full((1, 1), 1 / num_classes), None)
    got = [x[:, 0] for x in compiled(OF_TARGETS[form])(rows(z), targets)]

    y = y.astype(np.float64)
    if kind == "smoothed":
        y = 0.9 * y + 0.1 / num_classes
    distance = z.astype(np.float64) - z.max(-1, keepdims=True)
    cost = y * np.where(y == 0, 0, distance)
    assert_same(got, exact(z), rtol=TOLERANCE["loss"])
    np.testing.assert_allclose(got[2], y.sum(-1), rtol=TOLERANCE["loss"])
    np.testing.assert_allclose(got[3], cost.sum(-1), rtol=TOLERANCE["loss"])


@of_sizes(3, 300, in_turn=300)
def test_mass_on_an_absent_class_is_infinitely_far(form, num_classes):
    z = np.zeros((2, num_classes), np.float32)
    z[0, 1] = -np.inf
    targets = targets_of(jnp.ones_like(z), None, jnp.full((1, 1), 1 / num_classes), None)
    out = compiled(OF_TARGETS[form])(rows(z), targets)
    np.testing.assert_array_equal(out[3][:, 0], [-np.inf, 0])


@of_sizes(3, 300, in_turn=300)
def test_a_row_of_masked_classes_has_no_mass(form, num_classes):
    """Of a row split over devices, one may hold none but those that pad a vocabulary."""
    z = np.zeros((2, num_classes), np.float32)
    mask = jnp.asarray(np.array([[True], [False]]) & (np.arange(num_classes) > 0))
    targets = targets_of(jnp.ones_like(z), None, jnp.full((1, 1), 1 / num_classes), None)
    highest, tail, mass, dot, kept = compiled(OF_TARGETS[form])(rows(z, mask=mask), targets)
    np.testing.assert_array_equal(highest[:, 0], [0, -np.inf])
    np.testing.assert_array_equal(np.isnan(tail[:, 0]), [False, True])
    np.testing.assert_array_equal(mass[:, 0], [num_classes - 1, 0])
    np.testing.assert_array_equal(dot[:, 0], [0, 0])
    np.testing.assert_array_equal(kept[:, 0], [1, 0])


@of_sizes(3, 40, 300, in_turn=300)
@pytest.mark.parametrize("axis", [-1, -2])
def test_all_rows_may_share_their_targets(form, num_classes, axis):
    """As under `jax.vmap` over models."""
    z = np.zeros((5, num_classes), np.float32)
    y = np.full((1, num_classes), 0.5, np.float32)
    if axis == -2:
        z, y = z.T, y.T
    targets = targets_of(jnp.asarray(y), None, jnp.full((1, 1), 1 / num_classes), None)
    out = compiled(OF_TARGETS[form])(rows(z, axes=(axis,)), targets)
    for got, want in zip(out, (0, num_classes - 1, num_classes / 2, 0), strict=True):
        np.testing.assert_array_equal(got, np.full_like(got, want))
        assert got.size == 5


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("form", OF_TARGETS)
def test_masked_classes_are_left_out_of_the_sums_of_targets(form, axis):
    z = np.array([[9, 1, 2, 0.5], [1, 3, 3, 9]], np.float32)
    y = np.array([[4, 0.5, 0, 2], [1, 0.25, 3, 8]], np.float32)
    keep = np.array([[False, True, True, True], [True, True, True, False]])
    logits, mask, dense = (jnp.moveaxis(x, -1, axis) for x in (z, keep, y))
    targets = targets_of(dense, None, jnp.full((1, 1), 1 / 3), None)
    got = compiled(OF_TARGETS[form])(rows(logits, mask=mask, axes=(axis,)), targets)
    got = [x.squeeze(axis) for x in got]
    z, y = (x[keep].reshape(2, 3).astype(np.float64) for x in (z, y))
    dot = (y * (z - z.max(-1, keepdims=True))).sum(-1)
    assert_same(got, exact(z), rtol=TOLERANCE["loss"])
    for x, want in zip(got[2:], (y.sum(-1), dot, [1, 1]), strict=True):
        np.testing.assert_allclose(x, want, rtol=TOLERANCE["loss"])


def test_chunks_of_targets_merge_to_the_whole():
    """As on a GPU, which reduces parts of a row side by side."""

    @jax.jit
    def elements(z, y):
        operands = z, jnp.zeros_like(z), y, jnp.zeros_like(y), jnp.isfinite(z).astype(z.dtype)
        neutral = tuple(map(np.float32, (-np.inf, 0, 0, 0, 0)))
        return jax.lax.reduce(operands, neutral, _rows._merge_targets, (1,))

    z = rng(24).normal(0, 4, (5, 24)).astype(np.float32)
    y = rng(25).random(z.shape).astype(np.float32)
    z[:, [3, 9, 23]] = z.max()  # ties across the chunks
    z[:2, :12], y[:2, :12] = -np.inf, 0
    distance = z.astype(np.float64) - z.max(-1, keepdims=True)
    dot = (y * np.where(y == 0, 0, distance)).sum(-1)
    for cuts in ([8, 16], [12], list(range(1, 24))):
        chunks = [elements(*x) for x in zip(*(np.split(x, cuts, -1) for x in (z, y)), strict=True)]
        for order in (chunks, chunks[::-1]):
            highest, others, *sums = functools.reduce(jax.jit(_rows._merge_targets), order)
            assert_same(tail_of((highest, others)), exact(z), rtol=2 * _exponent_error(z))
            for x, want in zip(sums, (y.sum(-1), dot, np.ones(5)), strict=True):
                np.testing.assert_allclose(x, want, rtol=TOLERANCE["loss"])


# -- logits that the same program computes -------------------------------------------------------


@pytest.mark.parametrize("exported", [False, True], ids=["here", "exported"])
@pytest.mark.parametrize("forward_mode", [False, True], ids=["reverse", "forward"])
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("num_classes", [20, 300])
def test_logits_that_the_program_computes_keep_the_label_at_the_maximum(
    kind, num_classes, forward_mode, exported
):
    """XLA may leave out the rounding of `x * t`, but not where the label's own distance is taken:
    the loss would be off by half a unit in the last place of 1448, and so be negative. The others'
    distances may be off by as much, and the tail relatively: that is allowed beside 16u."""
    t = np.float32(1 / 0.7)
    x = np.full((1, num_classes), 1000, np.float32)
    x[0, 7] = 1013.3
    ids = np.array([7], np.int32)
    labels = ids if kind == "integer" else one_hot(ids, num_classes)
    highest, want = exact(x * t)
    want = np.log1p(want)
    half_ulp = np.spacing(np.float32(highest[0])) / 2

    def loss(x, t):
        return BOTH[kind](x * t, labels, forward_mode=forward_mode)

    def constant(x):
        return loss(x, t)

    for fn, args in ((constant, (x,)), (loss, (x, t))):
        run = jax.jit(fn)
        if exported:
            run = jax.export.export(run, platforms=["cpu"])(*args).call
        got = run(*args)
        assert got >= 0
        np.testing.assert_allclose(got, want, rtol=16 * 2.0**-24 + half_ulp)
