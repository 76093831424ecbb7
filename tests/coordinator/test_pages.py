"""Pages neither leak nor overlap, and come in as few extents as can be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvariantError
from coordinator.pages import Extent, PagePool, num_pages_for


def test_pages_are_counted_up_to_the_last_slot() -> None:
    assert [num_pages_for(slots, 64) for slots in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]


def test_an_allocation_is_cut_from_the_smallest_extent_that_holds_it() -> None:
    pool = PagePool(16)
    first, _, third, _ = (pool.allocate(count) for count in (4, 2, 3, 7))
    pool.release(first)
    pool.release(third)
    assert pool.allocate(3) == (range(6, 9),)
    assert pool.allocate(3) == (range(0, 3),)


def test_an_allocation_that_no_extent_holds_takes_the_largest_ones() -> None:
    pool = PagePool(10)
    extents = [pool.allocate(count) for count in (3, 1, 2, 1, 3)]
    for index in (0, 2, 4):
        pool.release(extents[index])
    assert pool.allocate(7) == (range(0, 3), range(7, 10), range(4, 5))


def test_released_extents_grow_together_in_any_order() -> None:
    pool = PagePool(9)
    left, middle, right = (pool.allocate(3) for _ in range(3))
    for extents in (left, right, middle):
        pool.release(extents)
    assert pool.allocate(9) == (range(9),)


def test_more_pages_than_are_free_are_refused() -> None:
    pool = PagePool(2)
    with pytest.raises(InvariantError, match="3 pages asked for while 2 are free"):
        pool.allocate(3)
    assert pool.num_free == 2


@pytest.mark.parametrize("extent", [range(0, 1), range(1, 3), range(3, 5), range(2, 3)])
def test_a_page_released_twice_is_a_bug(extent: Extent) -> None:
    pool = PagePool(6)
    pool.allocate(6)
    pool.release([range(0, 4)])
    with pytest.raises(InvariantError, match="free twice"):
        pool.release([extent])


def test_the_check_finds_a_leaked_page() -> None:
    pool = PagePool(4)
    held = pool.allocate(2)
    pool.check_invariants(held)
    with pytest.raises(InvariantError, match="do not tile"):
        pool.check_invariants([range(0, 1)])


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_pages_neither_leak_nor_overlap(num_pages: int, script: list[tuple[bool, int]]) -> None:
    pool = PagePool(num_pages)
    held: list[tuple[Extent, ...]] = []
    for is_release, number in script:
        if is_release and held:
            pool.release(held.pop(number % len(held)))
        elif number <= pool.num_free:
            held.append(pool.allocate(number))
            assert sum(map(len, held[-1])) == number
        pool.check_invariants(extent for extents in held for extent in extents)
    for extents in held:
        pool.release(extents)
    pool.check_invariants([])
    assert pool.allocate(num_pages) == (range(num_pages),)
