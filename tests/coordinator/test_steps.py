"""Steps keep a pipeline full: the scheduler against simulated stages, in simulated time."""

from __future__ import annotations

import random

import pytest

from cluster.microbatch import StepHeader
from cluster.request import RequestId
from coordinator.events import RequestAborted
from coordinator.scheduler import Scheduler
from coordinator.steps import GATHER_SECONDS
from tests.coordinator.requests import make_limits, make_request
from tests.coordinator.simulator import Simulation, StageSeconds, linear


def num_decodes(header: StepHeader) -> int:
    slices = zip(header.lengths, header.start_positions, strict=True)
    return sum(length == 1 and start > 0 for length, start in slices)


def simulate(*stages: StageSeconds, hop_seconds: float = 0.0, **limits: object) -> Simulation:
    return Simulation(Scheduler(make_limits(page_size=64, **limits)), stages, hop_seconds)


def streams(simulation: Simulation, count: int, *, prompt: int, max_tokens: int, every: float = 0.0) -> None:
    for index in range(count):
        request = make_request(str(index), prompt, max_tokens, ignore_eos=True)
        simulation.arrive(index * every, request)


@pytest.mark.parametrize("every", [0.0, 0.003, 0.05])
def test_16_streams_on_two_equal_stages_settle_in_two_alternating_groups_of_8(every: float) -> None:
    simulation = simulate(linear(0.002, 0.001), linear(0.002, 0.001), hop_seconds=0.0001)
    streams(simulation, 16, prompt=16, max_tokens=100, every=every)
    simulation.run()
    settled = simulation.headers[60:90]
    assert {num_decodes(header) for header in settled} == {8}
    groups = [frozenset(header.sequence_ids) for header in settled]
    assert set(groups[::2]) == {groups[0]}
    assert set(groups[1::2]) == {groups[1]}
    assert not groups[0] & groups[1]
    first, last = simulation.timings[60], simulation.timings[89]
    assert max(simulation.bubble_share(first[0].started_ns * 1e-9, last[0].started_ns * 1e-9)) < 0.03


def test_the_slowest_of_four_unequal_stages_never_waits() -> None:
    stages = [linear(0.002, 0.001), linear(0.001, 0.0005), linear(0.002, 0.0015), linear(0.001, 0.0008)]
    simulation = simulate(*stages, hop_seconds=0.0005)
    streams(simulation, 24, prompt=16, max_tokens=80)
    simulation.run()
    shares = simulation.bubble_share(0.2 * simulation.now, 0.9 * simulation.now)
    assert shares[2] == min(shares)
    assert shares[2] < 0.02


def test_slow_hops_are_filled_with_more_steps_than_stages() -> None:
    simulation = simulate(linear(0.001, 0.001), linear(0.001, 0.001), hop_seconds=0.01)
    streams(simulation, 32, prompt=16, max_tokens=60)
    simulation.run()
    assert simulation.peak_in_flight > 3
    assert max(simulation.bubble_share(0.3 * simulation.now, 0.8 * simulation.now)) < 0.05


def test_bursts_of_mixed_prompts_leave_few_bubbles_and_no_request_behind() -> None:
    draw = random.Random(5)
    simulation = simulate(linear(0.004, 0.001), linear(0.004, 0.001), linear(0.004, 0.001), hop_seconds=0.0005)
    for index in range(60):
        burst = 1.5 * (index // 20)
        request = make_request(str(index), draw.randint(1, 400), draw.randint(5, 80), ignore_eos=True)
        simulation.arrive(burst, request)
    simulation.run()
    assert len(simulation.finished) == 60
    assert max(simulation.bubble_share(0.05 * simulation.now, 0.9 * simulation.now)) < 0.05


def test_a_long_prompt_is_in_flight_in_several_chunks() -> None:
    simulation = simulate(linear(0.01, 0.001), linear(0.01, 0.001))
    simulation.arrive(0.0, make_request("a", 2000, 2, ignore_eos=True))
    simulation.run()
    assert sum(header.num_tokens for header in simulation.headers) == 2001
    assert simulation.peak_in_flight >= 2
    starts = [timings[0].started_ns for timings in simulation.timings[:4]]
    assert starts[1] == simulation.timings[0][0].finished_ns


def test_prompts_are_cut_so_that_decoding_streams_keep_their_pace() -> None:
    simulation = simulate(linear(0.004, 0.001), linear(0.004, 0.001), inter_token_target=0.1)
    streams(simulation, 4, prompt=16, max_tokens=200)
    simulation.run(until=0.5)
    simulation.arrive(0.5, make_request("long", 3000, 2, ignore_eos=True))
    simulation.run()
    for index in range(4):
        *_, second_widest, widest = sorted(simulation.gaps(str(index), after=0.5))
        assert second_widest < 0.1 * 1.05
        assert widest < 0.1 * 1.5  # the prompt's first chunk enters a pipeline of small steps
    alone = [header for header in simulation.headers if max(header.lengths) > 100]
    assert alone == []


def test_prompts_alone_pass_in_pieces_that_fill_and_drain_the_pipeline_quickly() -> None:
    simulation = simulate(linear(0.004, 0.01), linear(0.004, 0.01), inter_token_target=0.1)
    simulation.arrive(0.0, make_request("warm", 64, 1, ignore_eos=True))
    simulation.run()
    begun = simulation.now
    simulation.arrive(begun, make_request("long", 2048, 1, ignore_eos=True))
    simulation.run()
    one_stage_alone = 2048 * 0.01
    assert simulation.now - begun < 1.1 * one_stage_alone  # in whole steps of 512 it would be 1.25


def test_a_stage_whose_time_does_not_depend_on_tokens_sees_one_group() -> None:
    """A streamed stage reads its blocks from disk for 1 token as for 16: splitting groups only adds readings."""
    simulation = simulate(linear(1.0, 0.0001), linear(0.05, 0.001))
    simulation.arrive(0.0, make_request("canary", 5, 2, ignore_eos=True))
    streams(simulation, 16, prompt=30, max_tokens=20)
    simulation.run()
    assert {num_decodes(header) for header in simulation.headers[-15:-1]} <= {
        15,
        16,
    }  # one began a step later than the rest
    assert len(simulation.headers) < 30


def test_noisy_stages_with_a_slow_start_still_settle() -> None:
    """The first steps of a process are slow ones; times vary by a fifth afterwards."""
    draw = random.Random(11)
    num_slow = iter(range(8))

    def noisy(num_tokens: int) -> float:
        return (0.004 + 0.001 * num_tokens) * draw.uniform(0.9, 1.1) * (10 if next(num_slow, None) is not None else 1)

    simulation = simulate(noisy, noisy, hop_seconds=0.0002)
    streams(simulation, 16, prompt=16, max_tokens=200, every=0.01)
    simulation.run()
    sizes = [num_decodes(header) for header in simulation.headers[100:300]]
    assert sizes.count(8) > 0.8 * len(sizes)
    assert max(simulation.bubble_share(0.3 * simulation.now, 0.9 * simulation.now)) < 0.1


def test_streams_that_arrive_one_by_one_join_running_groups() -> None:
    simulation = simulate(linear(0.004, 0.001), linear(0.004, 0.001), hop_seconds=0.0002)
    streams(simulation, 8, prompt=10, max_tokens=50, every=0.02)
    simulation.run()
    mixed = [header for header in simulation.headers if 0 < num_decodes(header) < len(header.lengths)]
    assert mixed
    for index in range(8):
        at, report = simulation.finished[RequestId(str(index))]
        assert report.queue_seconds == 0.0
        total = report.queue_seconds + report.prefill_seconds + report.decode_seconds
        assert total == pytest.approx(at - index * 0.02)


def test_prompts_advance_however_many_sequences_decode() -> None:
    simulation = simulate(linear(0.001, 0.0001), max_step_tokens=8, max_running=64)
    streams(simulation, 32, prompt=2, max_tokens=40)
    simulation.arrive(0.01, make_request("late", 40, 1, ignore_eos=True))
    simulation.run()
    late, _ = simulation.finished[RequestId("late")]
    assert late < min(at for name, (at, _) in simulation.finished.items() if name != "late")


def test_with_a_streamed_stage_prompts_pass_at_once_and_decodes_join_them() -> None:
    simulation = simulate(linear(2.0, 0.0001), linear(0.05, 0.001), is_streamed=True, max_step_tokens=2048)
    streams(simulation, 4, prompt=400, max_tokens=30)
    simulation.arrive(30.0, make_request("late", 1500, 3, ignore_eos=True))
    simulation.run()
    with_prompts = [header.lengths for header in simulation.headers if max(header.lengths) > 1]
    assert with_prompts == [(400, 400, 400, 400), (1, 1, 1, 1, 1500)]


def test_with_a_streamed_stage_requests_that_come_together_share_the_first_pass_and_later_ones_the_next() -> None:
    simulation = simulate(linear(2.0, 0.0001), is_streamed=True, max_step_tokens=2048)
    for index, at in enumerate([0.0, 0.02, GATHER_SECONDS - 0.001, GATHER_SECONDS + 0.001]):
        simulation.arrive(at, make_request(str(index), 10, 2, ignore_eos=True))
    simulation.run()
    assert [header.lengths for header in simulation.headers] == [(10, 10, 10), (1, 1, 1, 10), (1,)]
    assert simulation.timings[0][0].received_ns == GATHER_SECONDS * 1e9


def test_a_request_that_goes_while_others_are_waited_for_leaves_nothing_behind() -> None:
    simulation = simulate(linear(2.0, 0.0001), is_streamed=True)
    simulation.arrive(0.0, make_request("a", 10, 2, ignore_eos=True))
    simulation.post(0.01, RequestAborted(RequestId("a")))
    simulation.arrive(9.0, make_request("b", 10, 1, ignore_eos=True), make_request("c", 10, 1, ignore_eos=True))
    simulation.run()
    assert [header.lengths for header in simulation.headers] == [(10, 10)]
