"""The conformance suite: a loss with a fault breaks the promise of it.

That this library keeps every promise is seen by the command, which `.ci/run` runs on it.
"""

import functools
import inspect
import json
import os
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jax_sce
from jax_sce.testing import Report, conformance
from jax_sce.testing.__main__ import parse
from jax_sce.testing._candidate import Candidate
from jax_sce.testing._oracle import exact
from jax_sce.testing._promises import PROMISES
from jax_sce.testing._trial import what_raised

OURS = {
    "integer": jax_sce.softmax_cross_entropy_with_integer_labels,
    "dense": jax_sce.softmax_cross_entropy,
    "linear": jax_sce.linear_softmax_cross_entropy,
}


def names(results):
    return {result.promise for result in results}


CHEAP = [
    "one class",
    "bad labels",
    "absent classes",
    "weights of zero",
    "divergence",
    "products",
    "jit",
]


@pytest.mark.parametrize(
    "kind", [*list(OURS)[:2], pytest.param("linear", marks=pytest.mark.thorough)]
)
def test_promises_are_kept_where_they_apply(kind):
    report = conformance(OURS[kind], kind, promises=CHEAP)
    assert report.holds, str(report)
    assert [result.promise for result in report.results] == CHEAP
    idle = names(r for r in report.results if r.status == "not applicable")
    assert idle == {p.name for p in PROMISES if p.name in CHEAP and kind not in p.kinds}


# -- faults ------------------------------------------------------------------------------------------
# Each is one that a published loss had, put into ours.


def ours(logits, labels, **options):
    return OURS["integer"](logits, labels, **options)


def backwards(x, change):
    """`x`, whose cotangent is changed."""
    same = jax.custom_vjp(lambda x: x)
    same.defvjp(lambda x: (x, None), lambda _, g: (change(g),))
    return same(x)


def uniform_cotangents(logits, labels):
    """As if every example had the mean cotangent."""
    return backwards(ours(logits, labels), lambda g: jnp.full_like(g, jnp.mean(g)))


def gradient_of_the_mean(logits, labels):
    return backwards(ours(logits, labels), lambda g: g / len(g))


def log_of_a_probability(logits, labels):
    """And a small number, so that it is never that of 0."""
    return -jnp.log(picked(jax.nn.softmax(logits), labels) + 1e-8)


def last_class_for_minus_one(logits, labels):
    return ours(logits, labels % logits.shape[-1])


def picked(rows, labels):
    return jnp.take_along_axis(rows, labels[:, None], -1)[:, 0]


def cancelling(logits, labels):
    return jax.nn.logsumexp(logits, -1) - picked(logits, labels)


def shifted_by_the_largest_of_all(logits, labels):
    return cancelling(logits - logits.max(), labels)


def largest_counted_once(logits, labels):
    highest = logits.max(-1, keepdims=True)
    tail = jnp.where(logits == highest, 0, jnp.exp(logits - highest)).sum(-1)
    return jnp.log1p(tail) + picked(highest - logits, labels)


def whole_blocks(logits, labels):
    """As a kernel whose grid is the number of examples by that of a block."""
    rest = len(labels) % min(len(labels), 128)
    kept = len(labels) - rest
    return jnp.pad(ours(logits[:kept], labels[:kept]), (0, rest))


def classes_in_the_dtype_of_labels(logits, labels):
    classes = lax.iota(labels.dtype, logits.shape[-1])
    return OURS["dense"](logits, (labels[:, None] == classes).astype(logits.dtype))


def padded(logits, labels):
    """To a multiple of 512 classes, with zeros, that count."""
    return ours(jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % 512))), labels)


def capped_without_its_derivative(logits, labels, *, softcap=None):
    if softcap is None:
        return ours(logits, labels)
    capped = logits + lax.stop_gradient(softcap * jnp.tanh(logits / softcap) - logits)
    return ours(capped, labels)


def padding_that_is_capped(logits, labels, *, softcap=None):
    """Pads to blocks of 512 classes, or of one short row, by logits that count once they are capped."""
    num_classes = logits.shape[-1]
    rest = -num_classes % min(num_classes, 512)
    padded = jnp.pad(logits, ((0, 0), (0, rest)), constant_values=-jnp.inf)
    return ours(padded, labels, softcap=softcap)


def constant_temperature(logits, labels, *, temperature=1):
    return ours(logits, labels, temperature=lax.stop_gradient(temperature))


def tempered_before_the_cap(logits, labels, *, temperature=1, softcap=None):
    share = jnp.broadcast_to(temperature, labels.shape)[:, None]
    return ours(logits / share, labels, softcap=softcap)


def entropy_that_cancels(logits, labels, *, return_aux=False):
    losses, aux = ours(logits, labels, return_aux=True)
    mean = (jax.nn.softmax(logits) * logits).sum(-1)
    return (losses, aux._replace(entropy=aux.log_normalizer - mean)) if return_aux else losses


def ignored_as_class_zero(logits, labels, *, ignore_index=None):
    if ignore_index is None:
        return ours(logits, labels)
    return ours(logits, jnp.where(labels == ignore_index, 0, labels))


def masked_afterwards(logits, labels, *, ignore_index=-1, weights=1, where=True):
    """The gradient of what is masked is 0 times NaN."""
    kept = (labels != ignore_index) & (weights != 0) & jnp.atleast_2d(where)[:, 0]
    losses = cancelling(logits, jnp.where(kept, labels, 0))
    return jnp.where(kept, weights * losses, 0)


def masked_logits_are_zero(logits, labels, *, where=True):
    return cancelling(jnp.where(where, logits, 0), labels)


def smoothed_over_the_others(logits, labels, *, label_smoothing=0):
    others = max(1, logits.shape[-1] - 1)
    y = jax.nn.one_hot(labels, logits.shape[-1])
    return OURS["dense"](logits, (1 - label_smoothing) * y + label_smoothing / others * (1 - y))


def class_weights_of_mean_one(logits, labels, *, class_weights=1):
    share = class_weights / jnp.mean(class_weights)
    return ours(logits, labels, class_weights=jnp.broadcast_to(share, logits.shape[-1:]))


def penalty_without_a_gradient(logits, labels, *, z_loss=0):
    normalizer = lax.stop_gradient(jax.nn.logsumexp(logits, -1))
    return ours(logits, labels) + z_loss * normalizer**2


def quantised(logits, labels):
    return cancelling(logits, labels).astype(logits.dtype)


def mean_in_16_bits(logits, labels, *, reduction="none"):
    losses = ours(logits, labels)
    if reduction == "none":
        return losses
    count = lax.fori_loop(0, len(losses), lambda _, n: n + jnp.bfloat16(1), jnp.bfloat16(0))
    return losses.sum() / count.astype(losses.dtype)


def divided_by_nothing(logits, labels, *, weights=1, reduction="none"):
    losses = ours(logits, labels) * weights
    return losses if reduction == "none" else losses.sum() / jnp.sum(weights)


def always_float32(logits, labels):
    return ours(logits.astype(jnp.float32), labels)


def looks_at_its_labels(logits, labels):
    if np.any(np.asarray(labels) >= logits.shape[-1]):
        raise ValueError("there is no such class")
    return ours(logits, labels)


def scanned(logits, labels):
    """Over classes, and what it begins with does not vary with the device."""
    start = jnp.full(len(logits), -jnp.inf)
    over, _ = lax.scan(lambda total, z: (jnp.logaddexp(total, z), None), start, logits.T)
    return over - picked(logits, labels)


def residuals_in_a_list(logits, labels):
    kept = []
    loss = jax.custom_vjp(lambda logits: ours(logits, labels))

    def fwd(logits):
        kept.append(jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1]))
        return loss(logits), None

    loss.defvjp(fwd, lambda _, g: (g[:, None] * kept.pop(),))
    return loss(logits)


def keeps_the_softmax(logits, labels):
    """As a constant."""

    @jax.custom_vjp
    def loss(logits):
        return ours(logits, labels)

    def fwd(logits):
        return loss(logits), lax.stop_gradient(jax.nn.softmax(logits))

    def bwd(softmax, g):
        return (g[:, None] * (softmax - jax.nn.one_hot(labels, softmax.shape[-1])),)

    loss.defvjp(fwd, bwd)
    return loss(logits)


def targets_that_sum_to_one(logits, labels):
    @jax.custom_vjp
    def loss(logits, labels):
        return OURS["dense"](logits, labels)

    def fwd(logits, labels):
        return loss(logits, labels), (logits, labels)

    def bwd(residuals, g):
        logits, labels = residuals
        softmax = jax.nn.softmax(logits)
        return g[:, None] * (softmax - labels), -g[:, None] * jnp.log(softmax)

    loss.defvjp(fwd, bwd)
    return loss(logits, labels)


def constant_targets(logits, labels):
    return OURS["dense"](logits, lax.stop_gradient(labels))


def zero_times_infinity(logits, labels):
    return -(labels * jax.nn.log_softmax(logits)).sum(-1)


def aux_without_a_gradient(hidden, kernel, labels, *, return_aux=False):
    losses, aux = OURS["linear"](hidden, kernel, labels, return_aux=True)
    return (losses, jax.tree.map(lax.stop_gradient, aux)) if return_aux else losses


def whole_logits(hidden, kernel, labels):
    return ours(hidden @ kernel, labels)


def kernel_gradient_in_16_bits(hidden, kernel, labels):
    kernel = backwards(kernel, lambda g: g.astype(jnp.bfloat16).astype(g.dtype))
    return whole_logits(hidden, kernel, labels)


def uniform_cotangent_of_the_kernel(hidden, kernel, labels):
    of_hidden = whole_logits(hidden, lax.stop_gradient(kernel), labels)
    of_kernel = uniform_cotangents(lax.stop_gradient(hidden) @ kernel, labels)
    return of_hidden + of_kernel - lax.stop_gradient(of_kernel)


def tiles_without_a_normalizer(hidden, kernel, labels, *, z_loss=0, return_aux=False):
    """The log-normalizer's gradient is dropped where there is more than one tile."""
    losses, aux = OURS["linear"](hidden, kernel, labels, return_aux=True)
    if len(labels) > 512:
        aux = jax.tree.map(lax.stop_gradient, aux)
    losses += z_loss * aux.log_normalizer**2
    return (losses, aux) if return_aux else losses


def sums_in_the_dtype_of_the_kernel(hidden, kernel, labels):
    """As a loop over examples is differentiated by JAX."""

    def one(example):
        return whole_logits(*(x[None] if x is not kernel else x for x in example))[0]

    return lax.map(lambda x: one((x[0], kernel, x[1])), (hidden, labels), batch_size=64)


def sums_in_the_dtype_of_the_hidden_states(hidden, kernel, labels):
    """As a loop over classes is."""

    def dot(*kernel):
        return jnp.matmul(hidden, *kernel, preferred_element_type=jnp.float32)

    start = jnp.full(len(labels), -jnp.inf)
    over, _ = lax.scan(
        lambda total, column: (jnp.logaddexp(total, dot(column)), None), start, kernel.T
    )
    return over - picked(dot(kernel), labels)


def cotangents_in_float32(hidden, kernel, labels):
    return ours(jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32), labels)


def divergence_that_cancels(hidden, kernel, labels):
    if not isinstance(labels, jax_sce.Teacher):
        return whole_logits(hidden, kernel, labels)
    logits = hidden @ kernel
    teacher = labels.hidden @ labels.kernel
    entropy = OURS["dense"](teacher, jax.nn.softmax(teacher))
    return OURS["dense"](logits, jax.nn.softmax(teacher)) - entropy


FAULTS = [
    (log_of_a_probability, "integer", {"values", "absent labels"}),
    (gradient_of_the_mean, "integer", {"gradients"}),
    (uniform_cotangents, "integer", {"cotangents"}),
    (last_class_for_minus_one, "integer", {"bad labels"}),
    (cancelling, "integer", {"confident rows", "large offsets"}),
    (shifted_by_the_largest_of_all, "integer", {"no examples", "bad rows", "independent rows"}),
    (largest_counted_once, "integer", {"ties"}),
    (whole_blocks, "integer", {"uneven batches"}),
    (padded, "integer", {"many classes", "one class"}),
    (classes_in_the_dtype_of_labels, "integer", {"label dtypes"}),
    (capped_without_its_derivative, "integer", {"soft-cap"}),
    (padding_that_is_capped, "integer", {"soft-cap"}),
    (constant_temperature, "integer", {"temperature"}),
    (tempered_before_the_cap, "integer", {"temperature"}),
    (entropy_that_cancels, "integer", {"entropy"}),
    (ignored_as_class_zero, "integer", {"ignored labels"}),
    (masked_afterwards, "integer", {"ignored labels", "weights of zero", "masked rows"}),
    (masked_logits_are_zero, "integer", {"masked classes"}),
    (smoothed_over_the_others, "integer", {"label smoothing"}),
    (class_weights_of_mean_one, "integer", {"class weights"}),
    (penalty_without_a_gradient, "integer", {"z-loss"}),
    (quantised, "integer", {"bfloat16", "float16"}),
    (mean_in_16_bits, "integer", {"mean"}),
    (divided_by_nothing, "integer", {"mean of nothing"}),
    (always_float32, "integer", {"float64"}),
    (looks_at_its_labels, "integer", {"jit", "vmap"}),
    (scanned, "integer", {"shard_map"}),
    (residuals_in_a_list, "integer", {"checkpoint and scan"}),
    (keeps_the_softmax, "integer", {"residuals", "second derivatives", "forward mode"}),
    (targets_that_sum_to_one, "dense", {"targets"}),
    (constant_targets, "dense", {"gradients by targets"}),
    (zero_times_infinity, "dense", {"absent classes", "bad input"}),
    (aux_without_a_gradient, "linear", {"every output", "entropy"}),
    (whole_logits, "linear", {"memory"}),
    (kernel_gradient_in_16_bits, "linear", {"hidden states and kernel"}),
    (uniform_cotangent_of_the_kernel, "linear", {"hidden states and kernel"}),
    (tiles_without_a_normalizer, "linear", {"hidden states and kernel", "every output"}),
    (sums_in_the_dtype_of_the_kernel, "linear", {"accumulation"}),
    (sums_in_the_dtype_of_the_hidden_states, "linear", {"accumulation"}),
    (cotangents_in_float32, "linear", {"products"}),
    (divergence_that_cancels, "linear", {"divergence"}),
]


def compiled(loss):
    """Each shape is one program, and not one for each operation."""
    if loss in (looks_at_its_labels, residuals_in_a_list, keeps_the_softmax):
        return loss  # a fault that jit would hide, or spread
    static = {"reduction", "ignore_index", "return_aux"} & inspect.signature(loss).parameters.keys()
    return jax.jit(loss, static_argnames=static)


@pytest.mark.parametrize(("loss", "kind", "broken"), FAULTS)
@pytest.mark.usefixtures("lax_promotion")
def test_a_fault_breaks_its_promise(loss, kind, broken):
    loss = compiled(loss)
    report = conformance(loss, kind, promises=[*broken, "one class"])
    assert names(report.broken) == broken
    for result in report.broken:
        assert result.detail
        assert result.broken
        if result.error is None:
            assert raised(result.reproduce, loss) == result.detail
            continue
        assert result.error > result.bound
        if "loss(" in result.reproduce:
            assert raised(result.reproduce, loss, instead=reached) == "raises Exception: reached"


def raised(lines, loss, instead=None):
    """What a reproduction raises; perhaps with another loss."""
    try:
        with mock.patch.dict(os.environ):  # which that of shard_map sets
            exec(lines, {loss.__name__: instead or loss})
    except Exception as error:
        return what_raised(error)
    finally:
        jax.config.update("jax_enable_x64", False)  # which that of float64 sets


def reached(*arrays, **options):
    """A loss that is called is as good as run, and takes no time."""
    raise Exception("reached")


def test_every_promise_has_a_fault():
    assert set().union(*(broken for *_, broken in FAULTS)) == {p.name for p in PROMISES}


@pytest.mark.usefixtures("lax_promotion")
def test_what_raises_breaks_a_promise_and_no_more():
    def shy(logits, labels):
        if logits.shape[-1] > 1000:
            raise MemoryError("too many\nto count")
        return ours(logits, labels)

    report = conformance(shy, promises=["values", "many classes", "jit"])
    assert [result.status for result in report.results] == ["pass", "fail", "pass"]
    assert report["many classes"].detail == "raises MemoryError: too many"
    assert raised(report["many classes"].reproduce, shy) == report["many classes"].detail


@pytest.mark.usefixtures("lax_promotion")
@pytest.mark.parametrize("reduce", [jnp.sum, jnp.mean])
def test_a_loss_that_returns_a_number_is_called_for_each_example(reduce):
    def total(logits, labels):
        return reduce(ours(logits, labels))

    report = conformance(total, promises=["values", "cotangents", "uneven batches", "no examples"])
    assert [r.status for r in report.results] == ["pass", "pass", "pass", "not applicable"]

    def wrong_in_a_batch(logits, labels):
        losses = ours(logits, labels)
        return reduce(losses) + (losses[0] if len(losses) > 100 else 0)

    assert not conformance(wrong_in_a_batch, promises=["uneven batches"]).holds


@pytest.mark.usefixtures("lax_promotion")
@pytest.mark.parametrize(
    ("name", "kind", "broken"),
    [
        (
            "optax.softmax_cross_entropy_with_integer_labels",
            "integer",
            ["large offsets", "bad labels", "residuals"],
        ),
        ("optax.softmax_cross_entropy", "dense", ["confident rows", "absent classes", "bad input"]),
    ],
)
def test_the_reproductions_run(name, kind, broken, capsys):
    loss = getattr(optax, name.removeprefix("optax."))
    source = f"import optax\nloss = {name}"
    report = conformance(loss, kind, promises=broken, source=source)
    assert names(report.broken) == set(broken)
    for result in report.broken:
        exec(result.reproduce, {})
    assert len(capsys.readouterr().out.splitlines()) >= len(broken) - 1


def test_the_report():
    report = conformance(jax.jit(cancelling), promises=["jit", "confident rows", "targets"])
    assert isinstance(report, Report)
    assert not report.holds
    assert report["targets"].detail == "the promise is about kind dense"
    text = str(report)
    assert "cancelling, integer: promises broken: 1" in text
    assert report["confident rows"].broken in text
    with pytest.raises(KeyError, match="speed"):
        report["speed"]


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        (ours, {"kind": "sparse"}, "kind must be one of integer, dense, linear, got 'sparse'"),
        (ours, {"promises": ["speed"]}, "promises must be among values, .*, got 'speed'"),
        (lambda z, y: z, {}, r"must return the losses, of shape \(3,\)"),
    ],
)
def test_bad_arguments_are_named(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        conformance(loss, **arguments)


# -- the oracle --------------------------------------------------------------------------------------


def test_the_oracle_is_what_jax_differentiates(x64):
    r = jax.random.key(0)
    logits = 3 * jax.random.normal(r, (4, 5), jnp.float64)
    targets = jax.random.uniform(jax.random.fold_in(r, 1), (4, 5), jnp.float64, -0.5, 1)
    options = {"label_smoothing": 0.2, "z_loss": 0.3, "softcap": 2.5}
    weights = jnp.array([0.5, 1.0, 0.0, 2.0, 3.0])

    def losses(logits):
        return jax_sce.reference.softmax_cross_entropy(
            logits, targets, class_weights=weights[None], **options
        )

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        want, pull = jax.vjp(losses, logits)
        gradient = pull(jnp.ones(4))[0]
    got = exact(logits, targets, class_weights=weights, **options)
    assert abs(got.loss - want).max() < 1e-13
    assert abs(got.by_logits - gradient).max() < 1e-13


def test_the_oracle_of_temperature_and_entropy_is_what_jax_differentiates(x64):
    r = jax.random.key(0)
    logits = 3 * jax.random.normal(r, (4, 5), jnp.float64)
    targets = jax.random.uniform(jax.random.fold_in(r, 1), (4, 5), jnp.float64, -0.5, 1)
    temperature = jnp.array([0.5, 1.0, 2.0, 3.0])

    def losses(logits, temperature):
        capped = 2.5 * jnp.tanh(logits / 2.5) / temperature[:, None]
        return jax_sce.reference.softmax_cross_entropy(capped, targets, z_loss=0.3)

    def entropies(logits):
        logs = jax.nn.log_softmax(2.5 * jnp.tanh(logits / 2.5) / temperature[:, None])
        return -(jnp.exp(logs) * logs).sum(-1)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        want, pull = jax.vjp(losses, logits, temperature)
        of_entropy, pull_entropy = jax.vjp(entropies, logits)
        by_logits, by_temperature = pull(jnp.ones(4))
        (entropy_by_logits,) = pull_entropy(jnp.ones(4))
    got = exact(logits, targets, z_loss=0.3, softcap=2.5, temperature=temperature)
    for mine, theirs in (
        (got.loss, want),
        (got.by_logits, by_logits),
        (got.by_temperature, by_temperature),
        (got.entropy, of_entropy),
        (got.entropy_by_logits, entropy_by_logits),
    ):
        assert abs(mine - theirs).max() < 1e-13


# -- the command -------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "jax_sce.testing", *arguments],
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_command(tmp_path):
    file = tmp_path / "report.json"
    ended = command("optax:softmax_cross_entropy_with_integer_labels", "--json", file,
                    "--promises", "values,confident rows,shard_map")  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "broken 1" in ended.stdout
    (report,) = json.loads(file.read_text())
    assert [r["status"] for r in report["results"]] == ["pass", "fail", "pass"]


def test_the_command_adapts():
    ended = command("optax:softmax_cross_entropy", "--kind", "dense", "--promises", "values",
                    "--arguments", "logits,labels", "--set", "axis=-1")  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "promises kept 1, broken 0" in ended.stdout


def test_what_is_set_can_be_asked_for_anew(tmp_path):
    """And an argument that has the name of an option is none."""
    head = "jax_sce:linear_softmax_cross_entropy"
    loaded = Candidate(head, "linear", (), {"reduction": "none"}).loaded
    report = conformance(
        loaded.loss, "linear", options=loaded.options, promises=["mean of nothing"]
    )
    assert report["mean of nothing"].status == "pass"

    (tmp_path / "renamed.py").write_text("""
import jax_sce

def renamed(weights, hidden, labels):
    return jax_sce.linear_softmax_cross_entropy(hidden, weights.T, labels)
""")
    address = f"{tmp_path / 'renamed.py'}:renamed"
    loaded = Candidate(address, "linear", ("kernel.T", "hidden", "labels")).loaded
    report = conformance(
        loaded.loss,
        "linear",
        options=loaded.options,
        promises=["hidden states and kernel", "weights of zero"],
    )
    assert [result.status for result in report.results] == ["pass", "not applicable"]


def test_a_loss_that_cannot_be_called_is_not_a_broken_promise():
    ended = command("optax:softmax_cross_entropy", "--kind", "dense", "--set", "temperature=2")
    assert ended.returncode == 2
    assert "optax:softmax_cross_entropy, called with kind dense, raises TypeError" in ended.stderr


def test_the_command_sets_all_side_by_side():
    ended = command("--promises", "one class")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("| | jax_sce integer | jax_sce dense | jax_sce linear |")
    assert "Kept wherever they apply: one class." in lines
    assert any(line.startswith("optax dense (optax ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("optax", "the loss must be like module:function or file.py:function, got 'optax'"),
        ("optax:nothing", "optax:nothing cannot be imported"),
        ("optax:__version__", "optax:__version__ must be callable, got str"),
        ("optax:softmax_cross_entropy --arguments logits", "--arguments must name logits, labels"),
        ("optax:softmax_cross_entropy --set axis", "--set must be like name=value, got 'axis'"),
        ("--json nowhere/at/all.json", "there is no folder nowhere"),
        ("--promises speed", "promises must be among values,"),
    ],
)
def test_bad_options_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["testing", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        parse()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_keywords_are_read_through_partial():
    fn = functools.partial(OURS["integer"], z_loss=0.0)
    assert conformance(fn, promises=["z-loss"]).results[0].status == "pass"
