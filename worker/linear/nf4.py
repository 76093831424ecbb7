"""Linear layers over 4-bit weights.

On CPUs a compiled kernel multiplies codes as they are stored, so a weight may as well be streamed. Where it cannot
(without the compiled library, in fp16 where oneDNN multiplies that, or where blocks of 64 do not end with rows),
cache-sized tiles are turned into floats by bitsandbytes and multiplied by oneDNN. On CUDA bitsandbytes does it all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.linear.base import Linear, LinearNumerics
from worker.linear.floating import MIN_ROWS, onednn_linear
from worker.native.nf4 import Nf4Product, is_possible
from worker.quantization.nf4 import BLOCK, VALUES, decode_absmax, tiles
from worker.stored_weight import Piece, StoredWeight, hold

FLOAT_TILE_BYTES = 4 << 20  # of weights turned into floats; oneDNN's cost per call outweighs a better fitting cache


class TiledNf4Linear(Linear):
    """Turns a tile into floats, multiplies with it, and takes the next."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics) -> None:
        super().__init__(weight.shape[0], bias, MIN_ROWS if numerics.is_exact else 1)
        self.weight = hold(weight)
        _library()  # defines the kernel

    def multiply(self, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], self.num_out)
        for span, codes, absmax in tiles(self.weight, FLOAT_TILE_BYTES // rows.itemsize):
            floats = _to_floats(codes, absmax, len(span), self.weight.shape[1], rows.dtype)
            bias = None if self.bias is None else self.bias[span.start : span.stop]
            out[:, span.start : span.stop] = onednn_linear(rows, floats, bias)
        return out


class CompiledNf4Linear(Linear):
    """Multiplies codes as they are stored, in compiled kernels."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None) -> None:
        super().__init__(weight.shape[0], bias)
        self.weight, self._product = hold(weight), Nf4Product(weight.shape[1], weight.small)

    def multiply(self, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], self.num_out)
        inputs = self._product.lay_out(rows)
        for piece in self.weight.pieces():
            self._product.multiply(inputs, piece, self.bias, out)
        return out


class CudaNf4Linear(Linear):
    """bitsandbytes' product on CUDA, for which blocks of 64 must end with rows; torch's of floats where they do not.

    A resident weight takes there what it takes on the disk: absmaxes are decoded on the device when they are used, as
    those of a streamed one.
    """

    def __init__(self, weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics) -> None:
        super().__init__(weight.shape[0], bias)
        self.weight, self._device = weight, numerics.device
        self._small = _move(weight.small, numerics.device)
        self._values = torch.tensor(VALUES).to(numerics.device)
        self._held = None if weight.is_streamed else [self._to_device(piece) for piece in weight.pieces()]
        _library()  # defines the kernels

    def multiply(self, rows: Tensor) -> Tensor:
        pieces = self._held if self._held is not None else map(self._to_device, self.weight.pieces())
        out = rows.new_empty(rows.shape[0], self.num_out)
        for piece in pieces:
            out[:, piece.first_row : piece.first_row + piece.num_rows] = self._multiply(rows, piece)
        return out if self.bias is None else out.add_(self.bias)

    def _multiply(self, rows: Tensor, piece: Piece) -> Tensor:
        num_rows, num_columns, codes = piece.num_rows, self.weight.shape[1], piece.tensors["weight"]
        blocks = range(-(-num_rows * num_columns // BLOCK))
        absmax = decode_absmax(piece.tensors, self._small, blocks, piece.first_row * num_columns // BLOCK)
        if num_columns % BLOCK:
            return functional.linear(rows, _to_floats(codes, absmax, num_rows, num_columns, rows.dtype))
        shape = torch.Size((num_rows, num_columns))
        state = _library().functional.QuantState(absmax, shape, self._values, BLOCK, "nf4", rows.dtype)
        product: Tensor = _library().matmul_4bit(rows, codes[:, None], state)
        return product

    def _to_device(self, piece: Piece) -> Piece:
        return Piece(piece.first_row, piece.num_rows, _move(piece.tensors, self._device))


def build_nf4(weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics) -> Linear:
    """Return the layer that suits device, compute dtype and shape."""
    if numerics.device.type != "cpu":
        return CudaNf4Linear(weight, bias, numerics)
    if is_possible(weight.shape[1], numerics.compute):
        return CompiledNf4Linear(weight, bias)
    return TiledNf4Linear(weight, bias, numerics)


def _to_floats(codes: Tensor, absmax: Tensor, num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    missing = absmax.numel() * BLOCK // 2 - codes.numel()
    whole = functional.pad(codes, (0, missing)) if missing else codes
    shape = (absmax.numel(), BLOCK)
    blocks: Tensor = torch.ops.bitsandbytes.dequantize_4bit(whole, absmax, BLOCK, "nf4", shape, dtype)
    return blocks.view(-1)[: num_rows * num_columns].view(num_rows, num_columns)


def _move(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {role: tensor.to(device) for role, tensor in tensors.items()}


@cache
def _library() -> Any:
    """Import bitsandbytes, which takes seconds, without its warning about a package that makes no difference here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes
