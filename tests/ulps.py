"""The worst errors that were seen, by family of logits: `python tests/ulps.py`, half a minute.

tests/ulps.md keeps what it printed.

Of the loss in units in the last place of float32, the distance between two numbers next to each other,
and of the gradient as a share of what jax_sce/_rows.py promises: `(6 + |z_j - max|) 2^-22` of each
element, and a rounding where it is in 16 bits. Against `jax_sce.testing`'s oracle in float64.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_sce import softmax_cross_entropy_with_integer_labels
from jax_sce.testing._oracle import exact, one_hot, wide

ROUNDING = {
    "float32": 0.0,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
}  # half a unit in the last place
SMALLEST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}


def families(r, n, v):
    ordinary = 2.5 * r.normal(size=(n, v))
    confident = ordinary.copy()
    confident[np.arange(n), r.integers(v, size=n)] += r.uniform(5, 80, n)
    absent = np.where(r.random((n, v)) < 0.5, -np.inf, ordinary)
    absent[:, 0] = 0
    return {
        "ordinary": ordinary,
        "small": ordinary * 10.0 ** r.uniform(-6, -1, (n, 1)),
        "wide": ordinary * 10.0 ** r.uniform(0, 3, (n, 1)),
        "offset": ordinary + r.choice([-1, 1], (n, 1)) * 10.0 ** r.uniform(1, 4.5, (n, 1)),
        "tied": r.integers(-2, 3, (n, v)).astype(float),
        "confident": confident,
        "absent classes": absent,
    }


@jax.jit
def loss_and_gradient(logits, labels):
    loss, pull = jax.vjp(lambda z: softmax_cross_entropy_with_integer_labels(z, labels), logits)
    return loss, pull(jnp.ones_like(loss))[0]


def worst(logits, labels):
    """The loss's error in units in the last place, and the gradient's in shares of its bound."""
    loss, gradient = map(wide, loss_and_gradient(logits, labels))
    want = exact(logits, one_hot(labels, logits.shape[1]))
    # Terms below the smallest normal number may be lost: they must not reach a loss's last place.
    floor = logits.shape[1] * 2.0**-126
    finite = np.isfinite(want.loss) & (want.loss > 2**25 * floor)
    ulps = np.abs(loss[finite] - want.loss[finite]) / np.spacing(np.float32(want.loss[finite]))
    z, dtype = wide(logits), logits.dtype.name
    with np.errstate(invalid="ignore"):
        distance = z.max(-1, keepdims=True) - z
    bound = np.where(np.isfinite(distance), (6 + distance) * 2.0**-22, 1) + ROUNDING[dtype]
    allowed = bound * np.abs(want.by_logits) + SMALLEST[dtype] + floor
    return ulps.max(), (np.abs(gradient - want.by_logits) / allowed).max()


def main(rows: int) -> None:
    print("| logits | dtype | " + " | ".join(f"loss, V = {v}" for v in SIZES) + " | gradient |")
    print("|---|---|" + "--:|" * (len(SIZES) + 1))
    r = np.random.default_rng(0)
    cells: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for v in SIZES:
        count = max(rows * min(SIZES) // v, 256)
        for name, logits in families(r, count, v).items():
            labels = r.integers(v, size=count, dtype=np.int32)
            top = r.random(count) < 0.5  # half of them are right
            labels[top] = logits[top].argmax(-1)
            for dtype in ROUNDING:
                rounded = logits.astype(jnp.dtype(dtype))
                cells.setdefault((name, dtype), []).append(worst(rounded, labels))
    for (name, dtype), found in cells.items():
        ulps = " | ".join(f"{loss:.1f}" for loss, _ in found)
        print(f"| {name} | {dtype} | {ulps} | {max(share for _, share in found):.2f} |")


SIZES = (3, 41, 1000, 32000)

if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
