"""Page tables and layouts of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigurationError, InvariantError, StalePlacementError
from cluster.microbatch import Epoch, PageDelta, StepHeader, StepId
from cluster.request import SequenceId
from worker.kv_cache import TILE, KVCache

PAGE_SIZE = 64


def step(
    slices: Sequence[tuple[int, int, int]] = (),
    pages: Sequence[tuple[int, int, Sequence[int]]] = (),
    finished: Sequence[int] = (),
) -> StepHeader:
    """Return a header; a slice is (sequence, start, length), pages are (sequence, first page, page ids)."""
    return StepHeader(
        epoch=Epoch(1, 1),
        step_id=StepId(0),
        deadline_ms=1000,
        sequence_ids=tuple(SequenceId(sequence) for sequence, _, _ in slices),
        start_positions=tuple(start for _, start, _ in slices),
        lengths=tuple(length for _, _, length in slices),
        token_ids=(0,) * sum(length for _, _, length in slices),
        logits_rows=(0,) * len(slices),
        is_sampled=(False,) * len(slices),
        page_deltas=tuple(PageDelta(SequenceId(s), first, tuple(ids)) for s, first, ids in pages),
        finished_sequence_ids=tuple(SequenceId(sequence) for sequence in finished),
    )


def new_cache(num_pages: int = 8, page_size: int = PAGE_SIZE) -> KVCache:
    return KVCache([2, 1], [4, 8], num_pages, page_size, torch.float32, "cpu")


def test_adjacent_pages_are_one_run() -> None:
    cache = new_cache()
    cache.apply(step(pages=[(0, 0, (2, 3, 4)), (1, 0, (6, 0))]))
    layout = cache.layout(step([(0, 0, 130), (1, 100, 3)]))
    assert [slice_.runs for slice_ in layout.slices] == [((128, 320),), ((384, 448), (0, 64))]
    assert [(slice_.start_row, slice_.stop_row) for slice_ in layout.slices] == [(0, 130), (130, 133)]
    assert [slice_.context_length for slice_ in layout.slices] == [130, 103]
    assert layout.slots.tolist() == [*range(128, 258), 36, 37, 38]


@given(st.data(), st.permutations(range(8)), st.sampled_from([64, 128]))
def test_every_position_has_the_slot_of_its_page(data: st.DataObject, pages: list[int], page_size: int) -> None:
    cache = new_cache(page_size=page_size)
    cache.apply(step(pages=[(0, 0, pages)]))
    start = data.draw(st.integers(0, 8 * page_size - 1))
    length = data.draw(st.integers(1, 8 * page_size - start))
    layout = cache.layout(step([(0, start, length)]))
    expected = [pages[p // page_size] * page_size + p % page_size for p in range(start + length)]
    (slice_,) = layout.slices
    assert layout.slots.tolist() == expected[start:]
    assert [slot for run in slice_.runs for slot in range(*run)][: start + length] == expected
    low = data.draw(st.integers(0, start + length))
    clipped = [slot for run in slice_.runs_between(low, start + length) for slot in range(*run)]
    assert clipped == expected[low:]


@pytest.mark.parametrize(
    ("start", "length", "tails"),
    [(0, 1, ((1, 64),)), (0, 64, ()), (0, 70, ((70, 128),)), (63, 1, ()), (64, 1, ((65, 128),)), (65, 1, ())],
)
def test_the_rest_of_a_tile_is_cleared_when_the_tile_is_begun(
    start: int, length: int, tails: tuple[tuple[int, int], ...]
) -> None:
    cache = new_cache()
    cache.apply(step(pages=[(0, 0, (0, 1))]))
    layout = cache.layout(step([(0, start, length)]))
    assert layout.tails == tails
    for stored in cache.keys + cache.values:
        stored.fill_(7.0)
    ones = torch.ones(length, 2, 4)
    cache.clear_tails(0, layout)
    cache.write(0, layout, ones, 2 * ones)
    for stored, number in ((cache.keys[0], 1.0), (cache.values[0], 2.0)):
        expected = torch.full((2, 8 * PAGE_SIZE, 4), 7.0)
        for first, stop in tails:
            expected[:, first:stop] = 0.0
        expected[:, start : start + length] = number
        assert torch.equal(stored, expected)
    assert torch.all(cache.keys[1] == 7.0)


def test_pages_are_appended_step_by_step() -> None:
    cache = new_cache()
    cache.apply(step(pages=[(0, 0, (5,))]))
    cache.apply(step(pages=[(0, 1, (6, 1))]))
    assert cache.layout(step([(0, 191, 1)])).slots.tolist() == [127]


def test_finished_sequences_are_forgotten_before_their_pages_are_given_away() -> None:
    cache = new_cache()
    cache.apply(step(pages=[(0, 0, (5,))]))
    cache.apply(step(pages=[(1, 0, (5,)), (0, 0, (6,))], finished=[0]))
    assert cache.layout(step([(0, 0, 1), (1, 0, 1)])).slots.tolist() == [6 * 64, 5 * 64]
    cache.apply(step(finished=[0, 1, 2]))
    with pytest.raises(StalePlacementError, match="sequence 1"):
        cache.layout(step([(1, 0, 1)]))


def test_clear_forgets_every_sequence() -> None:
    cache = new_cache()
    cache.apply(step(pages=[(0, 0, (5,))]))
    cache.clear()
    with pytest.raises(StalePlacementError, match="replayed"):
        cache.layout(step([(0, 0, 1)]))


@pytest.mark.parametrize("page", [-1, 8])
def test_refuses_pages_it_does_not_have(page: int) -> None:
    cache = new_cache()
    with pytest.raises(InvariantError, match=f"page {page}, but this stage has 8 pages"):
        cache.apply(step(pages=[(0, 0, (3, page))]))


@pytest.mark.parametrize("first_page", [0, 2])
def test_refuses_a_gap_or_an_overlap_in_a_page_table(first_page: int) -> None:
    cache = new_cache()
    cache.apply(step(pages=[(0, 0, (5,))]))
    with pytest.raises(InvariantError, match=f"holds 1 pages here, but the step appends from page {first_page}"):
        cache.apply(step(pages=[(0, first_page, (6,))]))


def test_refuses_a_slice_beyond_its_pages() -> None:
    cache = new_cache()
    cache.apply(step(pages=[(0, 0, (5,))]))
    with pytest.raises(InvariantError, match="needs 65 token slots but holds 1 pages of 64"):
        cache.layout(step([(0, 0, 65)]))


def test_refuses_pages_that_hold_no_whole_tiles() -> None:
    with pytest.raises(ConfigurationError, match=f"multiple of {TILE}"):
        new_cache(page_size=65)


def test_counts_bytes_of_every_block() -> None:
    assert new_cache().size_bytes == 2 * 8 * PAGE_SIZE * (2 * 4 + 1 * 8) * 4


def test_an_empty_step_has_an_empty_layout() -> None:
    layout = new_cache().layout(step())
    assert layout.slots.dtype == torch.int64
    assert layout.slots.shape == (0,)
    assert layout.slices == ()


def touch(cache: KVCache) -> None:
    """Write every slot, so that the system commits its memory."""
    for tensor in cache.keys + cache.values:
        tensor.fill_(1.0)


def test_free_pages_are_given_back_to_the_system_and_held_ones_keep_what_they_hold() -> None:
    cache = KVCache([2, 2], [64, 64], 64, 256, torch.float32, "cpu")
    cache.apply(step(pages=[(0, 0, range(4)), (1, 0, range(4, 64))]))
    touch(cache)
    before = psutil.Process().memory_info().rss
    cache.apply(step(finished=[1]))
    assert (cache.used_bytes, cache.committed_bytes) == (cache.size_bytes // 16, cache.size_bytes)
    cache.return_free_pages()
    assert cache.committed_bytes == cache.used_bytes
    assert before - psutil.Process().memory_info().rss > 0.9 * cache.size_bytes
    for tensor in cache.keys + cache.values:
        assert bool((tensor[:, : 4 * 256] == 1).all())


def test_a_page_given_back_is_a_page_like_any_other() -> None:
    cache = new_cache()
    cache.apply(step(pages=[(0, 0, (0, 1))]))
    cache.apply(step(finished=[0]))
    cache.return_free_pages()
    cache.apply(step(pages=[(1, 0, (1, 2))]))
    assert cache.used_bytes == cache.committed_bytes == 2 * cache.size_bytes // 8
    layout = cache.layout(step([(1, 0, 1)]))
    cache.write(0, layout, torch.full((1, 2, 4), 3.0), torch.full((1, 2, 4), 5.0))
    assert cache.keys[0][:, layout.slots].tolist() == [[[3.0] * 4]] * 2


@given(st.permutations(range(8)), st.integers(0, 8))
def test_pages_between_held_ones_are_given_back_alone(pages: list[int], num_held: int) -> None:
    cache = KVCache([1], [64], 8, 64, torch.float32, "cpu")
    cache.apply(step(pages=[(0, 0, pages[:num_held]), (1, 0, pages[num_held:])]))
    touch(cache)
    cache.apply(step(finished=[1]))
    cache.return_free_pages()
    held = {page for page in range(8) if bool((cache.keys[0].view(8, -1)[page] == 1).all())}
    assert held == set(pages[:num_held])
