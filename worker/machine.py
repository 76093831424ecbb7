"""What the machine under a worker offers: memory within its cgroup, cores, device names.

Covers reading facts; what to do with them is `coordinator.placement`'s. The numerics-relevant instruction set is
`worker.linear.isa`'s.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from cluster.errors import ConfigurationError

PACKAGES = ("spanwise", "torch", "transformers", "safetensors", "grpcio", "protobuf", "ray", "huggingface_hub")
MEMORY_SHARE = 0.85
"""Part of the free memory that workers may plan with: Ray's memory monitor kills at 95 % of the node, and the process
itself, page cache and other tenants need the rest."""

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def num_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory() -> tuple[int, int]:
    """Return (free, total) bytes of the machine, or of the cgroup where that is smaller."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    for limit, used in _cgroup_limits():
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return free, total


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used without reclaimable page cache) of the cgroup v2 and v1 mounts that have one."""
    sources = (
        (_CGROUP, "memory.max", "memory.current", "file"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    )
    for folder, limit_name, used_name, cache_key in sources:
        try:
            limit_text = (folder / limit_name).read_text().strip()
            used = int((folder / used_name).read_text())
            cache = _stat_value((folder / "memory.stat").read_text(), cache_key)
        except (OSError, ValueError):
            continue  # not this cgroup version, or not limited here
        if limit_text != "max" and int(limit_text) < _UNLIMITED:
            yield int(limit_text), max(0, used - cache)


def _stat_value(text: str, key: str) -> int:
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return (free, total) bytes of the memory that holds a worker's weights."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    return host_memory()


def choose_device(num_gpus: float) -> torch.device:
    """Return cuda:0 for a worker that owns a GPU (Ray hides the others from it), else the CPU.

    Raises ConfigurationError with the way out when the GPU is there but this torch wheel cannot use it.
    """
    if num_gpus <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "Ray gave this worker a GPU, but torch sees none: the wheel is CPU-only or the driver is too old for it; "
            "install torch built for your driver's CUDA version (see README, GPU), or pass --gpus 0"
        )
    capability = torch.cuda.get_device_capability(0)
    built_for = [int(arch.removeprefix("sm_")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    if built_for and capability[0] * 10 + capability[1] < min(built_for):
        raise ConfigurationError(
            f"{torch.cuda.get_device_name(0)} (compute capability {capability[0]}.{capability[1]}) is older than what "
            f"this torch wheel was built for (sm_{min(built_for)} and newer): install a wheel for an older CUDA "
            "version, or serve from this machine's CPU with --gpus 0"
        )
    return torch.device("cuda:0")


def device_name(device: torch.device) -> str:
    """Return the processor's or GPU's product name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the generic name below
    return platform.processor() or platform.machine()


def package_versions() -> tuple[tuple[str, str], ...]:
    """Return (package, version) of what a placement's numerics and protocol depend on."""
    found = []
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue  # run from a source tree, or not needed here
    return tuple(found)
