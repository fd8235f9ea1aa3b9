"""The native CPU kernel: whether it is in use, and if not, why.

    python -c "from jax_sce import native; print(native.status())"

If there is a C++ compiler, installing the package compiles the kernel.
Without the kernel the losses have the same error bounds, but are slower.

The environment variable `JAX_SCE_NATIVE` is read once, when the first loss
is traced or `status()` is first called:

    unset or 1    the best kernel for this processor
    0             no native kernel
    baseline, x86_64_v3 or x86_64_v4
                  the kernel for that instruction set

A kernel that uses instructions that the processor lacks is never chosen.

The library is not used if it cannot be loaded, is not this package's, or
was built for a newer or incompatible jaxlib; `status()` says why. Loading a
truncated file (cut after its first page) crashes the process, as with any
shared library: reinstall. An editable installation keeps the library that
it built: if you change the C++ sources, build again.
"""

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax

__all__ = ["Status", "status"]

TARGETS = (
    "label_statistics", "label_cotangent", "target_statistics", "target_cotangent", "spread",
    "divergence_sums", "divergence_cotangent",
)  # fmt: skip


class Status(NamedTuple):
    """Whether the native kernel is available. `detail` is its instruction set,
    or the reason why not."""

    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{'native' if self.available else 'no native'} kernel: {self.detail}"


@functools.cache
def status() -> Status:
    """Load the native kernel, once, and say whether it can be used.

    Returns:
      A `Status`: `available`, and in `detail` the instruction set or the reason.

    Raises:
      ValueError: `JAX_SCE_NATIVE` has a value that the module's docstring does
        not list, or names an instruction set that this processor lacks or that
        the kernel was not built for.

    Example:
      >>> from jax_sce import native
      >>> isinstance(native.status().available, bool)
      True
    """
    choice = os.environ.get("JAX_SCE_NATIVE") or "1"
    if choice == "0":
        return Status(False, "JAX_SCE_NATIVE=0 switches it off")
    library = _find()
    if library is None:
        return Status(False, "it was not built; `pip install -v` shows why")
    try:
        return _load(ctypes.CDLL(str(library)), choice)
    except (OSError, AttributeError) as error:  # built for another platform or version, or damaged
        return Status(False, str(error))


def _find() -> Path | None:
    """The compiled library, in the package or in the build folder of an editable installation."""
    from . import _native

    paths = [Path(folder, "libjax_sce_rows.so") for folder in _native.__path__]
    return next((path for path in paths if path.exists()), None)


def _load(library: ctypes.CDLL, choice: str) -> Status:
    built = library.jax_sce_ffi_major(), library.jax_sce_ffi_minor()
    running = _ffi_version()
    if running is not None and (built[0] != running[0] or built > running):
        needed, has = (".".join(map(str, x)) for x in (built, running))
        why = f"built for version {needed} of XLA's FFI, and the installed jaxlib has {has}"
        return Status(False, f"{why}: reinstall jax_sce")
    library.jax_sce_use.restype = ctypes.c_char_p
    level = library.jax_sce_use(b"best" if choice == "1" else choice.encode())
    if level is None:
        raise ValueError(
            "JAX_SCE_NATIVE must be 0, 1, or an instruction set that the kernel was built for and this "
            f"processor has, got {choice!r}"
        )
    for target in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, f"jax_sce_{target}"))
        try:
            jax.ffi.register_ffi_target(f"jax_sce.{target}", handler, platform="cpu")
        except Exception as error:  # XLA raises a type of error that is not public
            return Status(False, f"XLA refuses it: {error}")
    return Status(True, level.decode())


def _ffi_version() -> tuple[int, int] | None:
    """The version of XLA's FFI in the installed jaxlib, or None. Only a header that it ships says it."""
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h")
    if not header.exists():
        return None
    major, minor = (
        re.search(rf"#define XLA_FFI_API_{part} (\d+)", header.read_text())
        for part in ("MAJOR", "MINOR")
    )
    return (int(major[1]), int(minor[1])) if major and minor else None
