"""What the compiled kernels do to rows between linear layers; None where they cannot, and torch's operators must.

Covers fp32 on CPUs. A number's bits depend on its row alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from worker.native.library import Kernel, library


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor | None:
    """Return `x / sqrt(mean(x^2) + epsilon) * weight` for `[..., size]`."""
    if not _is_fit(x):
        return None
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    _rms_norm()(x, weight, epsilon, out, x.numel() // size, size, torch.get_num_threads())
    return out


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor | None:
    """Return `silu(gate) * up` for `[..., size]`, which may be views of rows that hold both."""
    size = gate.shape[-1]
    stride = gate.stride(-2) if gate.dim() > 1 else size
    is_even = gate.stride() == up.stride() and gate.stride(-1) == 1
    if not (_is_fit(gate) and is_even and (gate.dim() < 3 or gate.shape[:-2].numel() == 1)):
        return None
    out = gate.new_empty(gate.shape)
    _silu_multiply()(gate, up, stride, out, out.numel() // size, size, torch.get_num_threads())
    return out


def _is_fit(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.device.type == "cpu" and library() is not None


@cache
def _rms_norm() -> Kernel:
    return Kernel("rms_norm", "ppfpiii")


@cache
def _silu_multiply() -> Kernel:
    return Kernel("silu_multiply", "ppipiii")
