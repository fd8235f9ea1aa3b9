"""Is a softmax cross-entropy right? Of this library's promises, which does it keep?

`conformance` puts any loss to the test and reports promise by promise; on the command line it is
`python -m jax_sce.testing optax:softmax_cross_entropy_with_integer_labels`. `assert_matches_reference`
is one assertion for the tests of a loss of your own. `collectives` lists what a compiled program sends
between devices.

Needs `chex`, and the command `rich` (`pip install "jax_sce[testing]"`).
"""

from ._assertions import assert_matches_reference as assert_matches_reference
from ._collectives import Collective as Collective, collectives as collectives
from ._conformance import Report as Report, Result as Result, conformance as conformance
