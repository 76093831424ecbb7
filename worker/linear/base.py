"""What every linear layer shares: its interface, the choice of numbers, and scratch memory.

Covers no arithmetic; the other modules of this package multiply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class LinearNumerics:
    """How the linear layers of a stage compute."""

    compute: torch.dtype  # of inputs and outputs
    device: torch.device
    is_exact: bool  # a row's bits must not depend on the others
    outlier_threshold: float = 6.0  # of int8: larger inputs keep 16 bits, and so do those that stand out; 0: none
    is_checked: bool = False  # exact ones are refused where this machine's library does otherwise


class Scratch:
    """One buffer that the layers of a stage use in turn, so that converting weights allocates nothing."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return `[rows, columns]` with any content; the next call may return the same memory."""
        num_bytes = rows * columns * dtype.itemsize
        if self._buffer.numel() < num_bytes:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffer[:num_bytes].view(dtype).view(rows, columns)


class Linear(nn.Module):
    """`x @ weight.T + bias`; subclasses multiply rows `[num_rows, in]`, at least `min_rows` of them."""

    def __init__(self, num_out: int, bias: Tensor | None, min_rows: int = 1) -> None:
        super().__init__()
        self.num_out, self.bias, self.min_rows = num_out, bias, min_rows

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, x.shape[-1])
        missing = max(0, self.min_rows - rows.shape[0])
        out = self.multiply(functional.pad(rows, (0, 0, 0, missing)) if missing else rows)
        return out[: rows.shape[0]].view(*x.shape[:-1], self.num_out)

    def multiply(self, rows: Tensor) -> Tensor:
        """Return `[num_rows, out]`."""
        raise NotImplementedError
