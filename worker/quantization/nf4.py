"""4-bit weights in bitsandbytes' NF4 with double quantization, bit for bit."""

from __future__ import annotations

import torch
from bitsandbytes import functional
from torch import Tensor

from cluster.model_spec import Precision
from worker.stored_weight import MemoryWeight, Piece

BLOCK = 64  # parameters that share an absmax
NESTED_BLOCK = 256  # absmaxes that share one of their own


def encode(name: str, weight: Tensor) -> MemoryWeight:
    """Return `weight` `[out, in]` as 4-bit codes with doubly quantized scales."""
    codes, state = functional.quantize_4bit(
        weight.float().contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    tensors = {"weight": codes.flatten(), "absmax": state.absmax}
    small = {"nested_absmax": state.state2.absmax, "nested_offset": torch.as_tensor(state.offset).float()}
    piece = Piece(0, weight.shape[0], tensors)
    return MemoryWeight(name, Precision.NF4, (weight.shape[0], weight.shape[1]), small, (piece,))
