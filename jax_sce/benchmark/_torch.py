"""The peers in PyTorch: on the same device, in the same memory, with as many threads.

`cross_entropy`, eager or under `torch.compile`; of a linear head its logits are a matrix product in the
case's dtype, as PyTorch's layers give. Liger-Kernel and cut-cross-entropy, for heads on NVIDIA GPUs,
take the kernel as [V, D]: given a transposed copy, made before the clock starts.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from ._cases import Case
from ._machine import cores
from ._programs import Output, Program, Run, total_bytes

PASSES = ("forward", "value_and_grad")


def torch_program(case: Case, pass_name: str, *, by: str = "eager") -> Program:
    """`by` is "eager", "compiled", "liger" or "cut"."""
    import torch
    from torch.backends.cpu import get_cpu_capability

    torch.set_num_threads(cores())
    has_16_bit_products = jax.default_backend() != "cpu" or get_cpu_capability() != "AVX2"
    if case.subject == "linear" and case.dtype == "bfloat16" and not has_16_bit_products:
        raise NotImplementedError("not run: without AVX-512 its bfloat16 products are very slow")
    function = _function(case, by)

    def start(arrays: tuple[Array, ...]) -> Run:
        *floats, labels = (torch.from_dlpack(x) for x in arrays)
        if not labels.is_floating_point():
            labels = labels.long()
        if by in _HEADS:
            floats[1] = floats[1].T.contiguous()
        if pass_name == "value_and_grad":
            floats = [x.detach().requires_grad_() for x in floats]

        def run() -> Output:
            if pass_name == "value_and_grad":
                value = function(*floats, labels)
                gradients = torch.autograd.grad(value, floats)
                if by in _HEADS:
                    gradients = gradients[0], gradients[1].T
                output = value.detach(), gradients
            else:
                with torch.no_grad():
                    output = function(*floats, labels), ()
            if floats[0].is_cuda:
                torch.cuda.synchronize()
            return output

        return run

    # PyTorch does not say what it will need: at most the logits, what it keeps of them, and the
    # gradient and its cotangent, besides the arguments and as many bytes of gradients.
    *floats, labels = case.arguments()
    logits_bytes = 0 if by in _HEADS else case.shape[0] * case.shape[-1] * floats[0].dtype.itemsize
    return Program(start, total_bytes([*floats, *floats, labels]) + 4 * logits_bytes)


def _function(case: Case, by: str) -> Callable[..., Any]:
    import torch
    from torch.nn.functional import cross_entropy

    if by in _HEADS:
        return _HEADS[by]()

    def loss(*arguments: Any) -> Any:
        *floats, labels = arguments
        logits = floats[0] @ floats[1] if case.subject == "linear" else floats[0]
        return cross_entropy(logits, labels)

    return torch.compile(loss) if by == "compiled" else loss


def _liger() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _cut() -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


_HEADS: dict[str, Callable[[], Callable[..., Any]]] = {"liger": _liger, "cut": _cut}
