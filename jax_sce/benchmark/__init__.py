"""Losses side by side: `python -m jax_sce.benchmark`, or `compare` for yours.

How it measures:

- Every pass of every peer is compiled first and run once. Its mean loss and
  a sample of each gradient are compared with float64. A pass that is off by
  more than rounding is shown as wrong and not timed. A pass that fails, or
  needs more memory than is free, is shown with the reason.
- Peers of the same shape, dtype and pass take turns: each is timed once in a
  round, and each round begins with another. The table shows the median of
  the rounds, and the quartiles.
- One reading of the clock covers as many runs as take two milliseconds, one
  at least. Each run is awaited to its end on the device.
- All peers get the same arrays and as many threads, PyTorch too.
  `value_and_grad` writes its gradients into fresh memory, as a first call
  does. `donated_gradient` writes them over the logits, as a training step
  that is compiled as a whole can do.
- The floor is timed in the same rounds. For losses on logits it is a pass
  that only negates the logits; for a head, its matrix products alone. It is
  a measure and not a bound, so that a time may be below it: a forward pass
  of logits reads and does not write, and the products of a chunk that stays
  in the cache may be faster than those of the whole head.
- Distributions are labels [N, V] in the logits' dtype; the gradient is with
  respect to the logits alone.
- Times are divided by the median of optax; for heads by that of `naive`,
  which is optax's loss of logits accumulated in float32.
- The compile time is that of tracing and compiling, once. Temporary memory
  is the memory that the compiler sets aside for a pass, beside its arguments
  and results. On CPU, under Linux, the peak of resident memory beyond the
  arguments is measured too, in a fresh process for each peer.

`compiled` measures nothing. It compiles each pass for machines that you need
not have, and reads from the program the bytes that it moves, its matrix
products, its memory and the bytes that it sends, by the rules of
`jax_sce/_hlo.py`:

- The bound is a sum over the kernels. Each takes the longer of two times: its
  bytes at the bandwidth of the data sheet, or its products at the rate of the
  data sheet. A real machine is slower, because of launches, elementwise
  arithmetic, links between devices, and rates that are not reached. It may be
  faster where arrays stay in a GPU's cache.
- A Pallas kernel on a TPU costs what its own `cost_estimate` says.
- Nothing runs, so answers are not checked. A loss that does not compile is
  shown with the reason.
- The floor is computed: each logit is read once, and for the gradient read
  once more and written once; a head takes 2NDV operations, and 6NDV with its
  gradients.
- With a mesh every figure is for one device. Arguments and gradients are laid
  out as in training: examples are split over the first axis, classes over the
  second, and each loss runs under plain `jit`.
- On NVIDIA GPUs the products are those of cuBLAS without tuning, and
  jax_sce's statistics are its plain reduction. On a real GPU a Pallas kernel,
  which also passes over the logits once, takes its place.

`compare` needs JAX and NumPy, and uses the peers that are installed. To draw
and tabulate, the command needs more packages. In a checkout,
`python -m pip install -e ".[benchmark]"` installs them, and
`python -m pip install -e ".[compiled]"` those of `compiled`.
"""

from ._compare import compare as compare
from ._measure import Quartiles as Quartiles
from ._row import Cost as Cost, Row as Row
