"""Products of rows and 4-bit weights by compiled kernels, from codes as they are stored.

Covers fp32 and bf16 rows on CPUs. A row's bits depend on nothing but the row, the weight and the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worker.native.library import Kernel, library
from worker.quantization.nf4 import BLOCK, VALUES, dynamic_map
from worker.stored_weight import Piece


def is_possible(num_in: int, dtype: torch.dtype) -> bool:
    """Tell whether rows `[num_rows, num_in]` of `dtype` can be multiplied here."""
    return num_in % BLOCK == 0 and dtype in (torch.float32, torch.bfloat16) and library() is not None


class Nf4Product:
    """Multiplies with the pieces of one weight."""

    def __init__(self, num_in: int, small: Mapping[str, Tensor]) -> None:
        """`small` is as in `worker.stored_weight`; empty where absmaxes were quantized only once."""
        self._num_in = num_in
        self._nested = small["nested_absmax"].contiguous() if small else None
        self._offset = float(small["nested_offset"]) if small else 0.0
        self._map, self._values = dynamic_map(), torch.tensor(VALUES)
        self._lay_out, self._multiply = Kernel("nf4_lay_out", "ppiiii"), Kernel("nf4_multiply", "ppppppppfiiiiiii")

    def lay_out(self, rows: Tensor) -> Tensor:
        """Return rows in the order in which `multiply` reads them."""
        inputs = torch.empty(rows.numel(), dtype=torch.float32)
        self._lay_out(inputs, rows.contiguous(), *rows.shape, rows.dtype is torch.bfloat16, torch.get_num_threads())
        return inputs

    def multiply(self, inputs: Tensor, piece: Piece, bias: Tensor | None, out: Tensor) -> None:
        """Write the columns of `out` `[num_rows, out]` that are the piece's, of inputs that were laid out."""
        columns = slice(piece.first_row, piece.first_row + piece.num_rows)
        self._multiply(
            out[:, columns],
            inputs,
            piece.tensors["weight"],
            piece.tensors["absmax"],
            self._nested,
            self._map,
            self._values,
            None if bias is None else bias[columns],
            self._offset,
            piece.first_row * self._num_in // BLOCK,
            out.shape[0],
            self._num_in,
            piece.num_rows,
            out.shape[1],
            out.dtype is torch.bfloat16,
            torch.get_num_threads(),
        )
