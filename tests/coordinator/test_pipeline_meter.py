"""Totals of busy and bubble time, bytes and hops from stage timings."""

from __future__ import annotations

from cluster.microbatch import StageTiming
from coordinator.pipeline_meter import PipelineMeter


def timing(stage: int, started: int, finished: int, received_bytes: int = 0) -> StageTiming:
    return StageTiming(stage, started, started, finished, received_bytes)


def test_time_between_two_steps_is_bubble() -> None:
    meter = PipelineMeter(["a"])
    meter.count([timing(0, 100, 150)])
    meter.count([timing(0, 170, 200)])
    assert (meter.stages[0].num_steps, meter.stages[0].busy_ns, meter.stages[0].bubble_ns) == (2, 80, 20)


def test_time_without_work_is_no_bubble() -> None:
    meter = PipelineMeter(["a"])
    meter.count([timing(0, 100, 150)])
    meter.rest()
    meter.count([timing(0, 9_000, 9_010)])
    meter.count([timing(0, 9_015, 9_020)])
    assert meter.stages[0].bubble_ns == 5


def test_hop_is_measured_where_the_stage_was_idle() -> None:
    meter = PipelineMeter(["a", "a"])
    meter.count([timing(0, 0, 10), timing(1, 13, 100)])
    meter.count([timing(0, 10, 20), timing(1, 100, 110)])  # stage 1 was busy until 100: its wait is no hop
    meter.count([timing(0, 120, 130), timing(1, 135, 140)])
    assert list(meter.stages[1].recent_hops_ns) == [3, 5]
    assert meter.stages[1].hop_seconds == 4e-9
    assert meter.stages[0].hop_seconds is None


def test_clocks_of_two_nodes_are_not_compared() -> None:
    meter = PipelineMeter(["a", "b"])
    meter.count([timing(0, 0, 10), timing(1, 9_999, 10_000)])
    assert meter.stages[1].hop_seconds is None


def test_received_bytes_add_up_and_a_step_may_end_early() -> None:
    meter = PipelineMeter(["a", "a", "a"])
    meter.count([timing(0, 0, 1), timing(1, 2, 3, received_bytes=28_672)])
    meter.count([timing(0, 4, 5), timing(1, 6, 7, received_bytes=28_672), timing(2, 8, 9, received_bytes=5)])
    assert [totals.received_bytes for totals in meter.stages] == [0, 57_344, 5]
    assert [totals.num_steps for totals in meter.stages] == [2, 2, 1]


def test_what_steps_read_and_waited_for_adds_up() -> None:
    meter = PipelineMeter(["a"])
    for resident in (700, 500):
        meter.count([StageTiming(0, 0, 0, 9, read_bytes=100, stall_ns=4, resident_bytes=resident)])
    (totals,) = meter.stages
    assert (totals.read_bytes, totals.stall_ns, totals.resident_bytes) == (200, 8, 500)
