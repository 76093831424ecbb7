"""Which parts of a span are held in memory and which are streamed, as keys and values take more or less of the budget.

Covers the choice and its performance; the ring is `worker.stream.ring`'s. Parts give up their memory in the order of
`cluster.span.streaming_order`, the head last, and take it back in the opposite one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from cluster.errors import ConfigurationError
from cluster.span import streaming_order
from worker.heap import trim_heap
from worker.kv_cache import KVCache
from worker.stream.ring import SliceRing
from worker.stream.streamed_file import Extent

PATIENCE = 8  # steps that would have had room for a part before it is loaded: that costs as much as some passes of it
ROOM_SHARE = 4  # a part is loaded where a quarter of its size stays free: the next pages must not push it out again


@dataclass(frozen=True, slots=True)
class ShiftingPart:
    """A part that can be resident or streamed."""

    weight_bytes: int  # that it takes only while it is resident
    extents: tuple[Extent, ...]  # that a pass reads while it is streamed, in order of use
    build: Callable[[bool], nn.Module]  # from whether it is streamed: a block, or the head's linear layer


def choose_num_streamed(sizes: Sequence[int], kv_bytes: int, budget: int, current: int, *, may_load: bool) -> int:
    """Return how many parts are streamed. `sizes` are in streaming order, `current` is how many are streamed now.

    As few more as fit the budget; with `may_load` at most one less, where some room is left even then. 0 as `budget`
    means that nothing changes.
    """
    if not budget:
        return current
    num_streamed = current
    while num_streamed < len(sizes) and sum(sizes[num_streamed:]) + kv_bytes > budget:
        num_streamed += 1
    if may_load and 0 < num_streamed == current:
        room = budget - kv_bytes - sum(sizes[current:])
        if sizes[current - 1] + sizes[current - 1] // ROOM_SHARE <= room:
            return current - 1
    return num_streamed


def parts_in_order(num_blocks: int, num_parts: int) -> tuple[int, ...]:
    """Return in which order the parts of a span give up their memory: blocks, then perhaps the head."""
    return (*streaming_order(num_blocks), *range(num_blocks, num_parts))


class Residency:
    """The parts of one span. All methods are the compute thread's."""

    def __init__(
        self,
        parts: Sequence[ShiftingPart],
        num_blocks: int,
        num_streamed: int,
        budget_bytes: int,
        ring: SliceRing,
    ) -> None:
        """`parts` are the blocks in order, then perhaps the head. `budget_bytes` is for their weights and for keys and
        values, see LoadOrder. Building the parts at first, by `is_streamed`, is the caller's; then `start`."""
        self._parts = tuple(parts)
        self._order = parts_in_order(num_blocks, len(parts))
        if num_streamed > len(parts):
            raise ConfigurationError(f"{num_streamed} parts are to be streamed, but the span has {len(parts)}")
        self._sizes = tuple(parts[index].weight_bytes for index in self._order)
        self._num_streamed, self._budget, self._ring = num_streamed, budget_bytes, ring
        self._num_roomy = 0  # steps in a row that had room for one more resident part

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parts that are resident now."""
        return sum(self._sizes[self._num_streamed :])

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a pass reads."""
        return sum(extent.num_bytes for extent in self._streamed_extents())

    def is_streamed(self, index: int) -> bool:
        """Tell how the part is held now."""
        return index in self._order[: self._num_streamed]

    def start(self) -> None:
        """Begin to read ahead."""
        self._ring.set_order(self._streamed_extents())

    def make_room(self, cache: KVCache, place: Callable[[int, nn.Module], None]) -> None:
        """Shift parts as the cache's pages in use demand; `place(index, module)` replaces one and lets the old go."""
        used = cache.used_bytes
        chosen = self._choose(used)
        if chosen > self._num_streamed:
            self._shift(chosen, place)
        self._return_pages(cache, chosen)
        if chosen < self._num_streamed:
            self._shift(chosen, place)

    def _choose(self, kv_bytes: int) -> int:
        current = self._num_streamed
        chosen = choose_num_streamed(self._sizes, kv_bytes, self._budget, current, may_load=True)
        self._num_roomy = self._num_roomy + 1 if chosen < current else 0
        if chosen < current and self._num_roomy <= PATIENCE:
            return current
        self._num_roomy = 0
        return chosen

    def _return_pages(self, cache: KVCache, num_streamed: int) -> None:
        if self._budget and sum(self._sizes[num_streamed:]) + cache.committed_bytes > self._budget:
            cache.return_free_pages()

    def _shift(self, num_streamed: int, place: Callable[[int, nn.Module], None]) -> None:
        """Shift part by part, so that each is what it counts as even when one of them cannot be read."""
        self._ring.drain()
        try:
            while self._num_streamed < num_streamed:
                self._replace(self._num_streamed, place, is_streamed=True)
                self._num_streamed += 1
            while self._num_streamed > num_streamed:
                self._replace(self._num_streamed - 1, place, is_streamed=False)
                self._num_streamed -= 1
        finally:
            self.start()
            trim_heap()

    def _replace(self, rank: int, place: Callable[[int, nn.Module], None], *, is_streamed: bool) -> None:
        index = self._order[rank]
        place(index, self._parts[index].build(is_streamed))

    def _streamed_extents(self) -> list[Extent]:
        streamed = sorted(self._order[: self._num_streamed])
        return [extent for index in streamed for extent in self._parts[index].extents]
