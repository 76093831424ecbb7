"""Tensors as named, typed pieces of at most 1 MiB, and back.

Small pieces let a decode step pass a whole prompt's hidden states on its way. Covers CPU tensors of the three dtypes
that travel; what they mean is the stages' business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cluster.errors import InvalidRequestError
from cluster.rpc.v1 import stage_pb2 as pb

PIECE_BYTES = 1024**2
MAX_PAYLOAD_BYTES = 1 << 34
"""No payload comes near 16 GiB; a larger claim is a broken message."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def specs_to_proto(tensors: Mapping[str, Tensor]) -> list[pb.TensorSpec]:
    """Describe tensors in their order."""
    return [pb.TensorSpec(name=name, dtype=_NAMES[t.dtype], shape=t.shape) for name, t in tensors.items()]


def pieces_of(tensors: Mapping[str, Tensor]) -> Iterator[pb.TensorPiece]:
    """Yield the pieces of all tensors, each tensor from its beginning, in the order of the mapping."""
    for index, tensor in enumerate(tensors.values()):
        view = _bytes_of(tensor.detach().contiguous())
        for offset in range(0, len(view), PIECE_BYTES):
            yield pb.TensorPiece(tensor_index=index, offset=offset, data=bytes(view[offset : offset + PIECE_BYTES]))


class PayloadAssembler:
    """Puts a step's tensors together again, each into one buffer made in advance."""

    def __init__(self, specs: Sequence[pb.TensorSpec]) -> None:
        """Raises InvalidRequestError for specs that no stage of ours sends."""
        names = [spec.name for spec in specs]
        if len(set(names)) < len(names):
            raise InvalidRequestError(f"two tensors of a step have one name: {names}")
        if sum(map(_num_bytes, specs)) > MAX_PAYLOAD_BYTES:
            raise InvalidRequestError(f"tensors {', '.join(names)} are larger than any payload")
        self._tensors = {spec.name: _new_tensor(spec) for spec in specs}
        self._views = [_bytes_of(tensor) for tensor in self._tensors.values()]
        self._missing = sum(map(len, self._views))
        self._expected = (0, 0)  # tensor index and offset of the next piece
        self._skip_empty()
        self.num_bytes = self._missing

    @property
    def is_complete(self) -> bool:
        """Whether every byte is here."""
        return self._missing == 0

    def add(self, piece: pb.TensorPiece) -> None:
        """Take the next piece. Raises InvalidRequestError for one that is not the next or does not fit."""
        index, offset = self._expected
        size = len(piece.data)
        if (piece.tensor_index, piece.offset) != (index, offset) or index >= len(self._views):
            raise InvalidRequestError(
                f"piece at tensor {piece.tensor_index}, offset {piece.offset} came where tensor {index}, offset "
                f"{offset} was due"
            )
        if size == 0 or size > PIECE_BYTES or offset + size > len(self._views[index]):
            raise InvalidRequestError(f"a piece of {size} bytes at offset {offset} does not fit its tensor")
        self._views[index][offset : offset + size] = piece.data
        self._missing -= size
        self._expected = (index, offset + size)
        self._skip_empty()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; call it when complete."""
        return self._tensors

    def _skip_empty(self) -> None:
        index, offset = self._expected
        while index < len(self._views) and offset == len(self._views[index]):
            index, offset = index + 1, 0
        self._expected = (index, offset)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's memory, shared."""
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _num_bytes(spec: pb.TensorSpec) -> int:
    return math.prod(spec.shape) * _dtype(spec).itemsize


def _new_tensor(spec: pb.TensorSpec) -> Tensor:
    return torch.empty(tuple(spec.shape), dtype=_dtype(spec))


def _dtype(spec: pb.TensorSpec) -> torch.dtype:
    dtype = _DTYPES.get(spec.dtype)
    if dtype is None:
        raise InvalidRequestError(f"tensor {spec.name!r} has dtype {spec.dtype!r}; known are {', '.join(_DTYPES)}")
    return dtype
