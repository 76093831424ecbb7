"""8-bit weights: one scale per output row, symmetric, so that the largest parameter of a row becomes 127.

Covers weights; inputs are quantized by `worker.linear.int8`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.model_spec import Precision
from worker.stored_weight import MemoryWeight, Piece

TILE_ELEMENTS = 1 << 21  # converted at a time


def encode(name: str, weight: Tensor) -> MemoryWeight:
    """Return `weight` `[out, in]` as int8 rows and their scales. A row of zeros has scale 1."""
    num_rows, num_columns = weight.shape
    codes = torch.empty(num_rows, num_columns, dtype=torch.int8)
    scale = torch.empty(num_rows)
    step = max(1, TILE_ELEMENTS // num_columns)
    for start in range(0, num_rows, step):
        rows = weight[start : start + step].float()
        largest = rows.abs().amax(dim=1)
        scale[start : start + step] = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        codes[start : start + step] = (rows / scale[start : start + step, None]).round_()
    piece = Piece(0, num_rows, {"weight": codes})
    return MemoryWeight(name, Precision.INT8, (num_rows, num_columns), {"scale": scale}, (piece,))
