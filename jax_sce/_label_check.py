"""Make `jax.experimental.checkify` report labels outside [0, V) at run time.

A bad label makes its loss NaN; `checkify.checkify(step, errors=user_checks)` says which label it was.
We cannot call `checkify.check`, because then users would have to checkify every step. We cannot call
`checkify.debug_check` either: it adds an effect to the program, and then `jax.jit` dispatches each call
on its slow path. Instead the labels pass through a primitive that does nothing, and checkify gets a rule
for that primitive.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array


def class_index(labels: Array, num_classes: int, counts: Array | None) -> Array:
    """Labels, [N...], as int32, with -1 for those outside [0, V). checkify reports the first of these.
    If `counts`, [N...], is given, it reports only examples where that is True."""
    args = (labels,) if counts is None else (labels, counts)
    labels = _primitive().bind(*args, num_classes=num_classes)
    good = _is_class(labels, num_classes)
    return jnp.where(good, jnp.where(good, labels, 0).astype(jnp.int32), -1)


def _is_class(labels: Array, num_classes: int) -> Array:
    """bool: which labels lie in [0, V)? They are compared in their own dtype, because a cast could
    wrap."""
    good = labels >= 0
    if num_classes <= jnp.iinfo(labels.dtype).max:
        good &= labels < jnp.asarray(num_classes, labels.dtype)
    return good


@functools.cache
def _primitive():
    """The primitive. It is made on first use, because its imports take ten times as long as all of this
    library."""
    from jax.extend.core import Primitive
    from jax.interpreters import batching, mlir

    def same(labels, *counts, num_classes):
        return labels

    def batch(args, dims, *, num_classes):
        (size,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}
        args = [batching.bdim_at_front(x, d, size) for x, d in zip(args, dims, strict=True)]
        return primitive.bind(*args, num_classes=num_classes), 0

    primitive = Primitive("checked_labels")
    primitive.def_impl(same)
    primitive.def_abstract_eval(same)
    mlir.register_lowering(primitive, lambda _, labels, *counts, num_classes: [labels])
    batching.primitive_batchers[primitive] = batch
    _teach_checkify(primitive)
    return primitive


def _teach_checkify(primitive) -> None:
    """Register checkify's rule. JAX has no public registry of these rules. If a later version moves the
    private one, the loss of a bad label is still NaN, but checkify does not report the label."""
    from jax.experimental import checkify

    try:
        from jax._src.checkify import check_p, error_checks
    except ImportError:
        return

    def rule(*args, num_classes):
        # In some versions of JAX a context comes before these arguments.
        arity = next(i for i, x in enumerate(args) if isinstance(x, frozenset)) + 1
        context, (labels, *counts) = args[:arity], args[arity:]
        run = checkify.checkify(_check, errors=checkify.user_checks)
        error, _ = run(num_classes, labels, *counts)
        leaves, tree = jax.tree.flatten(error)
        merged, _ = error_checks[check_p](*context, *leaves, err_tree=tree, debug=True)
        return merged, labels

    error_checks[primitive] = rule


def _check(num_classes: int, labels: Array, *counts: Array) -> None:
    from jax.experimental import checkify

    if labels.size == 0:
        return
    bad = ~_is_class(labels, num_classes)
    for mask in counts:
        bad &= mask
    first = jnp.unravel_index(jnp.argmax(bad), labels.shape)
    at = f" at ({', '.join(['{}'] * labels.ndim)})" if labels.ndim else ""
    message = f"labels must lie in [0, {num_classes}), got {{}}{at}"
    checkify.check(~jnp.any(bad), message, jnp.asarray(labels)[first], *first)
