"""What a part's file holds and where: the versioned manifest that is written after it.

A part is a block ("block-0007"), the head with the final norm ("head"), or the embedding with what follows it
("embedding"). Its file begins with a segment of all small tensors; then come slices, each of pieces of weights in order
of use, every tensor 4096-aligned. A slice is what the ring reads at once: pieces of one weight or of several, at most
SLICE_BYTES, and never of two experts. The same checkpoint, precision and version give the same bytes on every machine.

Covers values and their JSON; `worker.store.layout` decides where tensors lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FORMAT_VERSION = 1
ALIGNMENT = 4096
SLICE_BYTES = 64 << 20
SMALL_ALIGNMENT = 64  # of tensors in the leading segment, which is read whole


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor's bytes in the part's file."""

    dtype: str  # "F32", "BF16", "F16", "I8" or "U8", as safetensors names them
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file
    num_bytes: int
    checksum: str  # XXH3-128 of these bytes, in hexadecimal


@dataclass(frozen=True, slots=True)
class PiecePlace:
    """Adjacent rows of a weight. All of its tensors lie in one slice."""

    first_row: int
    num_rows: int
    slice_index: int
    tensors: Mapping[str, TensorPlace]  # by role, see worker.stored_weight


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """One linear layer's weight."""

    name: str  # within the part, like "self_attn.q_proj"
    kind: str  # a Precision's value
    shape: tuple[int, int]  # (out, in)
    small: Mapping[str, TensorPlace]  # by role, in the leading segment
    pieces: tuple[PiecePlace, ...]


@dataclass(frozen=True, slots=True)
class SlicePlace:
    """Adjacent bytes that are read at once. `expert` is the number of the expert they belong to, or None."""

    offset: int
    num_bytes: int  # a multiple of ALIGNMENT: the file is padded
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class PartManifest:
    """One part."""

    part: str
    precision: str
    file_bytes: int
    small_bytes: int  # of the leading segment, a multiple of ALIGNMENT
    small: Mapping[str, TensorPlace]  # norms and other small tensors of the part, by their names in it
    weights: tuple[WeightPlace, ...]  # in order of use
    slices: tuple[SlicePlace, ...] = field(default=())
    version: int = FORMAT_VERSION

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a pass reads when the part is streamed."""
        return sum(place.num_bytes for place in self.slices)
