"""Linear layers over weights as stored.

Covers which product computes them; `worker.weights` brings the weights, `worker.numerics` chooses dtypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.model_spec import Precision
from worker.numerics import DTYPES

ROW_TILE = 16  # products of this many rows give a row the same bits whatever the others hold
SCRATCH_BYTES = 1 << 20  # upcast weights at a time: stays in a core's second-level cache


class Scratch:
    """One buffer that the layers of a stage use in turn, so that upcasting allocates nothing."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, rows: int, columns: int) -> Tensor:
        """Return `[rows, columns]` of fp32 with any content; the next call may return the same memory."""
        if self._buffer.numel() < rows * columns:
            self._buffer = torch.empty(rows * columns)
        return self._buffer[: rows * columns].view(rows, columns)


class DenseLinear(nn.Module):
    """`x @ weight.T + bias` in the weight's own dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.weight_bytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return functional.linear(x, self.weight, self.bias)


class UpcastLinear(nn.Module):
    """`x @ weight.T + bias` in fp32 over 16-bit weights, upcast a cache-sized tile of output rows at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> None:
        super().__init__()
        self.weight, self.scratch = weight, scratch
        self.bias = bias.float() if bias is not None else None
        self.weight_bytes = weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)
        self._tile_rows = max(1, SCRATCH_BYTES // (4 * weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(rows.shape[0], self.weight.shape[0])
        for start in range(0, self.weight.shape[0], self._tile_rows):
            stored = self.weight[start : start + self._tile_rows]
            tile = self.scratch.take(*stored.shape).copy_(stored)
            torch.mm(rows, tile.t(), out=out[:, start : start + self._tile_rows])
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


class RowTiledLinear(nn.Module):
    """Pads rows to a multiple of `ROW_TILE`, so that a row's result does not depend on how many others there are."""

    def __init__(self, inner: DenseLinear | UpcastLinear) -> None:
        super().__init__()
        self.inner, self.weight_bytes = inner, inner.weight_bytes

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, x.shape[-1])
        padding = -rows.shape[0] % ROW_TILE
        out: Tensor = self.inner(functional.pad(rows, (0, 0, 0, padding)))
        return out[: rows.shape[0]].view(*x.shape[:-1], -1)


def build_linear(
    weight: Tensor,
    bias: Tensor | None,
    *,
    precision: Precision,
    compute_dtype: torch.dtype,
    device: torch.device | str,
    is_exact: bool,
    scratch: Scratch | None = None,
) -> nn.Module:
    """Return a module that maps `[..., in]` to `[..., out]` in `compute_dtype`, with an attribute `weight_bytes`.

    `weight` is `[out, in]` in any dtype and is stored in `precision`; layers of one stage share a `scratch`.
    """
    stored = weight.to(device=device, dtype=DTYPES[precision.value]).contiguous()
    bias = bias.to(device=device, dtype=compute_dtype) if bias is not None else None
    if stored.dtype == compute_dtype:
        inner: DenseLinear | UpcastLinear = DenseLinear(stored, bias)
    else:
        inner = UpcastLinear(stored, bias, scratch or Scratch())
    return RowTiledLinear(inner) if is_exact else inner
