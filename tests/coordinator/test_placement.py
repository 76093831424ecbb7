"""Spans tile the model in proportion to memory; what does not fit is said with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigurationError
from cluster.microbatch import Epoch
from cluster.model_spec import ModelSizes, Precision, WeightCount
from cluster.placement import Placement, WorkerId, WorkerInfo
from cluster.span import Span, is_tiling
from coordinator.placement import PlacementOptions, place

GIB = 2**30
OPTIONS = PlacementOptions(
    precision=Precision.FP32,
    kv_dtype="auto",
    page_size=64,
    max_context=1024,
    max_running=8,
    kv_memory_bytes=0,
    generation=3,
)


def worker(name: str, free_memory_bytes: int, *, node: str = "", device: str = "cpu") -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        node_name=node or name,
        address=f"{name}:7100",
        device=device,
        device_name="",
        num_threads=1,
        free_memory_bytes=free_memory_bytes,
        total_memory_bytes=free_memory_bytes,
        isa="AVX512",
        process_id=1,
        versions=(),
    )


def model(num_blocks: int, *, block: int = 2**24, head: int = 0, kv: int = 512) -> ModelSizes:
    """Blocks of 64 MiB in fp32; a page of one block takes 128 KiB."""
    return sizes_of([block] * num_blocks, head, kv)


def sizes_of(blocks: Sequence[int], head: int, kv: int) -> ModelSizes:
    return ModelSizes(
        blocks=tuple(WeightCount(num_linear=block) for block in blocks),
        experts=(WeightCount(),) * len(blocks),
        num_experts=0,
        embedding_num_parameters=2**30,
        head=WeightCount(num_linear=head),
        kv_elements_per_token=(kv,) * len(blocks),
        hidden_size=1024,
        num_output_elements=max(blocks) // 1024,
    )


def lengths(placement: Placement) -> list[int]:
    return [len(plan.span) for plan in placement.stages]


def test_blocks_are_shared_in_proportion_to_free_memory() -> None:
    workers = [worker("a", 8 * GIB), worker("b", 4 * GIB), worker("c", 4 * GIB)]
    placement = place(workers, model(24), OPTIONS)
    assert lengths(placement) == [12, 6, 6]
    assert placement.epoch == Epoch(3, 1)
    assert [plan.stage for plan in placement.stages] == [0, 1, 2]


def test_equal_workers_get_spans_that_differ_by_at_most_one_block() -> None:
    assert sorted(lengths(place([worker(name, GIB) for name in "abcd"], model(10), OPTIONS))) == [2, 2, 3, 3]


def test_the_head_is_charged_to_the_last_stage_and_the_embedding_to_nobody() -> None:
    placement = place([worker("a", 8 * GIB), worker("b", 8 * GIB)], model(24, head=4 * 2**24), OPTIONS)
    assert lengths(placement) == [14, 10]
    assert [plan.weight_bytes for plan in placement.stages] == [14 * 2**26, 14 * 2**26]


def test_a_worker_without_much_memory_still_serves_one_block() -> None:
    assert lengths(place([worker("a", 100 * GIB), worker("b", GIB)], model(8), OPTIONS)) == [7, 1]


def test_workers_of_one_node_are_adjacent_and_otherwise_in_the_order_given() -> None:
    workers = [worker("a1", GIB, node="a"), worker("b1", GIB, node="b"), worker("a2", GIB, node="a")]
    assert [plan.worker.worker_id for plan in place(workers, model(6), OPTIONS).stages] == ["a1", "a2", "b1"]


def test_pages_are_at_most_what_can_be_of_use() -> None:
    assert place([worker("a", 100 * GIB)], model(4), OPTIONS).num_pages == 8 * 1024 // 64


def test_pages_are_what_the_tightest_stage_has_room_for() -> None:
    options = replace(OPTIONS, max_running=10**6, max_step_tokens=1)
    placement = place([worker("a", GIB)], model(4), options)
    (plan,) = placement.stages
    buffer_bytes = 2**24 // 1024 * 4
    page_bytes = 4 * 512 * 64 * 4
    assert placement.num_pages == (GIB - 4 * 2**26 - buffer_bytes) // page_bytes
    assert plan.kv_bytes == placement.num_pages * page_bytes


def test_kv_memory_bounds_the_pages() -> None:
    options = replace(OPTIONS, kv_memory_bytes=20 * 4 * 2**17)
    assert place([worker("a", 8 * GIB)], model(4), options).num_pages == 20


def test_a_16_bit_cache_has_twice_the_pages() -> None:
    options = replace(OPTIONS, kv_memory_bytes=20 * 4 * 2**17, kv_dtype="bf16")
    assert place([worker("a", 8 * GIB)], model(4), options).num_pages == 40


def test_a_gpu_keeps_keys_and_values_in_the_dtype_of_its_16_bit_weights() -> None:
    options = replace(OPTIONS, kv_memory_bytes=20 * 4 * 2**17, precision=Precision.BF16)
    assert place([worker("a", 8 * GIB, device="cuda:0")], model(4), options).num_pages == 40


@pytest.mark.parametrize("num_workers", [0, 5])
def test_a_number_of_workers_that_blocks_cannot_be_shared_among_is_refused(num_workers: int) -> None:
    workers = [worker(str(index), GIB) for index in range(num_workers)]
    with pytest.raises(ConfigurationError, match=f"{num_workers} workers cannot share 4 blocks.*from 1 to 4"):
        place(workers, model(4), OPTIONS)


def test_what_does_not_fit_is_said_for_every_stage_with_what_would_help() -> None:
    with pytest.raises(ConfigurationError) as caught:
        place([worker("a", GIB), worker("b", GIB)], model(64), OPTIONS)
    message = str(caught.value)
    assert (
        "stage 0 on a, blocks [0, 32): weights 2.00 GiB + KV 64.00 MiB + buffers 32.00 MiB, may use 1.00 GiB" in message
    )
    assert "stage 1 on b" in message
    for setting in ("--precision bf16", "--workers", "--max-context"):
        assert setting in message


def test_kv_memory_too_small_for_one_context_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="--kv-memory"):
        place([worker("a", 8 * GIB)], model(4), replace(OPTIONS, kv_memory_bytes=2**20))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 8 * GIB), min_size=1, max_size=6),
    st.lists(st.integers(1, 2**26), min_size=6, max_size=24),
    st.integers(0, 2**26),
)
def test_spans_tile_the_model_and_fit_or_the_placement_is_refused(
    memory: list[int], blocks: list[int], head: int
) -> None:
    workers = [worker(str(index), free) for index, free in enumerate(memory)]
    sizes = sizes_of(blocks, head, 512)
    try:
        placement = place(workers, sizes, OPTIONS)
    except ConfigurationError:
        return
    assert is_tiling([plan.span for plan in placement.stages], len(blocks))
    assert placement.num_pages >= OPTIONS.min_pages
    for plan in placement.stages:
        assert plan.weight_bytes + plan.kv_bytes <= plan.worker.free_memory_bytes


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=3), st.integers(3, 8))
def test_a_cut_that_fits_is_found_whenever_there_is_one(quarters: list[int], num_blocks: int) -> None:
    workers = [worker(str(index), count * 2**26) for index, count in enumerate(quarters)]
    options = replace(OPTIONS, max_step_tokens=1, max_context=64)
    per_block = 2**26 + 2**17
    capacity = sum((count * 2**26 - 2**16) // per_block for count in quarters)
    can_fit = capacity >= num_blocks and min(quarters) > 1 and len(quarters) <= num_blocks
    if can_fit:
        placement = place(workers, model(num_blocks), options)
        assert placement.stages[0].span.start == 0
        assert placement.stages[-1].span == Span(placement.stages[-1].span.start, num_blocks)
    else:
        with pytest.raises(ConfigurationError):
            place(workers, model(num_blocks), options)
