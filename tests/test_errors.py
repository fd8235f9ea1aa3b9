"""What cannot be right raises, and says which argument, what was expected and what came."""

import re
import traceback
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import BOTH, one_hot

from jax_sce import Sparse, _rules, linear_softmax_cross_entropy, shard

N, V = 4, 6
LOGITS = np.zeros((N, V), np.float32)
IDS = np.zeros(N, np.int32)
FLOATS = one_hot(IDS, V)

# Keyword arguments that replace the good ones; the error; what its message says.
IN_BOTH = {
    "integer logits": ({"logits": IDS}, TypeError, "logits.*floating.*int32"),
    "float8 logits": (
        {"logits": LOGITS.astype(jnp.float8_e4m3fn)},
        TypeError,
        "logits.*float16, bfloat16, float32 or float64, got float8_e4m3fn",
    ),
    "float8 weights": (
        {"weights": np.ones(N, jnp.float8_e5m2)},
        TypeError,
        "weights.*float32.*got float8_e5m2",
    ),
    "float8 class_weights": (
        {"class_weights": np.ones(V, jnp.float8_e5m2)},
        TypeError,
        "class_weights.*float32.*got float8_e5m2",
    ),
    "float8 softcap": (
        {"softcap": jnp.float8_e4m3fn(2)},
        TypeError,
        "softcap.*float32.*got float8_e4m3fn",
    ),
    "bool logits": ({"logits": LOGITS > 0}, TypeError, "logits.*floating.*bool"),
    "complex logits": ({"logits": LOGITS + 1j}, TypeError, "logits.*floating.*complex64"),
    "logits of None": ({"logits": None}, TypeError, "logits.*array.*None"),
    "labels of None": ({"labels": None}, TypeError, "labels.*array.*None"),
    "logits of str": ({"logits": "abc"}, TypeError, "logits.*array.*abc"),
    "scalar logits": ({"logits": 1.0, "labels": 0}, ValueError, r"axis.*rank 0"),
    "axis too large": ({"axis": 2}, ValueError, r"axis.*\[-2, 2\).*2"),
    "axis too small": ({"axis": -3}, ValueError, r"axis.*\[-2, 2\).*-3"),
    "axis twice": ({"axis": (1, -1)}, ValueError, r"axis.*none twice.*\(1, -1\)"),
    "axis empty": ({"axis": ()}, ValueError, r"axis.*at least one.*\(\)"),
    "axis a float": ({"axis": 1.0}, TypeError, "axis.*int.*1.0"),
    "axis a str": ({"axis": "classes"}, TypeError, "axis.*int.*classes"),
    "where of floats": ({"where": LOGITS}, TypeError, "where.*bool.*float32"),
    "where of ints": ({"where": IDS}, TypeError, "where.*bool.*int32"),
    "where of another shape": (
        {"where": np.ones(3, bool)},
        ValueError,
        r"where.*\(4,\).*\(4, 6\).*\(3,\)",
    ),
    "where of too high rank": (
        {"where": np.ones((2, N, V), bool)},
        ValueError,
        r"where.*\(4, 6\).*\(2, 4, 6\)",
    ),
    "where a scalar": ({"where": True}, ValueError, r"where.*\(4,\).*\(4, 6\).*got \(\)"),
    "where of the classes": (
        {"where": np.ones(V, bool)},
        ValueError,
        r"where.*got \(6,\); a mask of classes for all examples has shape \(1, 6\)",
    ),
    "where of the logits' rank and another shape": (
        {"where": np.ones((V, N), bool)},
        ValueError,
        r"where.*\(4, 6\).*got \(6, 4\)",
    ),
    "weights of another shape": (
        {"weights": np.ones(V)},
        ValueError,
        r"weights.*\(4,\).*\(6,\)",
    ),
    "weights of another rank": (
        {"weights": np.ones((1, N))},
        ValueError,
        r"weights.*\(4,\).*\(1, 4\)",
    ),
    "complex weights": (
        {"weights": np.ones(N) * 1j},
        TypeError,
        "weights.*floating-point, integer or bool.*complex",
    ),
    "class_weights of another shape": (
        {"class_weights": np.ones(N)},
        ValueError,
        r"class_weights.*\(6,\).*\(4,\)",
    ),
    "label_smoothing below 0": ({"label_smoothing": -0.1}, ValueError, "label_smoothing.*0.*-0.1"),
    "label_smoothing above 1": ({"label_smoothing": 1.5}, ValueError, "label_smoothing.*1.*1.5"),
    "label_smoothing an array": (
        {"label_smoothing": np.zeros(N)},
        ValueError,
        r"label_smoothing.*a number.*\(4,\)",
    ),
    "label_smoothing a list": (
        {"label_smoothing": [0.1]},
        ValueError,
        r"label_smoothing.*a number.*\(1,\)",
    ),
    "label_smoothing a dict": (
        {"label_smoothing": {}},
        TypeError,
        "label_smoothing.*a number.*dict",
    ),
    "label_smoothing NaN": ({"label_smoothing": np.nan}, ValueError, "label_smoothing.*nan"),
    "label_smoothing None": (
        {"label_smoothing": None},
        TypeError,
        "label_smoothing.*a number.*None",
    ),
    "z_loss an array": ({"z_loss": np.zeros(2)}, ValueError, r"z_loss.*a number.*\(2,\)"),
    "softcap a str": ({"softcap": "30"}, TypeError, "softcap.*a number.*'30'"),
    "temperature a str": (
        {"temperature": "1"},
        TypeError,
        "temperature.*a number or an array.*'1'",
    ),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap.*0.*0.0"),
    "softcap below 0": ({"softcap": -30.0}, ValueError, "softcap.*0.*-30"),
    "softcap NaN": ({"softcap": np.nan}, ValueError, "softcap.*nan"),
    "unknown reduction": ({"reduction": "avg"}, ValueError, "reduction.*none.*sum.*mean.*avg"),
    "reduction None": ({"reduction": None}, ValueError, "reduction.*none.*sum.*mean.*None"),
}
INTEGER_ONLY = {
    "float labels": (
        {"labels": IDS.astype(np.float32)},
        TypeError,
        "labels.*integer.*float32; for distributions use softmax_cross_entropy",
    ),
    "bool labels": ({"labels": IDS > 0}, TypeError, "labels.*integer.*bool"),
    "float one-hot labels": ({"labels": FLOATS}, TypeError, "float32; for distributions use"),
    "one-hot labels": (
        {"labels": FLOATS.astype(int)},
        ValueError,
        r"labels.*\(4,\), got \(4, 6\); for distributions use softmax_cross_entropy",
    ),
    "labels to broadcast": ({"labels": 0}, ValueError, r"labels.*\(4,\), got \(\)$"),
    "ignore_index a float": ({"ignore_index": 1.0}, TypeError, "ignore_index.*integer.*1.0"),
    "ignore_index an array": ({"ignore_index": IDS}, TypeError, "ignore_index.*integer"),
}
DENSE_ONLY = {
    "float8 labels": (
        {"labels": FLOATS.astype(jnp.float8_e4m3fn)},
        TypeError,
        "labels.*float32.*got float8_e4m3fn",
    ),
    "class ids": (
        {"labels": IDS},
        ValueError,
        r"labels.*\(4, 6\), got \(4,\); for class ids use softmax_cross_entropy_with_integer_labels",
    ),
    "labels to broadcast": ({"labels": FLOATS[:1]}, ValueError, r"labels.*\(4, 6\), got \(1, 6\)$"),
    "complex labels": (
        {"labels": FLOATS * 1j},
        TypeError,
        "labels.*floating-point, integer or bool.*complex",
    ),
}
CASES = [
    pytest.param(kind, *case, id=f"{kind}-{name}")
    for kind, more in (("integer", INTEGER_ONLY), ("dense", DENSE_ONLY))
    for name, case in (IN_BOTH | more).items()
]


def good(kind):
    return {"logits": LOGITS, "labels": IDS if kind == "integer" else FLOATS}


@pytest.mark.parametrize(("kind", "wrong", "error", "message"), CASES)
def test_a_bad_argument_is_named(kind, wrong, error, message):
    with pytest.raises(error, match=message):
        BOTH[kind](**{**good(kind), **wrong})


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("axis", "shape"), [(0, (4, 1, 1)), ((2, 0), (4, 1, 2))], ids=str)
def test_the_message_tells_the_shape_of_a_mask_of_classes(kind, axis, shape):
    logits = np.zeros((4, 3, 2), np.float32)
    labels = np.zeros((3, 2) if axis == 0 else 3, np.int32)
    labels = labels if kind == "integer" else np.zeros_like(logits)
    with pytest.raises(ValueError, match=rf"where.*{re.escape(str(shape))}$"):
        BOTH[kind](logits, labels, axis, np.ones(4, bool))


@pytest.mark.parametrize("kind", BOTH)
def test_options_are_passed_by_name(kind):
    with pytest.raises(TypeError, match="positional"):
        BOTH[kind](*good(kind).values(), -1, None, 0.1)


def test_distributions_have_no_ignore_index():
    with pytest.raises(TypeError, match="ignore_index"):
        BOTH["dense"](LOGITS, FLOATS, ignore_index=0)


@pytest.mark.parametrize("kind", BOTH)
def test_errors_are_raised_when_tracing_too(kind):
    arguments = good(kind)
    with pytest.raises(ValueError, match="weights"):
        jax.jit(lambda w: BOTH[kind](**arguments, weights=w))(jnp.ones(V))
    with pytest.raises(ValueError, match="softcap"):
        jax.jit(lambda z: BOTH[kind](z, arguments["labels"], softcap=0.0))(LOGITS)


def losses_of_logits():
    """Each loss as a function of an array [4, 6]: logits, or hidden states."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = np.eye(V, dtype=np.float32)
    return {
        "integer": lambda z: BOTH["integer"](z, IDS),
        "dense": lambda z: BOTH["dense"](z, FLOATS),
        "linear": lambda z: linear_softmax_cross_entropy(z, kernel, IDS),
        "shard": lambda z: shard(BOTH["integer"], mesh)(z, IDS),
    }


@pytest.mark.parametrize("kind", losses_of_logits())
def test_forward_mode_without_its_rule_is_an_error_that_names_the_option(kind):
    loss, logits = losses_of_logits()[kind], (jnp.asarray(LOGITS),)
    with pytest.raises(TypeError, match="forward-mode") as raised:
        jax.jvp(loss, logits, logits)
    assert "jax_sce: for jvp, jacfwd" in raised.value.__notes__[0]
    # Where JAX raises it after our functions have returned, it shows the line that it refuses.
    with pytest.raises(TypeError, match="forward-mode") as raised:
        jax.jit(lambda z: jax.jvp(loss, z, z))(logits)
    assert "# jvp: forward_mode=True\n" in "".join(traceback.format_exception(raised.value))


def test_an_error_that_is_not_of_forward_mode_has_no_note_about_it():
    def program(inputs):
        raise TypeError("something else")

    inputs = types.SimpleNamespace(options=types.SimpleNamespace(forward_mode=False))
    with pytest.raises(TypeError, match="something else") as raised:
        _rules.call(program, inputs)
    assert not hasattr(raised.value, "__notes__")


def test_lists_are_arrays():
    numbers = np.arange(1.0, 5.0, dtype=np.float32)
    options = {"where": np.arange(N) > 0, "weights": numbers, "temperature": numbers}
    as_lists = {name: x.tolist() for name, x in options.items()}
    got = BOTH["integer"](LOGITS.tolist(), IDS.tolist(), **as_lists)
    np.testing.assert_array_equal(got, BOTH["integer"](LOGITS, IDS, **options))

    labels, kernel = Sparse(IDS[:, None], numbers[:, None]), np.eye(V, dtype=np.float32)
    sparse = Sparse(labels.ids.tolist(), labels.values.tolist())
    got = linear_softmax_cross_entropy(LOGITS.tolist(), kernel.tolist(), sparse, bias=[0.0] * V)
    want = linear_softmax_cross_entropy(LOGITS, kernel, labels, bias=LOGITS[0])
    np.testing.assert_array_equal(got, want)


def test_a_list_may_hold_traced_numbers():
    def loss(t):
        return BOTH["integer"](LOGITS[:2], IDS[:2], temperature=[t, 2.0])

    assert jax.eval_shape(loss, 1.0).shape == (2,)


@pytest.mark.parametrize("kind", BOTH)
def test_an_interval_has_its_closed_ends_and_not_its_open_ones(kind):
    for end in (0.0, 1.0):
        assert np.all(np.isfinite(BOTH[kind](**good(kind), label_smoothing=end)))
    for name in ("softcap", "temperature"):
        with pytest.raises(ValueError, match=rf"{name} must lie in \(0, inf\), got inf"):
            BOTH[kind](**good(kind), **{name: np.inf})
