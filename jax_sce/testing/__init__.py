"""Is a softmax cross-entropy right, and which of this library's promises does it keep?

`conformance` tests any loss and reports promise by promise; on the command line it is
`python -m jax_sce.testing optax:softmax_cross_entropy_with_integer_labels`. `assert_matches_reference`
is one assertion for the tests of your own loss. `collectives` lists what a compiled program sends
between devices.

The command needs `rich`: in a checkout, `python -m pip install -e ".[testing]"`.
"""

from ._assertions import assert_matches_reference as assert_matches_reference
from ._collectives import Collective as Collective, collectives as collectives
from ._conformance import Report as Report, Result as Result, conformance as conformance
