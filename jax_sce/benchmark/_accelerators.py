"""The accelerators that XLA can compile for without having one, and a bound of a program's time there.

Bandwidths and rates of dense matrix products are those of the makers' data sheets (NVIDIA's
H100 SXM, H200 and HGX B200; Google Cloud's TPU v5p, v6e and v5e). A product of float32 takes JAX's
default precision: TF32 on NVIDIA, one pass in bfloat16 on TPUs; "high" takes three passes there, and
"highest" six.
"""

import dataclasses
import importlib.metadata
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._command import how_to_install
from .._hlo import Kernel

_MOST_DEVICES = 256
_WITHOUT_TPU = {  # so that libtpu neither asks about one nor locks it
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    name: str
    platform: str  # JAX's: "gpu" or "tpu"
    bandwidth: float  # bytes of its memory in a second
    rates: Mapping[str, float]  # operations in a second, by the precision of a product's operands
    config: str = ""  # of GPUs, what XLA chooses kernels by

    def devices(self, count: int) -> Sequence[Any]:
        """This many devices, to compile for.

        Raises:
          ModuleNotFoundError: The compiler is not installed.
          RuntimeError: JAX has started without the compiler.
          ValueError: There is no machine with this many.
        """
        from jax.experimental import topologies

        if count > _MOST_DEVICES:
            raise ValueError(f"a mesh may have {_MOST_DEVICES} devices at most, got {count}")
        self._check_installed()
        if self.platform == "gpu":
            described = {"platform": "cuda", "target_config": self.config}
            try:
                topology = topologies.get_topology_desc(topology=f"1x1x{count}", **described)
            except NotImplementedError:
                raise RuntimeError(
                    "JAX was used before and started without the CUDA plugin: set "
                    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment"
                ) from None
            return topology.devices
        if count & (count - 1) or count == 2:
            raise ValueError(
                f"a mesh of {self.name} must have 1, 4, 8, 16 ... devices, got {count}"
            )
        sides = [1] * (3 if self.name == "v5p" else 2)
        for _ in range(max(count, 4).bit_length() - 1):  # a host has four
            sides[sides.index(min(sides))] *= 2
        name = f"{self.name}:{'x'.join(map(str, sides))}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:count]

    def _check_installed(self) -> None:
        absent = ""
        if self.platform == "tpu":
            absent = "" if _has_package("libtpu") else "libtpu"
        elif not (_has_package("jax-cuda13-plugin") or _has_package("jax-cuda12-plugin")):
            absent = "jax-cuda13-plugin"
        elif not (_has_package("nvidia-cuda-nvcc") or shutil.which("ptxas")):
            absent = "nvidia-cuda-nvcc"
        if absent:
            raise ModuleNotFoundError(f"{self.name} needs {absent}: {how_to_install('compiled')}")

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Autotuning runs kernels, for which a device is needed."""
        is_gpu = self.platform == "gpu"
        options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
        return options if is_gpu else {}

    def seconds(self, kernels: Sequence[Kernel]) -> float | None:
        """The least time of these kernels, one after the other: each moves its bytes and multiplies at
        once. None if the operations of one are not known."""
        if any(kernel.opaque for kernel in kernels):
            return None
        return sum(
            kernel.times
            * max(
                kernel.bytes / self.bandwidth,
                sum(p.operations / self._rate(p.precision) for p in kernel.products),
            )
            for kernel in kernels
        )

    def _rate(self, precision: str) -> float:
        return self.rates.get(precision, self.rates["f32"])


def _has_package(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _nvidia(
    name: str, bandwidth: float, rates: Mapping[str, float], memory: float, *, cores: int,
    cache: int, capability: int,
) -> Accelerator:  # fmt: skip
    config = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores}
      fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache}
      clock_rate_ghz: 1.98 device_memory_size: {memory:.0f}
      shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: {capability} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
    device_description_str: "NVIDIA {name.upper()}"
    """
    return Accelerator(name, "gpu", bandwidth, rates, config)


def _tpu(name: str, bandwidth: float, rate: float) -> Accelerator:
    rates = {"bf16": rate, "f32": rate, "f32 high": rate / 3, "f32 highest": rate / 6}
    return Accelerator(name, "tpu", bandwidth, rates)


_HOPPER = {"bf16": 989e12, "f16": 989e12, "f32": 494e12, "f32 highest": 67e12, "f64": 67e12}
_BLACKWELL = {"bf16": 2250e12, "f16": 2250e12, "f32": 1125e12, "f32 highest": 75e12, "f64": 37e12}

ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        _nvidia("h100", 3.35e12, _HOPPER, 80e9, cores=132, cache=50 * 2**20, capability=9),
        _nvidia("h200", 4.8e12, _HOPPER, 141e9, cores=132, cache=50 * 2**20, capability=9),
        _nvidia("b200", 7.7e12, _BLACKWELL, 180e9, cores=148, cache=126 * 2**20, capability=10),
        _tpu("v5e", 819e9, 197e12),
        _tpu("v5p", 2765e9, 459e12),
        _tpu("v6e", 1640e9, 918e12),
    )
}


def prepare() -> None:
    """Sets the environment variables by which JAX loads the CUDA plugin without NVIDIA's libraries, and
    libtpu without a TPU. To be called before JAX starts."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev/vfio").glob("[0-9]*")):
        for name, value in _WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
