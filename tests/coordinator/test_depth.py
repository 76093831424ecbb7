"""From measured times to how many steps, and how large."""

from __future__ import annotations

import pytest

from cluster.microbatch import StageTiming
from coordinator.depth import MAX_DEPTH_PER_STAGE, MEMORY_STEPS, PipelineTimes, StepCurve
from tests.coordinator.simulator import StageSeconds, linear


def measured(
    *stages: StageSeconds, hop_seconds: float = 0.0, sizes: tuple[int, ...] = (1, 8, 64, 512)
) -> PipelineTimes:
    times = PipelineTimes(len(stages))
    for size in sizes:
        seconds = [stage(size) for stage in stages]
        timings = [StageTiming(index, 0, 0, round(value * 1e9)) for index, value in enumerate(seconds)]
        times.observe(size, timings, sum(seconds) + hop_seconds)
    return times


def test_a_single_measurement_is_taken_as_proportional() -> None:
    curve = StepCurve()
    curve.observe(8, 0.4)
    assert [curve.seconds(tokens) for tokens in (2, 8, 80)] == [pytest.approx(value) for value in (0.1, 0.4, 4.0)]


def test_between_measurements_seconds_are_linear_and_beyond_them_the_line_goes_on() -> None:
    curve = StepCurve()
    curve.observe(4, 3.0)
    curve.observe(16, 6.0)
    assert [curve.seconds(tokens) for tokens in (2, 4, 8, 16, 32)] == [2.5, 3.0, 4.0, 6.0, 10.0]


def test_a_token_takes_no_more_time_among_more_of_them() -> None:
    curve = StepCurve()
    curve.observe(4, 1.0)
    curve.observe(8, 9.0)
    assert [curve.seconds(tokens) for tokens in (1, 4, 8, 16)] == [0.25, 1.0, 2.0, 4.0]


def test_large_steps_that_happened_to_be_slow_do_not_split_the_work_of_a_single_stage() -> None:
    times = PipelineTimes(1)
    for size, seconds in ((8, 0.05), (32, 0.11), (70, 0.2), (140, 0.45), (500, 1.9)):
        times.observe(size, [StageTiming(0, 0, 0, round(seconds * 1e9))], seconds + 0.002)
    assert times.depth(500, 512) == 1
    assert times.prompt_chunk(480, 16, 512) == 480


def test_a_small_step_that_happened_to_be_slow_counts_as_no_slower_than_a_larger_one() -> None:
    curve = StepCurve()
    curve.observe(8, 9.0)
    curve.observe(16, 2.0)
    assert curve.seconds(8) == 2.0
    times = PipelineTimes(2)
    for size, seconds in ((8, 9.0), (16, 2.0)):
        times.observe(size, [StageTiming(stage, 0, 0, round(seconds * 1e9)) for stage in (0, 1)], 2 * seconds)
    assert times.depth(16, 512) == 2


def test_a_size_not_seen_for_long_is_forgotten() -> None:
    curve = StepCurve()
    curve.observe(1, 2.0)
    for _ in range(MEMORY_STEPS):
        curve.observe(16, 2.0)
    assert curve.seconds(8) == pytest.approx(1.0)


def test_old_measurements_fade() -> None:
    curve = StepCurve()
    curve.observe(8, 1.0)
    for _ in range(30):
        curve.observe(8, 2.0)
    assert curve.seconds(8) == pytest.approx(2.0, rel=0.01)


def test_before_any_measurement_there_is_one_step_per_stage_as_large_as_may_be() -> None:
    times = PipelineTimes(3)
    assert times.depth(1000, 512) == 3
    assert times.largest_step(3, 4, 0.5, 512) == 512


@pytest.mark.parametrize(
    ("stages", "hop_seconds", "depth"),
    [
        ([1.0], 0.0, 1),
        ([1.0, 1.0], 0.0, 2),
        ([1.0, 1.0, 1.0, 1.0], 0.0, 4),
        ([1.0, 0.5, 0.5], 0.0, 3),
        ([1.0, 0.2], 0.0, 2),
        ([1.0, 1.0], 1.0, 3),
        ([1.0, 1.0], 2.5, 5),
    ],
)
def test_depth_keeps_the_slowest_stage_busy(stages: list[float], hop_seconds: float, depth: int) -> None:
    """Steps of 64 tokens, whatever the depth: (sum of stage times + hops) / slowest stage time, rounded up, and one
    step per stage where that is more."""
    times = measured(*(linear(0.0, value / 64) for value in stages), hop_seconds=hop_seconds, sizes=(64,))
    assert times.depth(10**6, 64) == depth


def test_depth_is_bounded() -> None:
    times = measured(linear(0.0, 0.001), hop_seconds=100.0)
    assert times.depth(10**6, 512) == MAX_DEPTH_PER_STAGE


def test_there_are_no_more_steps_than_tokens() -> None:
    assert measured(linear(0.0, 0.001), linear(0.0, 0.001), hop_seconds=1.0).depth(1, 512) == 1


def test_nothing_to_compute_needs_one_step_at_most() -> None:
    assert measured(linear(0.0, 0.001)).depth(0, 512) == 1


def test_a_stage_as_slow_for_one_token_as_for_many_gets_one_group() -> None:
    assert measured(linear(1.0, 0.0), linear(0.1, 0.001)).depth(16, 512) == 1


def test_equal_stages_with_a_fixed_cost_still_overlap() -> None:
    assert measured(linear(0.01, 0.001), linear(0.01, 0.001)).depth(16, 512) == 2


def test_the_largest_step_keeps_a_round_within_the_target() -> None:
    times = measured(linear(0.01, 0.001), linear(0.01, 0.001))
    largest = times.largest_step(2, 4, 0.2, 512)
    assert times.round_seconds(2, largest) <= 0.2 < times.round_seconds(2, largest + 1)
    assert largest == pytest.approx(90, abs=1)


def test_where_decoding_alone_is_slow_prompts_may_double_the_round() -> None:
    assert measured(linear(1.0, 0.0)).largest_step(1, 4, 0.2, 512) == 512
    assert measured(linear(0.0, 0.1)).largest_step(1, 8, 0.2, 512) == 16


def test_timings_that_do_not_name_every_stage_are_not_used() -> None:
    times = PipelineTimes(2)
    times.observe(8, [StageTiming(0, 0, 0, 10)], 1.0)
    assert not times.is_measured


def test_with_a_streamed_stage_one_step_is_in_flight_until_something_else_was_measured() -> None:
    times = PipelineTimes(3, is_streamed=True)
    assert times.depth(1000, 512) == 1
    times.observe(30, [StageTiming(index, 0, 0, 10**9) for index in range(3)], 3.0)
    assert times.depth(16, 512) == 1  # a single measurement is taken as the same for any number of tokens
    measured_times = PipelineTimes(2, is_streamed=True)
    for size in (1, 8, 64, 512):
        measured_times.observe(size, [StageTiming(index, 0, 0, size * 10**8) for index in range(2)], 0.2 * size)
    assert measured_times.depth(64, 512) == 2
