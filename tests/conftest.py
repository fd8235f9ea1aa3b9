"""All tests run on CPU with eight virtual devices, and under JAX's strictest promotion rules.

Set JAX_PLATFORMS to run them elsewhere. XLA does not optimize their programs, which halves the time;
with `--optimized` they are the programs that users get.
"""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

from jax_sce.benchmark._accelerators import prepare

prepare()  # for programs that are compiled for GPUs and TPUs

# The same draws every time: no run fails because of a draw that others did not make. For more draws:
# `--hypothesis-profile=thorough`.
hypothesis.settings.register_profile("usual", max_examples=50, derandomize=True, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=3000, deadline=None)
hypothesis.settings.load_profile("usual")


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run the tests marked thorough, too")
    parser.addoption("--optimized", action="store_true", help="compile as XLA does by default")


def pytest_configure(config):
    """Before the first program is compiled, which is when XLA reads its flags."""
    flags = ["xla_force_host_platform_device_count=8"]
    if not config.getoption("optimized"):
        flags += ["xla_backend_optimization_level=0", "xla_llvm_disable_expensive_passes=true"]
        if jax.__version_info__ < (0, 11):  # later ones know no other emitters, and abort
            flags += ["xla_cpu_use_fusion_emitters=false", "xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), *(f"--{f}" for f in flags)]
    )


def pytest_collection_modifyitems(config, items):
    """Without `--thorough`, leave out what other tests see too: see `support.covering`."""
    if not config.getoption("thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


def pytest_collection_finish():
    """The garbage collector need not go through JAX for every program that is traced."""
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.fixture(autouse=True)
def strict_promotion():
    """Of every test in this folder; the doctests beside them show what a user sees."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def lax_promotion():
    """JAX's defaults, for code that is not ours."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
