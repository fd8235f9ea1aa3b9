"""The types of the public signatures that `jax.typing` does not have."""

from collections.abc import Sequence
from typing import Literal

from jax.typing import ArrayLike as _One

# Numbers, arrays, and lists of these up to three deep: what `jax.numpy.asarray` takes. One union for
# each depth, so that mypy can infer the items of `[[1.0, 0], [0, 1]]`; no recursion, which admits str.
ArrayLike = _One | Sequence[_One | Sequence[_One | Sequence[_One]]]
Reduction = Literal["none", "sum", "mean"]
