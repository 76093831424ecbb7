"""What cannot happen is noticed and told with its story; what can happen, in any order, keeps the books straight."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import (
    InvariantError,
)
from cluster.microbatch import (
    Epoch,
    StepHeader,
)
from cluster.request import RequestId, SequenceId
from coordinator.events import (
    EpochLost,
    EpochOpened,
    FailRequest,
    FinishRequest,
    GatheringEnded,
    GatherRequests,
    Instruction,
    RejectRequest,
    RequestAborted,
    StepCompleted,
    StopStringMatched,
)
from coordinator.sequences import SequenceState
from tests.coordinator.requests import make_request
from tests.coordinator.simulator import completed
from tests.coordinator.transcripts import EPOCH, LOST, arrive, complete, headers_of, only, opened

# --- what cannot happen ----------------------------------------------------------------------------------------------


def test_results_out_of_order_are_a_bug() -> None:
    scheduler = opened(num_stages=2)
    arrive(scheduler, make_request("a"))
    (header,) = headers_of(arrive(scheduler, make_request("b")))
    with pytest.raises(InvariantError, match="result of step 2 while the oldest in flight is 1"):
        scheduler.handle(StepCompleted(completed(header)), 0.0)


def test_a_result_without_a_step_is_a_bug_that_tells_what_happened_before() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request(max_tokens=1), now=4.0))
    complete(scheduler, header)
    with pytest.raises(InvariantError, match="oldest in flight is none") as caught:
        scheduler.handle(StepCompleted(completed(header)), 0.0)
    assert "4.000000 step 1 sent: 1 slices" in str(caught.value)


def test_a_result_for_other_sequences_is_a_bug() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request()))
    wrong = replace(completed(header), sequence_ids=(SequenceId(9),))
    with pytest.raises(InvariantError, match="was to sample"):
        scheduler.handle(StepCompleted(wrong), 0.0)


def test_a_report_from_an_epoch_that_never_was_is_a_bug() -> None:
    with pytest.raises(InvariantError, match=r"the latest one opened is 1\.1"):
        opened().handle(EpochLost(Epoch(9, 9), LOST), 0.0)


def test_an_illegal_transition_is_refused_with_the_sequences_story() -> None:
    scheduler = opened()
    arrive(scheduler, make_request(max_tokens=9), now=2.0)
    (sequence,) = scheduler._running.all.values()
    with pytest.raises(InvariantError, match="RUNNING → WAITING is no legal transition") as caught:
        scheduler._move(sequence, SequenceState.WAITING, 3.0)
    assert "2.000000 sequence 1: WAITING → RUNNING" in str(caught.value)


def test_the_check_finds_records_that_disagree() -> None:
    scheduler = opened()
    arrive(scheduler, make_request(max_tokens=9))
    scheduler._running.ready[SequenceId(1)] = scheduler._running.all[SequenceId(1)]
    with pytest.raises(InvariantError, match="prefilling, ready or in flight"):
        scheduler.check_invariants()


# --- any transcript --------------------------------------------------------------------------------------------------

ACTIONS = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 30), st.integers(1, 12), st.integers(1, 3)),
    st.tuples(st.just("complete"), st.integers(0, 3), st.just(0), st.just(0)),
    st.tuples(st.just("abort"), st.integers(0, 20), st.just(0), st.just(0)),
    st.tuples(st.just("stop"), st.integers(0, 20), st.just(0), st.just(0)),
    st.tuples(st.just("gathered"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("lose"), st.just(0), st.just(0), st.just(0)),
)


class RandomTranscript:
    """Plays random events and checks what must hold of any instructions."""

    def __init__(self, num_stages: int, *, is_streamed: bool) -> None:
        self.num_stages = num_stages
        self.scheduler = opened(
            num_stages, num_pages=24, max_running=6, max_waiting=5, max_step_tokens=8, is_streamed=is_streamed
        )
        self.num_gatherings = 0  # under way
        self.in_flight: list[StepHeader] = []
        self.live: set[str] = set()
        self.num_requests = self.num_sequences = 0
        self.epoch = EPOCH

    def play(self, action: str, *numbers: int) -> None:
        getattr(self, action)(*numbers)
        self.scheduler.check_invariants()

    def arrive(self, prompt: int, max_tokens: int, num_completions: int) -> None:
        name = str(self.num_requests)
        self.num_requests += 1
        instructions = arrive(self.scheduler, make_request(name, prompt, max_tokens, num_completions=num_completions))
        if not only(instructions, RejectRequest):
            self.live.add(name)
            self.num_sequences += num_completions
        self.perform(instructions)

    def complete(self, token_id: int, *_: int) -> None:
        if self.in_flight:
            header = self.in_flight.pop(0)
            self.perform(self.scheduler.handle(StepCompleted(completed(header, token_id)), 0.0))

    def abort(self, number: int, *_: int) -> None:
        self.perform(self.scheduler.handle(RequestAborted(RequestId(str(number))), 0.0))

    def stop(self, number: int, *_: int) -> None:
        if 0 < number <= self.num_sequences:
            self.perform(self.scheduler.handle(StopStringMatched(SequenceId(number)), 0.0))

    def gathered(self, *_: int) -> None:
        if self.num_gatherings:
            self.num_gatherings -= 1
            self.perform(self.scheduler.handle(GatheringEnded(), 0.0))

    def lose(self, *_: int) -> None:
        self.in_flight.clear()
        self.perform(self.scheduler.handle(EpochLost(self.epoch, LOST), 0.0))
        self.epoch = Epoch(1, self.epoch.number + 1)
        self.perform(self.scheduler.handle(EpochOpened(self.epoch, self.num_stages), 0.0))

    def perform(self, instructions: list[Instruction]) -> None:
        for header in headers_of(instructions):
            assert 0 < header.num_tokens <= 8
            assert header.num_tokens == sum(header.lengths)
            assert len(set(header.sequence_ids)) == len(header.sequence_ids)
            self.in_flight.append(header)
        self.num_gatherings += len(only(instructions, GatherRequests))
        for ended in [*only(instructions, FinishRequest), *only(instructions, FailRequest)]:
            self.live.remove(ended.request_id)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.booleans(), st.lists(ACTIONS, max_size=60))
def test_any_transcript_keeps_the_invariants_and_ends_every_request_once(
    num_stages: int, is_streamed: bool, actions: list[tuple[str, int, int, int]]
) -> None:
    transcript = RandomTranscript(num_stages, is_streamed=is_streamed)
    for action in actions:
        transcript.play(*action)
    while transcript.in_flight or transcript.num_gatherings:
        transcript.play("gathered")
        transcript.play("complete", 7)
    assert transcript.live == set()
    assert transcript.scheduler.is_idle
    assert transcript.scheduler.counters().num_free_pages == 24
