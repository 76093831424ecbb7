"""Spans tile the model in proportion to memory; what does not fit is said with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigurationError
from cluster.load_order import GPU_SLOTS
from cluster.microbatch import Epoch
from cluster.model_spec import ModelSizes, Precision, WeightCount
from cluster.placement import Placement, WorkerId, WorkerInfo
from cluster.span import is_tiling, streaming_order
from coordinator.memory import MAX_RING_SLOTS, PROCESS_BYTES
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
        free_host_bytes=0 if device == "cpu" else GIB,
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
        embedding_num_parameters=head,  # as large as the head, and read from a memory map
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
    assert [plan.memory.weight_bytes for plan in placement.stages] == [14 * 2**26, 14 * 2**26]


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
    page_bytes = 4 * 512 * 64 * 4
    assert placement.num_pages == (GIB - 4 * 2**26 - plan.memory.buffer_bytes) // page_bytes
    assert plan.memory.kv_bytes == placement.num_pages * page_bytes


def test_kv_memory_bounds_the_pages() -> None:
    options = replace(OPTIONS, kv_memory_bytes=20 * 4 * 2**17)
    assert place([worker("a", 8 * GIB)], model(4), options).num_pages == 20


def test_weights_that_would_fit_are_streamed_for_the_kv_memory_that_was_asked_for() -> None:
    tight = [worker("a", GIB)]
    sizes = model(11, kv=2**12)  # of 704 MiB, and 11 MiB per page
    options = replace(OPTIONS, max_context=128, max_running=64, max_step_tokens=1)
    (plan,) = place(tight, sizes, options).stages
    assert not plan.memory.is_streamed
    asked = replace(options, kv_memory_bytes=16 * 11 * 2**20)
    placement = place(tight, sizes, asked)
    assert placement.num_pages == 16 > plan.memory.kv_bytes // (11 * 2**20)
    assert placement.is_streamed
    assert not place([worker("a", 2 * GIB)], sizes, asked).is_streamed


def test_little_room_for_keys_and_values_is_said_with_the_kv_memory_that_streaming_makes_room_for() -> None:
    tight, sizes = [worker("a", GIB)], model(11, kv=2**12)
    options = replace(OPTIONS, max_context=128, max_running=64, max_step_tokens=1)
    advice = place(tight, sizes, options).advice
    assert "memory is left for 2 sequence(s) of 128 tokens at once: --kv-memory 88MiB makes room for 4" in advice
    followed = place(tight, sizes, replace(options, kv_memory_bytes=88 * 2**20))
    assert followed.num_pages == 8
    assert "--kv-memory" not in followed.advice
    assert place([worker("a", 2 * GIB)], sizes, options).advice == ""


@pytest.mark.parametrize("sizes", [(1100, 1300), (1300, 1100), (1250, 1200)])
def test_where_another_stage_is_streamed_no_stage_is_resident_at_the_price_of_pages(sizes: tuple[int, int]) -> None:
    workers = [worker(str(size), size * 2**20) for size in sizes]
    placement = place(workers, model(24, kv=2**12), replace(OPTIONS, max_running=64, max_step_tokens=64))
    assert placement.num_pages > 50
    assert all(plan.memory.is_streamed for plan in placement.stages)


def test_a_streamed_model_is_cut_to_have_room_for_four_sequences_where_that_is_possible() -> None:
    """At 464 MiB, the last stage of the cut that reads least would be resident, with room for one."""
    sizes = replace(model(14, block=2**23, head=2**24, kv=2**11), num_output_elements=2**14)
    options = replace(OPTIONS, max_context=512, max_running=64, max_step_tokens=64)
    for size in range(450, 480, 3):
        placement = place([worker(name, size * 2**20) for name in "ab"], sizes, options)
        assert placement.num_pages >= 4 * options.min_pages


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


def test_what_does_not_fit_even_streamed_is_said_for_every_stage_with_what_would_help() -> None:
    workers = [replace(worker("a", GIB // 2), process_bytes=GIB // 2), worker("b", GIB // 2)]
    with pytest.raises(ConfigurationError) as caught:
        place(workers, model(64, kv=2**14), OPTIONS)
    message = str(caught.value)
    assert "stage 0 on a, blocks [0, 32): weights 2.00 GiB + KV 2.00 GiB + buffers 0.25 GiB, with streaming" in message
    assert "2.44 GiB in all, may use 0.50 GiB beside the 0.50 GiB that its process takes" in message
    assert "stage 1 on b" in message
    assert "what would help: --memory 3024MiB" in message


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": Precision.BF16},
        {"max_context": 512},
        {"max_step_tokens": 256},
        {"kv_dtype": "bf16"},
    ],
)
def test_exactly_the_settings_that_would_make_the_model_fit_are_named(changed: dict[str, object]) -> None:
    options = replace(OPTIONS, max_step_tokens=1024)
    sizes = replace(model(2, kv=2**15), num_output_elements=2**17)
    least = least_memory(sizes, options)
    (name,) = changed
    flag = f"--{name.replace('_', '-')} {getattr(changed[name], 'value', changed[name])}"
    changed_least = least_memory(sizes, replace(options, **changed))  # type: ignore[arg-type]  # a field's own value
    assert changed_least < least
    for free, is_named in ((changed_least, True), (changed_least - 2**20, False)):
        with pytest.raises(ConfigurationError) as caught:
            place([worker("a", free)], sizes, options)
        assert (flag in str(caught.value)) == is_named


def least_memory(sizes: ModelSizes, options: PlacementOptions, *, num_workers: int = 1) -> int:
    """Return the --memory that the refusal of workers without any names."""
    with pytest.raises(ConfigurationError, match="--memory") as caught:
        place([worker(str(index), 0) for index in range(num_workers)], sizes, options)
    return int(str(caught.value).partition("help: --memory ")[2].partition("MiB")[0]) * 2**20


def test_more_workers_are_suggested_where_they_would_help() -> None:
    with pytest.raises(ConfigurationError, match="or more workers with as much memory"):
        place([worker("a", GIB)], model(32, kv=2**13), OPTIONS)
    with pytest.raises(ConfigurationError) as caught:
        place([worker("a", GIB)], model(1, kv=2**20), OPTIONS)
    assert "more workers" not in str(caught.value)


@settings(deadline=None)
@given(st.lists(st.integers(2**16, 2**26), min_size=3, max_size=8), st.integers(0, 2**26), st.integers(1, 3))
def test_the_memory_that_a_refusal_names_is_enough_and_so_is_more_and_less_is_not(
    blocks: list[int], head: int, num_workers: int
) -> None:
    sizes = sizes_of(blocks, head, 2**12)
    least = least_memory(sizes, OPTIONS, num_workers=num_workers)
    for extra in (0, 2**20, 2**26, 2**29):
        assert place([worker(str(index), least + extra) for index in range(num_workers)], sizes, OPTIONS).num_pages
    with pytest.raises(ConfigurationError):
        place([worker(str(index), least - 2**20) for index in range(num_workers)], sizes, OPTIONS)


def test_a_precision_is_suggested_only_where_it_would_help() -> None:
    tight = [worker("a", 700 * 2**20)]
    options = replace(OPTIONS, precision=Precision.BF16)
    assert place(tight, model(64), options).advice == ""  # int8 would stream too, and so would NF4
    assert place([worker("a", 2 * GIB)], model(64), options).advice == "--precision int8 would fit without streaming"
    assert place([worker("a", 2 * GIB)], model(64), replace(options, is_precision_fixed=True)).advice == ""
    assert place([worker("a", 3 * GIB)], model(64), options).advice == ""


def test_a_precision_that_would_fit_is_named_in_the_refusal() -> None:
    options = replace(OPTIONS, max_step_tokens=1)
    with pytest.raises(ConfigurationError, match="--precision nf4"):
        place([worker("a", 420 * 2**20)], model(1, block=2**28), options)


def test_a_context_that_nobody_asked_for_is_shortened_until_it_fits() -> None:
    options = replace(OPTIONS, max_context=4096, is_context_fixed=False)
    placement = place([worker("a", GIB)], model(32, kv=2**13), options)
    assert placement.max_context == 512
    assert "contexts of 512 tokens instead of 4096" in placement.advice
    with pytest.raises(ConfigurationError, match=r"(?s)one sequence of 4096 tokens.*--max-context 512"):
        place([worker("a", GIB)], model(32, kv=2**13), replace(options, is_context_fixed=True))
    with pytest.raises(ConfigurationError, match="one sequence of 256 tokens") as caught:
        place([worker("a", GIB // 8)], model(32, kv=2**13), options)
    assert "--max-context" not in str(caught.value)


def test_a_gpu_without_host_memory_for_the_ring_is_refused_with_both_numbers() -> None:
    gpu = replace(worker("a", GIB, device="cuda:0"), free_host_bytes=2**20)
    with pytest.raises(ConfigurationError, match=r"of the machine's own memory, which may use 1\.00 MiB"):
        place([gpu], model(32), OPTIONS)


def test_experts_that_do_not_fit_a_gpu_are_cached_in_the_machine_s_own_memory() -> None:
    sizes = replace(model(8), experts=(WeightCount(num_linear=2**24 * 7 // 8),) * 8, num_experts=8)
    gpu = worker("a", GIB // 2, device="cuda:0")
    large, small = (place([replace(gpu, free_host_bytes=size)], sizes, OPTIONS) for size in (8 * GIB, GIB // 2))
    splits = [placement.stages[0].memory for placement in (large, small)]
    assert [split.streamed_bytes for split in splits] == [8 * 2**26 * 7 // 8] * 2
    assert splits[0].streamed_bytes <= splits[0].expert_cache_bytes < GIB
    assert splits[1].expert_cache_bytes == GIB // 2 - PROCESS_BYTES


def test_what_4_bit_weights_become_on_a_gpu_is_among_its_buffers() -> None:
    options = replace(OPTIONS, precision=Precision.NF4)
    on_gpu, on_cpu = (
        place([worker("a", 8 * GIB, device=device)], model(4, block=2**27), options).stages[0].memory.buffer_bytes
        for device in ("cuda:0", "cpu")
    )
    assert on_gpu - on_cpu >= 2**26 * 2  # half a block in bf16


def test_kv_memory_too_small_for_one_context_is_refused_with_what_would_do() -> None:
    with pytest.raises(ConfigurationError, match=r"what would help: --kv-memory 8MiB$"):
        place([worker("a", 8 * GIB)], model(4), replace(OPTIONS, kv_memory_bytes=2**20))


def test_the_stage_that_reads_most_reads_as_little_as_possible() -> None:
    """Proportional spans would leave the larger worker's memory empty: its working buffers are no larger."""
    small, large = worker("a", GIB), worker("b", 4 * GIB)
    placement = place([small, large], model(64), OPTIONS)
    assert [plan.memory.is_streamed for plan in placement.stages] == [False, False]
    placement = place([small, large], model(96), OPTIONS)
    first, second = (plan.memory.streamed_bytes for plan in placement.stages)
    assert 0 < max(first, second) <= 17 * 2**26


def test_steps_take_whole_prompts_where_blocks_are_streamed_and_memory_allows() -> None:
    options = replace(OPTIONS, max_context=8192)
    assert place([worker("a", 16 * GIB)], model(64), options).max_step_tokens == 512
    assert place([worker("a", 3 * GIB)], model(64), options).max_step_tokens > 512
    assert place([worker("a", 64 * GIB)], model(1200), options).max_step_tokens == 8192


def test_steps_never_take_more_tokens_than_was_asked_for() -> None:
    options = replace(OPTIONS, max_context=8192, max_step_tokens=128)
    assert place([worker("a", 3 * GIB)], model(64), options).max_step_tokens == 128


WORKERS = st.lists(st.integers(2**27, 8 * GIB), min_size=1, max_size=5)
BLOCKS = st.lists(st.integers(2**16, 2**27), min_size=5, max_size=24)
PRECISIONS = st.sampled_from(list(Precision))


@settings(deadline=None, max_examples=200)
@given(
    WORKERS,
    BLOCKS,
    st.integers(0, 2**27),
    PRECISIONS,
    st.sampled_from(["cpu", "cuda:0"]),
    st.booleans(),
    st.sampled_from([0, 2**26, 2**29, 2**32]),
)
def test_everything_planned_stays_within_the_budget_or_the_placement_is_refused(
    memory: list[int],
    blocks: list[int],
    head: int,
    precision: Precision,
    device: str,
    has_experts: bool,
    kv_memory: int,
) -> None:
    workers = [worker(str(index), free, device=device) for index, free in enumerate(memory)]
    sizes = sizes_of(blocks, head, 512)
    if has_experts:
        experts = tuple(WeightCount(num_linear=block * 7 // 8) for block in blocks)
        sizes = replace(sizes, experts=experts, num_experts=8)
    try:
        placement = place(workers, sizes, replace(OPTIONS, precision=precision, kv_memory_bytes=kv_memory))
    except ConfigurationError:
        return
    assert is_tiling([plan.span for plan in placement.stages], len(blocks))
    assert placement.num_pages >= OPTIONS.min_pages
    for plan in placement.stages:
        split = plan.memory
        taken = split.small_bytes + split.shared_bytes + split.buffer_bytes
        if device == "cpu":
            taken += split.ring_bytes + split.expert_cache_bytes
        else:  # whose ring and cache are the machine's
            assert split.ring_bytes + split.expert_cache_bytes + PROCESS_BYTES <= plan.worker.free_host_bytes
            taken += GPU_SLOTS * (split.ring_bytes // MAX_RING_SLOTS)
        assert taken <= split.budget_bytes == plan.worker.free_memory_bytes
        context_bytes = split.kv_bytes // placement.num_pages * OPTIONS.min_pages
        assert split.weight_bytes + context_bytes <= split.small_bytes + split.shared_bytes
        assert split.kv_bytes <= min(split.shared_bytes, kv_memory or split.shared_bytes)
        assert split.is_streamed == (split.ring_bytes + split.expert_cache_bytes > 0)
        assert (split.num_streamed > 0) == (split.is_streamed and not has_experts)
        if device != "cpu" or has_experts or not split.is_streamed:
            assert split.weight_bytes + split.kv_bytes <= split.small_bytes + split.shared_bytes  # nothing to shift


@settings(deadline=None, max_examples=200)
@given(st.integers(2**27, 8 * GIB), BLOCKS, st.integers(0, 2**27))
def test_no_more_parts_are_streamed_than_must_be(free: int, blocks: list[int], head: int) -> None:
    sizes = sizes_of(blocks, head, 512)
    try:
        placement = place([worker("a", free)], sizes, OPTIONS)
    except ConfigurationError:
        return
    (plan,) = placement.stages
    split = plan.memory
    if split.num_streamed > 1:  # one may be streamed only for the weights to come piece by piece
        order = streaming_order(len(blocks))
        parts = [4 * blocks[index] for index in order] + [4 * head]
        assert split.streamed_bytes == sum(parts[: split.num_streamed])
        context_bytes = split.kv_bytes // placement.num_pages * OPTIONS.min_pages
        last = parts[split.num_streamed - 1]
        assert split.weight_bytes + last + context_bytes > split.small_bytes + split.shared_bytes


@settings(deadline=None)
@given(st.lists(st.integers(4, 16), min_size=2, max_size=3), st.integers(3, 12))
def test_a_cut_without_streaming_is_found_whenever_there_is_one(quarters: list[int], num_blocks: int) -> None:
    workers = [worker(str(index), count * 2**26) for index, count in enumerate(quarters)]
    options = replace(OPTIONS, max_step_tokens=1, max_context=64)
    per_block = 2**26 + 2**17
    buffers = place([worker("a", GIB)], model(1), options).stages[0].memory.buffer_bytes
    capacities = [(count * 2**26 - buffers) // per_block for count in quarters]
    if sum(capacities) >= num_blocks >= len(quarters) and min(capacities) > 0:
        placement = place(workers, model(num_blocks), options)
        assert not placement.is_streamed


def test_a_large_cluster_is_placed_in_moments() -> None:
    """Of BLOOM-176B's shape: the number of cuts that are compared is what matters."""
    workers = [worker(f"w{index}", (8 + index) * GIB) for index in range(12)]
    sizes = sizes_of([12 * 14_336**2] * 70, 250_880 * 14_336, 2 * 14_336)
    sizes = replace(sizes, hidden_size=14_336, num_output_elements=9 * 14_336, num_heads=112)
    placement = place(workers, sizes, replace(OPTIONS, precision=Precision.INT8, max_context=2048))
    assert placement.is_streamed
