"""Keys and values of a stage's sequences, in pages.

Covers storage, page tables, and where a step's tokens are written and found. Which pages a sequence gets is the
coordinator's business (step headers say so); arithmetic is `worker.attention`'s.

Each block stores `[num_kv_heads, num_pages * page_size, head_dim]`: heads come first, so that adjacent pages are a
strided view that a matrix product takes without copying.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from cluster.errors import ConfigurationError, InvariantError, StalePlacementError
from cluster.microbatch import PageDelta, StepHeader
from cluster.request import SequenceId

TILE = 64  # slots that attention takes at a time; a page holds whole tiles

SlotRun = tuple[int, int]
"""Adjacent token slots `[first, stop)`."""


@dataclass(frozen=True, slots=True)
class SliceLayout:
    """Where one slice's rows stand and where its sequence's keys are.

    Its tokens are rows `[start_row, stop_row)` of the step and stand at positions `start_position, …`;
    `runs` hold positions `0 … context_length - 1`, in order, and the rest of the last tile.
    """

    start_row: int
    stop_row: int
    start_position: int
    runs: tuple[SlotRun, ...]

    @property
    def num_tokens(self) -> int:
        return self.stop_row - self.start_row

    @property
    def context_length(self) -> int:
        """Tokens of the sequence after this step."""
        return self.start_position + self.num_tokens

    def runs_between(self, start: int, stop: int) -> Iterator[SlotRun]:
        """Yield the runs that hold positions `[start, stop)`."""
        position = 0
        for first, end in self.runs:
            low, high = max(start, position), min(stop, position + end - first)
            if low < high:
                yield first + low - position, first + high - position
            position += end - first


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """A step's slices and the slots `[num_tokens]` (int64) that its tokens' keys and values go to.

    `tails` are the rests of tiles that the step begins without filling them. They are cleared: attention multiplies
    whole tiles, and whatever another sequence left there must not reach a product (0 * NaN is NaN).
    """

    slots: Tensor
    slices: tuple[SliceLayout, ...]
    tails: tuple[SlotRun, ...]


class KVCache:
    """One stage's keys and values. On the CPU memory is taken when slots are first written, and can be given back."""

    def __init__(
        self,
        num_kv_heads: Sequence[int],
        head_dim: Sequence[int],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if page_size % TILE:
            raise ConfigurationError(f"a page must hold a multiple of {TILE} token slots, not {page_size}")
        self.num_pages, self.page_size = num_pages, page_size
        self.dtype = dtype
        self.device = torch.device(device)
        shapes = [(h, num_pages * page_size, d) for h, d in zip(num_kv_heads, head_dim, strict=True)]
        self._maps: list[tuple[mmap.mmap, tuple[int, int, int]]] = []  # memory and shape of each tensor on the CPU
        self.keys = tuple(map(self._allocate, shapes))
        self.values = tuple(map(self._allocate, shapes))
        self._page_tables: dict[SequenceId, list[int]] = {}
        self._committed: set[int] = set()  # pages that may have taken memory

    @property
    def size_bytes(self) -> int:
        """Bytes when every slot has been written."""
        return sum(tensor.nbytes for tensor in self.keys + self.values)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that sequences hold; off the CPU of all pages, whose memory is never given back."""
        if self.device.type != "cpu":
            return self.size_bytes
        return len(self._used_pages()) * self.size_bytes // self.num_pages

    @property
    def committed_bytes(self) -> int:
        """Bytes that were taken from the system at most, as far as they were not given back."""
        if self.device.type != "cpu":
            return self.size_bytes
        return len(self._committed) * self.size_bytes // self.num_pages

    def return_free_pages(self) -> None:
        """Give the memory of pages that no sequence holds back to the system."""
        used = self._used_pages()
        for first, stop in _merge(sorted(self._committed - used)):
            for memory, shape in self._maps:
                self._return_slots(memory, shape, first * self.page_size, stop * self.page_size)
        self._committed = used

    def clear(self) -> None:
        """Forget every sequence."""
        self._page_tables.clear()

    def apply(self, header: StepHeader) -> None:
        """Forget finished sequences, then append pages. Raises InvariantError for pages that cannot be."""
        for sequence_id in header.finished_sequence_ids:
            self._page_tables.pop(sequence_id, None)
        for delta in header.page_deltas:
            self._append_pages(delta)

    def layout(self, header: StepHeader) -> AttentionLayout:
        """Find the slots of a step's slices; every block shares the result.

        Raises StalePlacementError for a sequence without pages, InvariantError for one with too few.
        """
        stops = tuple(accumulate(header.lengths))
        slices = tuple(
            SliceLayout(stop - length, stop, start, self._runs(sequence_id, start + length))
            for sequence_id, start, length, stop in zip(
                header.sequence_ids, header.start_positions, header.lengths, stops, strict=True
            )
        )
        slots = [
            slot
            for slice_ in slices
            for first, stop in slice_.runs_between(slice_.start_position, slice_.context_length)
            for slot in range(first, stop)
        ]
        tails = tuple(tail for slice_ in slices for tail in _tails(slice_))
        return AttentionLayout(torch.tensor(slots, dtype=torch.int64, device=self.device), slices, tails)

    def clear_tails(self, block: int, layout: AttentionLayout) -> None:
        """Clear the rests of tiles that a step begins; see AttentionLayout."""
        for first, stop in layout.tails:
            self.keys[block][:, first:stop].zero_()
            self.values[block][:, first:stop].zero_()

    def write(self, block: int, layout: AttentionLayout, key: Tensor, value: Tensor) -> None:
        """Store a step's keys and values, `[num_tokens, num_kv_heads, head_dim]`, in the cache's dtype."""
        for stored, new in ((self.keys[block], key), (self.values[block], value)):
            stored.index_copy_(1, layout.slots, new.transpose(0, 1).to(stored.dtype))

    def _allocate(self, shape: tuple[int, int, int]) -> Tensor:
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        num_elements = math.prod(shape)
        memory = mmap.mmap(-1, num_elements * self.dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._maps.append((memory, shape))
        return torch.frombuffer(memory, dtype=self.dtype, count=num_elements).view(shape)

    def _return_slots(self, memory: mmap.mmap, shape: tuple[int, int, int], first: int, stop: int) -> None:
        num_heads, num_slots, head_dim = shape
        slot_bytes = head_dim * self.dtype.itemsize
        for head in range(num_heads):
            begin = _round_up((head * num_slots + first) * slot_bytes, mmap.PAGESIZE)
            end = (head * num_slots + stop) * slot_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _used_pages(self) -> set[int]:
        return {page for table in self._page_tables.values() for page in table}

    def _append_pages(self, delta: PageDelta) -> None:
        table = self._page_tables.setdefault(delta.sequence_id, [])
        if delta.first_page != len(table):
            raise InvariantError(
                f"sequence {delta.sequence_id} holds {len(table)} pages here, but the step appends from page "
                f"{delta.first_page}: coordinator and stage disagree; please report"
            )
        for page in delta.page_ids:
            if not 0 <= page < self.num_pages:
                raise InvariantError(
                    f"sequence {delta.sequence_id} was given page {page}, but this stage has {self.num_pages} pages: "
                    "coordinator and stage disagree; please report"
                )
        table.extend(delta.page_ids)
        self._committed.update(delta.page_ids)

    def _runs(self, sequence_id: SequenceId, num_tokens: int) -> tuple[SlotRun, ...]:
        """Merge the pages that hold a sequence's first `num_tokens` tokens, up to a whole tile."""
        table = self._page_tables.get(sequence_id)
        if table is None:
            raise StalePlacementError(
                f"this stage has no pages of sequence {sequence_id}: it must be replayed", reason="UNKNOWN_SEQUENCE"
            )
        if num_tokens > len(table) * self.page_size:
            raise InvariantError(
                f"sequence {sequence_id} needs {num_tokens} token slots but holds {len(table)} pages of "
                f"{self.page_size}: coordinator and stage disagree; please report"
            )
        runs: list[SlotRun] = []
        num_slots = _round_up(num_tokens, TILE)
        for index in range(_round_up(num_slots, self.page_size) // self.page_size):
            first = table[index] * self.page_size
            stop = first + min(self.page_size, num_slots - index * self.page_size)
            if runs and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((first, stop))
        return tuple(runs)


def _merge(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges `[first, stop)` of adjacent pages."""
    ranges: list[tuple[int, int]] = []
    for page in pages:
        if ranges and ranges[-1][1] == page:
            ranges[-1] = (ranges[-1][0], page + 1)
        else:
            ranges.append((page, page + 1))
    return ranges


def _tails(slice_: SliceLayout) -> Iterator[SlotRun]:
    """Yield the rest of the slice's last tile if the slice begins that tile."""
    stop = _round_up(slice_.context_length, TILE)
    if slice_.start_position <= stop - TILE:
        yield from slice_.runs_between(slice_.context_length, stop)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
