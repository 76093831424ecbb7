"""Linear layers over weights as stored.

Covers which product computes them; `worker.loading` brings the weights, `worker.numerics` chooses dtypes. On CPUs all
of them are oneDNN's, over weights packed for it where they are stored in the compute dtype: at 4 to 16 rows on one
thread that takes about half the time of `torch.nn.functional.linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.errors import ConfigurationError
from cluster.model_spec import Precision
from worker.numerics import DTYPES

MIN_ROWS = 4  # oneDNN takes longer for 1 to 3 rows than for 4, and only a single row gets other bits than among others
FIXED_ROWS = 64  # of exact products where a library's bits depend on the number of rows
PACKING_ROWS = 8  # the number of rows to pack for; packs for 8 to 512 take equally long at every number of rows
SCRATCH_BYTES = 4 << 20  # of upcast weights at a time; oneDNN's cost per call outweighs a better fitting cache


class Scratch:
    """One buffer that the layers of a stage use in turn, so that upcasting allocates nothing."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, rows: int, columns: int) -> Tensor:
        """Return `[rows, columns]` of fp32 with any content; the next call may return the same memory."""
        if self._buffer.numel() < rows * columns:
            self._buffer = torch.empty(rows * columns)
        return self._buffer[: rows * columns].view(rows, columns)


class Linear(nn.Module):
    """`x @ weight.T + bias`; subclasses multiply rows `[num_rows, in]`, at least `min_rows` of them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, min_rows: int = 1) -> None:
        super().__init__()
        self.weight_bytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.weight, self.bias, self.min_rows = weight, bias, min_rows

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        rows = x.reshape(-1, x.shape[-1])
        missing = max(0, self.min_rows - rows.shape[0])
        out = self.multiply(functional.pad(rows, (0, 0, 0, missing)) if missing else rows)
        return out[: rows.shape[0]].view(*x.shape[:-1], out.shape[1])

    def multiply(self, rows: Tensor) -> Tensor:
        """Return `[num_rows, out]`."""
        raise NotImplementedError


class PlainLinear(Linear):
    """torch's own product, for devices without oneDNN."""

    def multiply(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight, self.bias)


class FixedRowsLinear(PlainLinear):
    """torch's own product, always of FIXED_ROWS rows: a row's bits do not depend on how many others there are."""

    def multiply(self, rows: Tensor) -> Tensor:
        padded = functional.pad(rows, (0, 0, 0, -rows.shape[0] % FIXED_ROWS))
        return torch.cat([super(FixedRowsLinear, self).multiply(tile) for tile in torch.split(padded, FIXED_ROWS)])


class PackedLinear(Linear):
    """oneDNN's product over weights in oneDNN's own layout, which depends on this machine: never store it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias, MIN_ROWS)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_ROWS)

    def multiply(self, rows: Tensor) -> Tensor:
        return _onednn(rows, self.weight, self.bias)


class UpcastLinear(Linear):
    """oneDNN's product in fp32 over 16-bit weights, upcast a cache-sized tile of output rows at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scratch: Scratch, min_rows: int) -> None:
        super().__init__(weight, bias, min_rows)
        self.scratch, self._tile = scratch, max(1, SCRATCH_BYTES // (4 * weight.shape[1]))

    def multiply(self, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], self.weight.shape[0])
        for start in range(0, self.weight.shape[0], self._tile):
            stored = self.weight[start : start + self._tile]
            bias = None if self.bias is None else self.bias[start : start + self._tile]
            upcast = self.scratch.take(stored.shape[0], stored.shape[1]).copy_(stored)
            out[:, start : start + self._tile] = _onednn(rows, upcast, bias)
        return out


def build_linear(
    weight: Tensor,
    bias: Tensor | None,
    *,
    precision: Precision,
    compute_dtype: torch.dtype,
    device: torch.device | str,
    is_exact: bool,
    scratch: Scratch | None = None,
) -> Linear:
    """Return a module that maps `[..., in]` to `[..., out]` in `compute_dtype`.

    `weight` is `[out, in]` in any dtype and is stored in `precision`; layers of one stage share a `scratch`. With
    `is_exact` a row's bits do not depend on the others; raises ConfigurationError where this machine cannot do that.
    """
    stored = weight.to(device=device, dtype=DTYPES[precision.value]).contiguous()
    bias = bias.to(device=device, dtype=compute_dtype) if bias is not None else None
    linear: Linear
    if stored.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        linear = (FixedRowsLinear if is_exact else PlainLinear)(stored, bias)
    elif stored.dtype == compute_dtype:
        linear = PackedLinear(stored, bias)
    else:
        linear = UpcastLinear(stored, bias, scratch or Scratch(), MIN_ROWS if is_exact else 1)
    if is_exact:
        _check_rows(linear, stored.new_zeros(1, stored.shape[1], dtype=compute_dtype))
    return linear


def _check_rows(linear: Linear, zeros: Tensor) -> None:
    """Raise ConfigurationError unless a row `[1, in]` alone and among others has the same bits on this machine."""
    row = torch.linspace(-8, 8, zeros.shape[1]).sin().to(zeros)
    alone, among = linear(zeros + row), linear(zeros.expand(37, -1) + row)
    if not torch.equal(alone.expand_as(among), among):
        raise ConfigurationError(
            "this machine's matrix products round a row differently when others are computed with it, so exact "
            "results are not possible here: serve without --exact"
        )


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
