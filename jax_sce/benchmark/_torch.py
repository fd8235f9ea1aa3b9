"""PyTorch's `cross_entropy` as a peer: on the same device, in the same memory, with as many threads."""

from typing import Any

import jax
from jax import Array

from ._cases import Case
from ._machine import cores
from ._programs import Output, Program, Run, total_bytes

PASSES = ("forward", "value_and_grad")


def torch_program(case: Case, pass_name: str, *, compiled: bool = False) -> Program:
    """The logits of a linear head are a matrix product in the case's dtype, as PyTorch's layers give."""
    import torch
    from torch.backends.cpu import get_cpu_capability
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(cores())
    has_16_bit_products = jax.default_backend() != "cpu" or get_cpu_capability() != "AVX2"
    if case.subject == "linear" and case.dtype == "bfloat16" and not has_16_bit_products:
        raise NotImplementedError("not run: without AVX-512 its bfloat16 products are very slow")

    def loss(*arguments: Any) -> Any:
        *floats, labels = arguments
        logits = floats[0] @ floats[1] if case.subject == "linear" else floats[0]
        return cross_entropy(logits, labels)

    function = torch.compile(loss) if compiled else loss

    def start(arrays: tuple[Array, ...]) -> Run:
        *floats, labels = (torch.from_dlpack(x) for x in arrays)
        if not labels.is_floating_point():
            labels = labels.long()
        if pass_name == "value_and_grad":
            floats = [x.detach().requires_grad_() for x in floats]

        def run() -> Output:
            if pass_name == "value_and_grad":
                value = function(*floats, labels)
                output = value.detach(), torch.autograd.grad(value, floats)
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
    logits_bytes = case.shape[0] * case.shape[-1] * floats[0].dtype.itemsize
    return Program(start, total_bytes([*floats, *floats, labels]) + 4 * logits_bytes)
