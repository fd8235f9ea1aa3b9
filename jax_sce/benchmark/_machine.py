"""The machine that is measured on: its memory, its cores, its name."""

import os
import platform
from pathlib import Path
from typing import Any

import jax


def cores() -> int:
    """Those that this process may use, which are the threads that XLA starts on CPU."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_bytes() -> int | None:
    """The memory of JAX's default device, None if it is not known."""
    if jax.default_backend() != "cpu":
        return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def available_bytes() -> int | None:
    """What of it is free; where that is not known, all of it."""
    if jax.default_backend() != "cpu":
        stats = jax.devices()[0].memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    if kibibytes := proc_field("/proc/meminfo", "MemAvailable"):
        return int(kibibytes.split()[0]) * 1024
    return total_bytes()


def proc_field(path: str, name: str) -> str | None:
    """The value of `name: value` in a file that Linux has and other systems do not."""
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def hardware() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": proc_field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": cores(),
        "memory_bytes": total_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }
