"""What arithmetic this machine does well, and the names by which numerics fingerprints tell machines apart."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from cluster.model_spec import Precision
from worker.native.library import library

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of dtypes, as settings and `Precision` spell them."""


def has_native_bf16() -> bool:
    """Tell whether this CPU multiplies bf16 in hardware (avx512_bf16 or AMX) rather than by emulation."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype of DTYPES."""
    return next(name for name, known in DTYPES.items() if known is dtype)


def choose_compute_dtype(
    precision: Precision, device: torch.device, *, is_bf16_native: bool, asked: str = "auto"
) -> torch.dtype:
    """Return the dtype to compute in with weights stored in `precision`; `asked` is a name of DTYPES or "auto".

    CUDA computes in the stored dtype, or bf16 with quantized weights. A CPU computes in fp32, except with bf16 and NF4
    weights where bf16 is native: a tenth of the time with NF4, whose own error of some 9 % of a product hides the
    0.2 % of bf16. Products of int8 are exact integers, which bf16 outputs would only round.
    """
    if asked != "auto":
        return DTYPES[asked]
    if device.type == "cuda":
        return torch.bfloat16 if precision.is_quantized else DTYPES[precision.value]
    return torch.bfloat16 if is_bf16_native and precision in (Precision.BF16, Precision.NF4) else torch.float32


def isa(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name what decides the bits of a product on `device`: instruction sets and CPU vendor, or the GPU's architecture.

    Our compiled kernels count, since they sum in another order than torch; the vendor counts, since MKL takes other
    kernels on other vendors' processors.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    words = [torch.backends.cpu.get_cpu_capability().lower()]
    if has_native_bf16():
        words.append("bf16")
    if library() is not None:
        words.append("kernels")
    return " ".join([*words, _cpu_vendor(cpuinfo)])


def _cpu_vendor(cpuinfo: Path) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendors = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(vendors, platform.machine())
