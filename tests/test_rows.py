"""Storey 1: the statistics of a row are a commutative monoid, and exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support import TOLERANCE, rng

from jax_sce import _rows
from jax_sce._rows import Rows, Statistics

EMPTY = Statistics(jnp.array([-jnp.inf]), jnp.array([-1.0]))

# Few distinct values, so that ties within and across sets are common; and any others.
logit = st.one_of(st.integers(-3, 3).map(float), st.floats(-80, 80, width=32))
logits = st.lists(logit, min_size=4, max_size=4).map(lambda z: np.array([z], np.float32))
by_hypothesis = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def rows(z, softcap=None, where=None, axes=None):
    z = jnp.asarray(z)
    axes = (z.ndim - 1,) if axes is None else axes
    some_kept = None if where is None else jnp.any(where, axes)
    return Rows(z, where, some_kept, softcap, axes)


@jax.jit
def statistics(z):
    return _rows.statistics(rows(z))


merge = jax.jit(_rows.merge)


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
    a, b = statistics(a), statistics(b)
    assert_same(merge(a, b), merge(b, a))


@by_hypothesis
@given(logits, logits, logits)
def test_merge_is_associative(a, b, c):
    a, b, c = statistics(a), statistics(b), statistics(c)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


@by_hypothesis
@given(logits)
def test_merge_with_the_empty_set_changes_nothing(a):
    a = statistics(a)
    for merged in (merge(a, EMPTY), merge(EMPTY, a)):
        np.testing.assert_array_equal(merged.max, a.max)
        # What is below the smallest normal number may be flushed to zero.
        np.testing.assert_allclose(merged.tail, a.tail, rtol=0, atol=TOLERANCE["underflow"])


def test_two_empty_sets_are_empty():
    assert_same(merge(EMPTY, EMPTY), EMPTY, rtol=0)


@by_hypothesis
@given(logits, logits)
def test_chunks_merge_to_the_whole(a, b):
    whole = np.concatenate([a, b], -1)
    merged = merge(statistics(a), statistics(b))
    assert_same(merged, exact(whole), rtol=2 * _exponent_error(whole))


def test_chunks_of_any_size_in_any_order_merge_to_the_whole():
    z = rng(1).normal(0, 10, (5, 60)).astype(np.float32)
    z[:, [3, 17, 59]] = z.max()  # ties across the chunks
    for cuts in ([20, 40], [5, 25, 45], list(range(1, 60))):
        chunks = np.split(z, cuts, -1)
        for order in (chunks, chunks[::-1]):
            merged = functools.reduce(merge, (statistics(chunk) for chunk in order))
            assert_same(merged, exact(z), rtol=2 * _exponent_error(z))


def test_a_single_class_is_its_own_maximum_with_nothing_beside_it():
    assert_same(statistics(np.array([[3.0]], np.float32)), ([3.0], [0.0]), rtol=0)


# -- statistics ----------------------------------------------------------------------------------


def _exponent_error(z):
    """An exponent of size d is rounded to d * 2^-24, and the rest is a few roundings."""
    finite = np.where(np.isfinite(z), z, 0)
    return (6 + min(np.ptp(finite), 90)) * 2.0**-24


@pytest.mark.parametrize("num_classes", [2, 3, 64, 65, 127, 128, 1000, 50257, 131072])
def test_statistics_are_exact_at_any_number_of_classes(num_classes):
    z = rng(num_classes).normal(0, 2, (3, num_classes)).astype(np.float32)
    z[1, num_classes // 2] = 60.0  # confident: a tail of 1e-22
    assert_same(statistics(z), exact(z), rtol=_exponent_error(z[0]) + 60 * 2.0**-24)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, -1e6, 1e8, -1e8])
def test_a_common_offset_costs_nothing(offset):
    z = (offset + rng(2).normal(0, 30, (4, 33))).astype(np.float32)
    assert_same(statistics(z), exact(z), rtol=_exponent_error(z - np.float32(offset)))


@pytest.mark.parametrize("num_classes", [2, 512])
def test_the_rounding_of_long_distances_is_not_in_the_tail(num_classes):
    """The maximum is anywhere, and the others so far below it that the distances are rounded."""
    top = rng(10).uniform(-40, 40, (500, 1))
    z = np.concatenate([top, top - rng(11).uniform(20, 80, (500, num_classes - 1))], -1)
    z = z.astype(np.float32)
    assert_same(statistics(z), exact(z), rtol=TOLERANCE["loss"])


@pytest.mark.parametrize("num_classes", [7, 256])
@pytest.mark.parametrize("ties", [2, 3, 7])
def test_ties_are_each_counted(num_classes, ties):
    z = np.full((2, num_classes), -100.0, np.float32)
    z[0, :ties] = 5.0
    z[1, -ties:] = 5.0
    highest, tail, _ = statistics(z)
    np.testing.assert_array_equal(highest, 5.0)
    np.testing.assert_allclose(tail, ties - 1, rtol=1e-7)


def test_all_classes_tied_at_any_size():
    highest, tail, _ = statistics(np.full((3, 131072), 1e8, np.float32))
    np.testing.assert_array_equal(highest, np.float32(1e8))
    np.testing.assert_array_equal(tail, 131071.0)


def test_absent_classes_add_nothing():
    z = np.array([[-np.inf, 1.0, -np.inf, 0.5]], np.float32)
    assert_same(statistics(z), exact(z[:, [1, 3]]))


@pytest.mark.parametrize("num_classes", [65, 257, 1024])
def test_absent_classes_add_nothing_wherever_they_are(num_classes):
    """At the end, as those that pad a vocabulary, at the start, or all but one."""
    z = rng(9).normal(size=(5, num_classes)).astype(np.float32)
    z[0, -1] = z[1, -40:] = z[2, :-1] = z[3, : num_classes // 2] = z[4, 1:] = -np.inf
    assert_same(statistics(z), exact(z), rtol=TOLERANCE["loss"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num_classes", [5, 256])
def test_a_bad_logit_spoils_its_row_alone(num_classes, bad):
    z = rng(3).normal(size=(3, num_classes)).astype(np.float32)
    z[1, -1] = bad
    tail = np.asarray(statistics(z).tail)
    assert np.isnan(tail[1])
    np.testing.assert_allclose(tail[[0, 2]], exact(z[[0, 2]])[1], rtol=TOLERANCE["loss"])


@pytest.mark.parametrize("num_classes", [1009, 1024])
@pytest.mark.parametrize(
    ("dtype", "softcap"), [(jnp.float32, None), (jnp.bfloat16, None), (jnp.bfloat16, 3.0)]
)
def test_rows_read_in_blocks_and_at_once_agree(dtype, softcap, num_classes):
    z = jnp.asarray(rng(4).normal(0, 5, (5, num_classes)), dtype)
    z = z.at[1, 7].set(70.0).at[2, :].set(0.0).at[3, [0, 500, 1023]].set(50.0)
    z = z.at[4, :1000].set(-jnp.inf)
    view = rows(z, None if softcap is None else jnp.float32(softcap))
    at_once = jax.jit(_rows._statistics_at_once)(view)
    assert_same(jax.jit(_rows._statistics_in_blocks)(view), at_once, rtol=TOLERANCE["loss"])


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_long_rows_of_any_rank(batch):
    z = rng(12).normal(0, 5, (*batch, 1009)).astype(np.float32)
    assert_same(statistics(z), exact(z), rtol=TOLERANCE["loss"])


def test_the_log_normalizer_is_within_2_to_the_minus_22_of_the_larger_of_it_and_one():
    z = np.stack([scale * rng(5).normal(size=100) for scale in (1e-3, 1.0, 100.0)])
    z = np.concatenate([z, z - z.max(-1, keepdims=True), z + 1e6]).astype(np.float32)
    highest, tail = exact(z)
    want = highest + np.log1p(tail)
    error = np.abs(_rows.log_normalizer(statistics(z)) - want) / np.maximum(1, np.abs(want))
    np.testing.assert_array_less(error, 2.0**-22)


def test_classes_on_several_axes_are_flattened_in_the_order_given():
    z = rng(6).normal(size=(2, 3, 4)).astype(np.float32)
    got = rows(z, axes=(2, 0)).read()
    np.testing.assert_array_equal(got, z.transpose(1, 2, 0).reshape(3, 8))


def test_statistics_differentiate_as_the_sum_of_exponentials_does(x64):
    z = jnp.asarray(rng(7).normal(size=(2, 3, 6)))
    z_dot = jnp.asarray(rng(8).normal(size=(2, 3, 6)))
    stats, stats_dot = jax.jvp(statistics, (z,), (z_dot,))
    # d log S = o . dz, whatever part of it `max` and `tail` each carry.
    got = stats_dot.max + stats_dot.tail / (1 + stats.tail)
    want = np.sum(jax.nn.softmax(z) * z_dot, -1)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE["float64"])
