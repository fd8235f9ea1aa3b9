"""The types of the public signatures that `jax.typing` does not have."""

from collections.abc import Sequence
from typing import Literal

import jax.typing

_Items = Sequence[jax.typing.ArrayLike]
# Whatever `jax.numpy.asarray` takes: numbers, arrays, and lists of these up to three deep.
ArrayLike = jax.typing.ArrayLike | _Items | Sequence[_Items] | Sequence[Sequence[_Items]]
Reduction = Literal["none", "sum", "mean"]
