"""Losses side by side on your machine: `python -m jax_sce.benchmark`, or `compare` for your own.

How it is measured:

- Every pass of every peer is compiled first, run once, and its answer is compared with float64: the
  mean loss, and a sample of each gradient. One that is off by more than rounding is shown as wrong and
  is not timed. What fails, or needs more memory than there is, is shown with the reason.
- Peers of the same shape, dtype and pass take turns: in each round each is timed once, and each round
  begins with another. Shown are the median of the rounds and the quartiles.
- One reading of the clock covers as many runs as last two milliseconds, one at least, and the end of
  the device's work is awaited after each of them.
- All peers read the same arrays, PyTorch too, and with as many threads. `value_and_grad` writes its
  results into fresh memory, as a first call does; `donated_gradient` writes them over the logits,
  which is what a training step that is compiled whole can do, and what the loss itself costs.
- In the same rounds the floors are timed: of logits, be the labels classes or distributions, a pass
  over the logits that only negates them, fresh or in place; of a linear head, its matrix products,
  without any loss. They are a measure, not a bound: a forward pass of logits writes nothing, one of
  distributions reads those too, and the products of a chunk may run faster than those of the whole
  head.
- Distributions are labels [N, V] of the logits' dtype; gradients are by the logits alone.
- Ratios are of medians: to optax for logits and distributions; for heads to `naive`, optax's loss of
  logits accumulated in float32.
- The compile time is that of tracing and compiling, once. Temporary memory is what the compiler sets
  aside for a pass beside its arguments and results. On CPU, under Linux, the peak of resident memory
  over that of the arguments is measured too, in a fresh process for each peer.

`compiled` measures nothing. It compiles each pass for machines that are not here, and reads from the
program what it moves through memory, multiplies, holds and sends, by the rules of `jax_sce/_hlo.py`:

- The bound adds up the kernels. Each takes the longer of two times: its bytes at the data sheet's
  bandwidth, or its products at its rate. A real machine is slower by what this leaves out: launches,
  elementwise arithmetic, links between devices, and rates that are not reached. It may be faster where
  arrays stay in a GPU's cache.
- A Pallas kernel on a TPU costs what its own `cost_estimate` says.
- Nothing runs, so answers are not checked. A loss that does not compile is shown with the reason.
- The floors are arithmetic: each logit is read once, and for the gradient once more and written; a head
  multiplies 2NDV, and 6NDV with its gradients.
- With a mesh every figure is for one device. Arguments and gradients lie as training loops have them:
  examples split over the first axis, classes over the second, each loss under plain `jit`.
- On NVIDIA GPUs the products are those of cuBLAS, not tuned, and jax_sce's statistics its plain
  reduction; on a real GPU a Pallas kernel, of one pass over the logits too, takes its place.

`compare` alone needs JAX and NumPy, and of the peers those that are installed; the command draws and
tabulates with the packages of `pip install "jax_sce[benchmark]"`, and `compiled` compiles with those of
`pip install "jax_sce[compiled]"`.
"""

from ._compare import compare as compare
from ._measure import Quartiles as Quartiles
from ._row import Cost as Cost, Row as Row
