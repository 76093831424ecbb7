"""Tensors as bytes of a part's file and back. Covers memory, not files."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor

from worker.store.layout import TensorSpec
from worker.store.manifest import TensorPlace

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def spec_of(tensor: Tensor) -> TensorSpec:
    """Describe a tensor to be stored. Its dtype is one of DTYPES."""
    return TensorSpec(_NAMES[tensor.dtype], tuple(tensor.shape))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's memory, shared."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def empty(place: TensorPlace) -> Tensor:
    """Make a tensor for the bytes of `place`."""
    return torch.empty(place.shape, dtype=DTYPES[place.dtype])


def view_bytes(buffer: Tensor, start: int, place: TensorPlace) -> Tensor:
    """Return the tensor whose bytes begin at `start` of `buffer` (uint8, one-dimensional): a view."""
    return buffer[start : start + place.num_bytes].view(DTYPES[place.dtype]).view(place.shape)


def checksum(data: memoryview) -> str:
    """Return what TensorPlace calls the checksum. Other Python threads run meanwhile."""
    return xxhash.xxh3_128_hexdigest(data)
