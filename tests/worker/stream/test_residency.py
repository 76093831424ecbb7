"""Weights give way to keys and values, and come back, within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cluster.errors import ConfigurationError, StorageError
from cluster.microbatch import Epoch, PageDelta, StepHeader, StepId
from cluster.request import SequenceId
from tests.worker.stream.disk import PLAN, make_extents
from worker.kv_cache import KVCache
from worker.stream.readers import Readers
from worker.stream.residency import PATIENCE, Residency, ShiftingPart, choose_num_streamed
from worker.stream.ring import ReadCounters, SliceRing

SIZE = 1 << 20  # of a part
SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=8)


@given(SIZES, st.integers(0, 500), st.integers(1, 900), st.data())
def test_the_budget_holds_wherever_streaming_can_make_it_hold(
    sizes: list[int], kv_bytes: int, budget: int, data: st.DataObject
) -> None:
    current = data.draw(st.integers(0, len(sizes)))
    chosen = choose_num_streamed(sizes, kv_bytes, budget, current, may_load=data.draw(st.booleans()))
    assert chosen == len(sizes) or sum(sizes[chosen:]) + kv_bytes <= budget
    assert chosen >= current - 1
    if chosen > current:
        assert sum(sizes[chosen - 1 :]) + kv_bytes > budget  # no more than needed


@given(SIZES, st.integers(0, 500), st.integers(1, 900))
def test_a_demand_that_stays_is_settled_once(sizes: list[int], kv_bytes: int, budget: int) -> None:
    seen = [0]
    for _ in range(3 * len(sizes)):
        seen.append(choose_num_streamed(sizes, kv_bytes, budget, seen[-1], may_load=True))
    rises = [seen[1]] * (len(seen) - 1)
    assert seen[1:] == rises  # nothing is loaded that was let go a step before


@given(SIZES, st.lists(st.integers(0, 500), max_size=30))
def test_without_a_budget_nothing_changes(sizes: list[int], demands: list[int]) -> None:
    for kv_bytes in demands:
        assert choose_num_streamed(sizes, kv_bytes, 0, 1, may_load=True) == 1


def header(pages: Sequence[int] = (), finished: Sequence[int] = (), sequence_id: int = 0) -> StepHeader:
    """Return a step that only moves pages."""
    deltas = (PageDelta(SequenceId(sequence_id), 0, tuple(pages)),) if pages else ()
    return StepHeader(
        Epoch(1, 1),
        StepId(1),
        1000,
        (),
        (),
        (),
        (),
        (),
        (),
        page_deltas=deltas,
        finished_sequence_ids=tuple(map(SequenceId, finished)),
    )


class Span:
    """Four blocks and a head of SIZE bytes each beside a cache whose pages are half as large."""

    def __init__(self, folder: Path, num_streamed: int, budget: int) -> None:
        self.file, extents = make_extents(folder, (2, 2, 2, 2, 2))
        self.readers = Readers(PLAN)
        slot = max(extent.num_bytes for extent in extents)
        self.ring = SliceRing(self.readers, ReadCounters(), ring_bytes=3 * slot, slot_bytes=slot)
        self.failing: set[int] = set()
        parts = [ShiftingPart(SIZE, (extents[i],), lambda s, i=i: self._build(i, s)) for i in range(5)]  # type: ignore[misc]
        self.residency = Residency(parts, 4, num_streamed, budget, self.ring)
        self.streamed = [self.residency.is_streamed(i) for i in range(5)]
        self.residency.start()
        self.cache = KVCache((2,), (64,), 16, 1024, torch.float32, "cpu")
        assert self.cache.size_bytes == 16 * SIZE

    def close(self) -> None:
        self.readers.close()
        self.file.close()

    def step(self, **pages: Sequence[int]) -> int:
        """Return how many parts are streamed in the step."""
        self.cache.apply(header(**pages))
        self.residency.make_room(self.cache, self._place)
        return sum(self.streamed)

    def _build(self, index: int, is_streamed: bool) -> nn.Module:
        if index in self.failing:
            raise StorageError(f"block {index} is damaged")
        module = nn.Identity()
        module.is_streamed = is_streamed
        return module

    def _place(self, index: int, module: nn.Module) -> None:
        self.streamed[index] = bool(module.is_streamed)


def test_parts_give_way_to_pages_evenly_and_the_head_last(tmp_path: Path) -> None:
    span = Span(tmp_path, 1, 5 * SIZE)
    assert span.streamed == [True, False, False, False, False]
    assert span.step(pages=[0]) == 1
    assert span.step(pages=[1, 2], sequence_id=1) == 3
    assert span.streamed == [True, True, True, False, False]
    assert span.step(pages=[3], sequence_id=2) == 4
    assert span.step(pages=[4], sequence_id=3) == 5
    span.close()


def test_parts_come_back_one_at_a_time_after_patience(tmp_path: Path) -> None:
    span = Span(tmp_path, 1, 6 * SIZE)
    assert span.step(pages=[0, 1, 2]) == 2
    counts = [span.step(finished=[0])] + [span.step() for _ in range(2 * PATIENCE + 2)]
    assert counts == [2] * PATIENCE + [1] * (PATIENCE + 1) + [0] * 2
    assert span.cache.committed_bytes == 0  # pages are given back before weights take their place
    span.close()


def test_a_demand_that_swings_loads_nothing(tmp_path: Path) -> None:
    span = Span(tmp_path, 1, 6 * SIZE)
    span.step(pages=[0, 1, 2])
    for number in range(1, 4 * PATIENCE):
        assert (
            span.step(finished=[number - 1], pages=[0, 1, 2] if number % PATIENCE == 0 else [0], sequence_id=number)
            == 2
        )
    span.close()


def test_pages_are_given_back_before_a_step_exceeds_the_budget(tmp_path: Path) -> None:
    span = Span(tmp_path, 1, 6 * SIZE)
    span.step(pages=[0, 1])
    span.step(finished=[0], pages=[2, 3], sequence_id=1)
    assert span.cache.committed_bytes == span.cache.used_bytes == 2 * SIZE
    assert sum(span.streamed) == 1
    span.close()


def test_a_part_that_cannot_be_read_fails_the_step_and_counts_as_it_is(tmp_path: Path) -> None:
    span = Span(tmp_path, 1, 5 * SIZE)
    span.failing = {1}  # the order is 0, 2, 1, 3
    with pytest.raises(StorageError):
        span.step(pages=[0, 1, 2])
    assert span.streamed == [True, False, True, False, False]
    assert span.residency.weight_bytes == 3 * SIZE
    span.failing = set()
    assert span.step() == 3
    span.close()


def test_what_is_streamed_passes_through_the_ring(tmp_path: Path) -> None:
    span = Span(tmp_path, 1, 5 * SIZE)
    assert span.residency.streamed_bytes == 2 * 4096
    span.step(pages=[0, 1])
    assert span.residency.streamed_bytes == 4 * 4096
    assert [extent.num_bytes for extent in span.ring._order] == [8192, 8192]
    span.close()


def test_more_streamed_parts_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="6 parts"):
        Span(tmp_path, 6, 0)
