"""A linear layer's weight as it is stored: the seam between what brings weights and what multiplies with them.

The roles of a weight's tensors, by its kind:

* FP32, BF16, FP16: `weight` `[rows, in]` of that dtype.
* INT8: `weight` int8 `[rows, in]`; small: `scale` fp32 `[out]`. A parameter is `weight * scale` of its row.
* NF4: `weight` uint8 `[rows * in / 2]`, high nibble first, and `absmax` uint8, one per 64 parameters of the flattened
  rows; small: `nested_absmax` fp32, one per 256 of the whole `absmax`, and `nested_offset` fp32 `[]`: double
  quantization as bitsandbytes does it (https://arxiv.org/abs/2305.14314). A piece holds whole blocks of 64,
  except at the end.

Covers values and the interface; `worker.store` and `worker.stream` bring weights, `worker.linear` multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cluster.model_spec import Precision


@dataclass(frozen=True, slots=True)
class Piece:
    """Some adjacent output rows of a weight, by role."""

    first_row: int
    num_rows: int
    tensors: Mapping[str, Tensor]


class StoredWeight(Protocol):
    """One weight. Of a streamed one only the piece last yielded is valid: the next one may take its memory."""

    @property
    def name(self) -> str:
        """The layer within its part, like "self_attn.q_proj", for messages."""
        ...

    @property
    def kind(self) -> Precision: ...

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        ...

    @property
    def small(self) -> Mapping[str, Tensor]:
        """Tensors that are always in memory, by role, on the CPU."""
        ...

    @property
    def is_streamed(self) -> bool: ...

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces in order of their rows, on the CPU; those of a streamed weight as they arrive from the disk,
        on a GPU where one multiplies with them.

        Raises StorageError naming the part when the disk fails or gives other bytes than were written.
        """
        ...


@dataclass(frozen=True, slots=True)
class MemoryWeight:
    """A StoredWeight whose tensors are all in memory. Also what encoding a weight gives: a single piece."""

    name: str
    kind: Precision
    shape: tuple[int, int]
    small: Mapping[str, Tensor]
    held: tuple[Piece, ...]

    @property
    def is_streamed(self) -> bool:
        return False

    def pieces(self) -> Iterator[Piece]:
        """See StoredWeight."""
        return iter(self.held)


def hold(weight: StoredWeight) -> StoredWeight:
    """Return the weight so that its pieces can be asked for again and again: in memory, unless it is streamed."""
    if weight.is_streamed or isinstance(weight, MemoryWeight):
        return weight
    return MemoryWeight(weight.name, weight.kind, weight.shape, weight.small, tuple(weight.pieces()))


def whole_weight(name: str, kind: Precision, weight: Tensor) -> MemoryWeight:
    """Return a weight `[out, in]` that is not quantized, already of its kind's dtype: one piece."""
    shape = (weight.shape[0], weight.shape[1])
    return MemoryWeight(name, kind, shape, {}, (Piece(0, shape[0], {"weight": weight}),))
