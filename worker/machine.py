"""What the machine under a worker offers: memory within its control groups, cores, device names.

Covers reading facts; what to do with them is `coordinator.placement`'s. The numerics-relevant instruction set is
`worker.numerics`'s.
"""

from __future__ import annotations

import math
import os
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from cluster.errors import ConfigurationError
from worker.cgroup import memory_limits

PACKAGES = ("spanwise", "torch", "transformers", "safetensors", "grpcio", "protobuf", "ray", "huggingface_hub")
MEMORY_SHARE = 0.85
"""Part of the free memory that workers may plan with: page cache and other tenants need the rest."""

MONITOR_THRESHOLD = 0.95  # Ray's own default
MONITOR_MARGIN = 0.02  # of all memory: the monitor looks only from time to time


def num_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory() -> tuple[int, int]:
    """Return (free, total) bytes of the machine, or of the tightest control group where that is smaller."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    for limit, used in memory_limits():
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return free, total


def usable_memory() -> int:
    """Return the bytes that all workers of this machine may plan with: free ones, with a margin, below the share of
    memory in use at which Ray's monitor ends workers."""
    free, total = host_memory()
    return max(0, int(min(MEMORY_SHARE * free, _free_below_monitor(free, total))))


def _free_below_monitor(free: int, total: int) -> int:
    return int(free - (1 - monitor_threshold(os.environ) + MONITOR_MARGIN) * total)


def monitor_threshold(environment: Mapping[str, str]) -> float:
    """Return the share of memory in use at which Ray's memory monitor ends workers."""
    try:
        return float(environment.get("RAY_memory_usage_threshold", MONITOR_THRESHOLD))
    except ValueError:
        return MONITOR_THRESHOLD


def check_memory(asked_bytes: int, num_workers: int, taken_bytes: int) -> None:
    """Raise ConfigurationError when the workers of this machine are given more than it can let them have now, or less
    than the process of one of them takes already, which is `taken_bytes`."""
    free, total = host_memory()
    given = f"--memory gives {_size(asked_bytes)} to each of {num_workers} worker(s) of {socket.gethostname()}"
    if asked_bytes <= taken_bytes:
        raise ConfigurationError(
            f"{given}, whose process takes {_size(taken_bytes)} before it loads anything: give more than that"
        )
    limit = taken_bytes + max(0, _free_below_monitor(free, total)) // num_workers
    if asked_bytes > limit:
        threshold = monitor_threshold(os.environ)
        raise ConfigurationError(
            f"{given}. That machine, or the control group there, has {_size(free)} free of "
            f"{_size(total)}, and Ray's memory monitor ends workers when {threshold:.0%} of it is used: give each "
            f"at most {math.floor(limit / 2**30 * 10) / 10} GiB"  # what is free differs from one moment to the next
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def process_bytes() -> int:
    """Return what this process takes now."""
    return int(psutil.Process().memory_info().rss)


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """Return (free, total) bytes of a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)


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
