"""Spans of transformer blocks: half-open ranges that tile a model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `[start, end)` of a model, numbered from 0. Never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a span: [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"

    def blocks(self) -> range:
        """Return the block numbers of this span."""
        return range(self.start, self.end)


def is_tiling(spans: list[Span], num_blocks: int) -> bool:
    """Tell whether `spans`, in this order, cover `[0, num_blocks)` without gap or overlap."""
    if not spans or spans[0].start != 0 or spans[-1].end != num_blocks:
        return False
    return all(left.end == right.start for left, right in pairwise(spans))


def streaming_order(num_blocks: int) -> tuple[int, ...]:
    """Return in which order blocks 0 … num_blocks - 1 of a span give up their memory, so that the first k of them lie
    evenly among the others for every k: the order of their bit-reversed numbers (van der Corput's sequence)."""
    width = max(1, (num_blocks - 1).bit_length())
    return tuple(sorted(range(num_blocks), key=lambda block: int(f"{block:0{width}b}"[::-1], 2)))
