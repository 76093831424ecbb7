"""KV pages, accounted for once for all stages: which page ids are free, and in which extents.

Ownership. A page belongs to the pool or to exactly one sequence's page table, and the same ids mean the same pages on
every stage. A page returns to the pool, and may be given away again, at the moment its sequence ends here, although
steps that write to it may still be in flight: every stage executes steps strictly in step order, and the step that
brings the page to its new owner comes after all of those and names the old owner (`finished_sequence_ids`), which
stages forget before they compute its slices. So on every stage the last access through the old page table precedes
the first through the new one.

Covers ids only; keys and values are in `worker.kv_cache`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise

from cluster.errors import InvariantError

Extent = range
"""Consecutive page ids."""


def num_pages_for(num_slots: int, page_size: int) -> int:
    """Return how many pages hold `num_slots` tokens."""
    return -(-num_slots // page_size)


class PagePool:
    """The free pages. Hands them out in few extents: attention over contiguous runs is far cheaper."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._extents: list[Extent] = [range(num_pages)] if num_pages else []  # by start, never adjacent

    def allocate(self, count: int) -> tuple[Extent, ...]:
        """Take `count` pages: out of the smallest extent that holds them all, else out of the largest ones.

        Raises InvariantError when fewer are free; whoever asks compares with `num_free` first.
        """
        if not 0 < count <= self.num_free:
            raise InvariantError(f"{count} pages asked for while {self.num_free} are free")
        self.num_free -= count
        taken = []
        while count:
            taken.append(self._take(count))
            count -= len(taken[-1])
        return tuple(taken)

    def release(self, extents: Iterable[Extent]) -> None:
        """Take pages back. Raises InvariantError when one of them is free already."""
        for extent in extents:
            self._put(extent)
            self.num_free += len(extent)

    def check_invariants(self, held: Iterable[Extent]) -> None:
        """Raise InvariantError unless the free pages and `held`, the extents of all sequences, tile the pool."""
        for left, right in pairwise(self._extents):
            if left.stop >= right.start:
                raise InvariantError(f"free extents {left} and {right} should have been one")
        pages = sorted(page for extents in (self._extents, held) for extent in extents for page in extent)
        if pages != list(range(self.num_pages)):
            raise InvariantError(f"free and held pages do not tile the pool of {self.num_pages}: {pages}")
        if self.num_free != sum(map(len, self._extents)):
            raise InvariantError(f"{self.num_free} pages counted as free, but the extents are {self._extents}")

    def _take(self, count: int) -> Extent:
        """Cut up to `count` pages off the best extent."""
        holding = [extent for extent in self._extents if len(extent) >= count]
        best = min(holding, key=len) if holding else max(self._extents, key=len)
        index = self._extents.index(best)
        rest = best[count:]
        self._extents[index : index + 1] = [rest] if rest else []
        return best[:count]

    def _put(self, extent: Extent) -> None:
        """Insert an extent and merge it with its neighbours."""
        index = bisect_left(self._extents, extent.start, key=lambda free: free.start)
        around = slice(max(index - 1, 0), index + 1)
        neighbours = self._extents[around]
        neighbours.insert(index - around.start, extent)
        self._extents[around] = _merge(neighbours)


def _merge(extents: Iterable[Extent]) -> list[Extent]:
    """Join adjacent extents, given in order of start. Raises InvariantError when two overlap."""
    merged: list[Extent] = []
    for extent in extents:
        if merged and extent.start < merged[-1].stop:
            raise InvariantError(f"pages of {extent} are free twice: {merged[-1]} is in the pool")
        if merged and extent.start == merged[-1].stop:
            merged[-1] = range(merged[-1].start, extent.stop)
        else:
            merged.append(extent)
    return merged
