"""Products of 4-bit weights: pieces are turned into floats and multiplied."""

from __future__ import annotations

import torch
from bitsandbytes import functional as bitsandbytes
from torch import Tensor
from torch.nn import functional

from worker.linear.base import Linear, LinearNumerics, Scratch
from worker.quantization.nf4 import BLOCK, NESTED_BLOCK
from worker.stored_weight import Piece, StoredWeight


class Nf4Linear(Linear):
    """Turns each piece into floats and multiplies with it."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics) -> None:
        super().__init__(weight.shape[0], bias)
        self.weight, self._numerics = weight, numerics
        self._levels = bitsandbytes.get_4bit_type("nf4", device="cpu")
        self._nested_levels = bitsandbytes.create_dynamic_map()

    def multiply(self, rows: Tensor) -> Tensor:
        products = [functional.linear(rows, self._decode(piece).to(rows)) for piece in self.weight.pieces()]
        out = torch.cat(products, dim=1)
        return out if self.bias is None else out.add_(self.bias)

    def _decode(self, piece: Piece) -> Tensor:
        """Return `[num_rows, in]`."""
        num_columns = self.weight.shape[1]
        codes, small = piece.tensors["weight"], self.weight.small
        first_block = piece.first_row * num_columns // BLOCK
        blocks = torch.arange(first_block, first_block + piece.tensors["absmax"].numel())
        nested = small["nested_absmax"][blocks // NESTED_BLOCK]
        absmax = self._nested_levels[piece.tensors["absmax"].int()] * nested + small["nested_offset"]
        nibbles = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[: piece.num_rows * num_columns]
        scales = absmax.repeat_interleave(BLOCK)[: nibbles.numel()]
        floats: Tensor = self._levels[nibbles.int()] * scales
        return floats.view(piece.num_rows, num_columns)


def build_nf4(
    weight: StoredWeight,
    bias: Tensor | None,
    numerics: LinearNumerics,
    scratch: Scratch,  # noqa: ARG001
) -> Linear:
    """Return the layer of an NF4 weight."""
    return Nf4Linear(weight, bias, numerics)
