"""The board shows what is true now, also of weights that come and go while a model is served."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.clock import SystemClock
from cluster.microbatch import Epoch, StageTiming
from cluster.model_spec import FolderSource, ModelSpec, Precision
from cluster.placement import MemoryPlan, Placement, StagePlan
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.span import Span
from coordinator.board import StatusBoard
from coordinator.coordinator import SLOW_DISK_BYTES_PER_SECOND, reading_seconds
from tests.worker.stages import worker_info

SPEC = ModelSpec("m", FolderSource("/m", "0" * 40), "llama", {}, 4, 8, 16, 64, frozenset(), ())
RESIDENT = MemoryPlan(
    budget_bytes=10**9,
    weight_bytes=400,
    small_bytes=10,
    streamed_bytes=0,
    num_streamed=0,
    kv_bytes=100,
    shared_bytes=500,
    ring_bytes=0,
    buffer_bytes=50,
    expert_cache_bytes=0,
)
STREAMED = replace(RESIDENT, weight_bytes=150, streamed_bytes=250, num_streamed=2, ring_bytes=60)
OF_EXPERTS = replace(RESIDENT, weight_bytes=100, streamed_bytes=300, expert_cache_bytes=80)


def placement_of(*plans: MemoryPlan) -> Placement:
    stages = tuple(
        StagePlan(stage, worker_info(stage), Span(stage, stage + 1), Precision.INT8, plan)
        for stage, plan in enumerate(plans)
    )
    return Placement(Epoch(1, 1), stages, num_pages=8, page_size=64, max_context=64, max_step_tokens=64)


def board_of(plan: MemoryPlan) -> StatusBoard:
    board = StatusBoard(SPEC, has_chat_template=False, clock=SystemClock())
    board.place(placement_of(plan))
    return board


def after_step(board: StatusBoard, *, read_bytes: int, resident_bytes: int) -> service.StageStatus:
    """Return the stage as it is shown after a step of 5 ns."""
    board.count_timings((StageTiming(0, 0, 0, 5, read_bytes=read_bytes, resident_bytes=resident_bytes),))
    return board.describe().stages[0]


def test_blocks_that_keys_and_values_push_out_are_shown_as_read_and_those_that_return_are_not() -> None:
    board = board_of(STREAMED)
    (stage,) = board.describe().stages
    assert (stage.resident_bytes, stage.streamed_bytes, stage.resident_share) == (150, 250, 0.375)
    for resident_bytes in (50, 150, 400):
        stage = after_step(board, read_bytes=0, resident_bytes=resident_bytes)
        assert (stage.resident_bytes, stage.streamed_bytes) == (resident_bytes, 400 - resident_bytes)
        assert stage.resident_share == resident_bytes / 400


def test_experts_that_are_cached_are_still_read_on_demand() -> None:
    stage = after_step(board_of(OF_EXPERTS), read_bytes=0, resident_bytes=180)
    assert (stage.resident_bytes, stage.streamed_bytes, stage.resident_share) == (180, 300, 0.45)


def test_bytes_are_read_per_second_of_computing() -> None:
    board = board_of(STREAMED)
    assert board.describe().stages[0].read_bytes_per_second == 0
    for _ in range(2):
        stage = after_step(board, read_bytes=250, resident_bytes=150)
    assert stage.read_bytes_per_second == 250 / 5e-9


@pytest.mark.parametrize(("plan", "num_bytes"), [(RESIDENT, 0), (STREAMED, 390), (OF_EXPERTS, 390)])
def test_a_step_may_take_as_long_as_reading_all_that_may_be_streamed(plan: MemoryPlan, num_bytes: int) -> None:
    assert reading_seconds(placement_of(RESIDENT, plan)) == num_bytes / SLOW_DISK_BYTES_PER_SECOND
