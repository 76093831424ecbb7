"""The scheduler as transcripts: events, the instructions they lead to, the state they leave."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import (
    InvalidRequestError,
    InvariantError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    SpanwiseError,
    StageTimeoutError,
    StageUnavailableError,
)
from cluster.microbatch import (
    Epoch,
    PageDelta,
    PromptLogprobs,
    SequenceSampling,
    StageTiming,
    StepFailure,
    StepHeader,
    StepId,
)
from cluster.request import FinishReason, RequestId, SequenceId, TokenizedRequest, TokenLogprobs
from coordinator.events import (
    DrainRequested,
    EmitPromptLogprobs,
    EmitTokens,
    EpochLost,
    EpochOpened,
    FailRequest,
    FinishRequest,
    OpenEpoch,
    Phase,
    RejectRequest,
    ReportProgress,
    RequestAborted,
    RequestArrived,
    RequestProgress,
    RunStep,
    StageSeconds,
    StepCompleted,
    StepFailed,
    StopStringMatched,
)
from coordinator.scheduler import Scheduler
from tests.coordinator.requests import EOS, make_limits, make_request
from tests.coordinator.simulator import completed
from tests.coordinator.transcripts import EPOCH, LOST, arrive, complete, headers_of, only, opened

# --- the life of a request -------------------------------------------------------------------------------------------


def test_a_request_from_arrival_to_end() -> None:
    scheduler = opened(page_size=4)
    request = make_request("a", (11, 12, 13), max_tokens=2)

    first = StepHeader(
        epoch=EPOCH,
        step_id=StepId(1),
        deadline_ms=600_000,
        sequence_ids=(SequenceId(1),),
        start_positions=(0,),
        lengths=(3,),
        token_ids=(11, 12, 13),
        logits_rows=(1,),
        is_sampled=(True,),
        page_deltas=(PageDelta(SequenceId(1), 0, (0,)),),
        sampling_changes=(SequenceSampling(SequenceId(1), 3, request.sampling),),
    )
    assert scheduler.handle(RequestArrived(request), 10.0) == [
        RunStep(first),
        ReportProgress(RequestId("a"), RequestProgress(Phase.PREFILL, 0, 0, 3)),
    ]

    second = replace(
        first,
        step_id=StepId(2),
        start_positions=(3,),
        lengths=(1,),
        token_ids=(41,),
        page_deltas=(),
        sampling_changes=(),
    )
    assert scheduler.handle(StepCompleted(completed(first, 41)), 12.0) == [
        RunStep(second),
        ReportProgress(RequestId("a"), RequestProgress(Phase.DECODE, 0, 3, 3)),
        EmitTokens(RequestId("a"), SequenceId(1), 0, (41,), ()),
    ]

    emit, finish = scheduler.handle(StepCompleted(completed(second, 42)), 13.0)
    assert emit == EmitTokens(RequestId("a"), SequenceId(1), 0, (42,), (), FinishReason.LENGTH)
    assert isinstance(finish, FinishRequest)
    report = finish.report
    assert (report.num_prompt_tokens, report.num_completion_tokens) == (3, 2)
    assert (report.queue_seconds, report.prefill_seconds, report.decode_seconds) == (0.0, 2.0, 1.0)
    assert scheduler.is_idle
    assert scheduler.counters().num_free_pages == scheduler.counters().num_pages
    scheduler.check_invariants()


def test_the_end_of_a_sequence_travels_with_the_next_step_before_its_slices() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request("a", max_tokens=1)))
    assert headers_of(complete(scheduler, header)) == []
    (header,) = headers_of(arrive(scheduler, make_request("b", max_tokens=2)))
    assert header.finished_sequence_ids == (1,)
    (header,) = headers_of(complete(scheduler, header))
    assert header.finished_sequence_ids == ()


def test_the_last_token_needs_no_page() -> None:
    scheduler = opened(page_size=4, num_pages=2)
    (header,) = headers_of(arrive(scheduler, make_request(prompt=5, max_tokens=4)))
    assert header.page_deltas == (PageDelta(SequenceId(1), 0, (0, 1)),)
    (rejected,) = arrive(scheduler, make_request("b", prompt=5, max_tokens=5))
    assert isinstance(rejected, RejectRequest)
    assert "9 tokens need 3 pages of 4" in str(rejected.error)


def test_steps_are_numbered_without_gaps_and_carry_the_last_stage_and_deadline() -> None:
    scheduler = opened(num_stages=3, step_timeout=1.5)
    headers = headers_of(arrive(scheduler, make_request("a"))) + headers_of(arrive(scheduler, make_request("b")))
    assert [header.step_id for header in headers] == [1, 2]
    assert {(header.last_stage, header.deadline_ms) for header in headers} == {(2, 1500)}


def test_a_report_adds_up_the_seconds_of_every_stage() -> None:
    scheduler = opened(num_stages=2)
    (header,) = headers_of(arrive(scheduler, make_request(max_tokens=2)))
    timings = (StageTiming(0, 0, 10**9, 3 * 10**9), StageTiming(1, 0, 0, 5 * 10**9))
    instructions = scheduler.handle(StepCompleted(completed(header, timings=timings)), 9.0)
    (header,) = headers_of(instructions)
    instructions = scheduler.handle(StepCompleted(completed(header, timings=timings)), 18.0)
    (finish,) = only(instructions, FinishRequest)
    assert finish.report.stages == (StageSeconds(4.0, 2.0), StageSeconds(10.0, 0.0))


# --- stop rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "token_id"),
    [(make_request(max_tokens=9), EOS), (make_request(max_tokens=9, stop_token_ids=frozenset({33})), 33)],
)
def test_a_stop_token_is_emitted_and_ends_the_sequence(request_: TokenizedRequest, token_id: int) -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, request_))
    instructions = complete(scheduler, header, token_id)
    (emit,) = only(instructions, EmitTokens)
    assert (emit.token_ids, emit.finish_reason) == ((token_id,), FinishReason.STOP)
    assert headers_of(instructions) == []
    assert scheduler.is_idle


def test_an_ignored_eos_ends_nothing() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request(max_tokens=2, ignore_eos=True)))
    (emit,) = only(complete(scheduler, header, EOS), EmitTokens)
    assert emit.finish_reason is None


def test_a_stop_token_as_last_token_is_a_stop() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request(max_tokens=1)))
    (emit,) = only(complete(scheduler, header, EOS), EmitTokens)
    assert emit.finish_reason is FinishReason.STOP


def test_a_stop_string_ends_the_sequence_and_its_token_in_flight_is_ignored() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request(max_tokens=9)))
    (header,) = headers_of(complete(scheduler, header))
    emit, finish = scheduler.handle(StopStringMatched(SequenceId(1)), 1.0)
    assert emit == EmitTokens(RequestId("a"), SequenceId(1), 0, (), (), FinishReason.STOP)
    assert isinstance(finish, FinishRequest)
    assert scheduler.counters().num_free_pages == scheduler.counters().num_pages
    assert complete(scheduler, header) == []
    assert scheduler.handle(StopStringMatched(SequenceId(1)), 2.0) == []


def test_a_stop_string_in_a_sequence_that_never_existed_is_a_bug() -> None:
    with pytest.raises(InvariantError, match="sequence 5, which never existed"):
        opened().handle(StopStringMatched(SequenceId(5)), 0.0)


# --- admission -------------------------------------------------------------------------------------------------------


def rejection(scheduler: Scheduler, request: TokenizedRequest) -> SpanwiseError:
    (instruction,) = arrive(scheduler, request)
    assert isinstance(instruction, RejectRequest)
    scheduler.check_invariants()
    return instruction.error


def test_a_full_queue_rejects_and_what_was_accepted_is_served() -> None:
    scheduler = opened(max_running=1, max_waiting=1)
    (header,) = headers_of(arrive(scheduler, make_request("a", max_tokens=1)))
    assert arrive(scheduler, make_request("b", max_tokens=1)) == [
        ReportProgress(RequestId("b"), RequestProgress(Phase.QUEUED, 0, 0, 3))
    ]
    error = rejection(scheduler, make_request("c"))
    assert isinstance(error, OverloadedError)
    assert error.reason == "QUEUE_FULL"
    (header,) = headers_of(complete(scheduler, header))
    assert header.sequence_ids == (2,)


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    scheduler = opened(page_size=4, num_pages=4)
    (header,) = headers_of(arrive(scheduler, make_request("a", 4, max_tokens=1)))
    arrive(scheduler, make_request("b", 15, max_tokens=1))
    arrive(scheduler, make_request("c", 1, max_tokens=1))
    assert scheduler.counters().num_waiting == 2
    assert scheduler.progress_of(RequestId("c")).queue_position == 1
    headers = headers_of(complete(scheduler, header))
    assert [header.sequence_ids for header in headers] == [(2,)]


def test_completions_are_admitted_together_or_not_at_all() -> None:
    scheduler = opened(max_running=3)
    arrive(scheduler, make_request("a", max_tokens=9))
    arrive(scheduler, make_request("b", num_completions=3, max_tokens=9))
    assert scheduler.counters().num_running == 1
    scheduler.handle(RequestAborted(RequestId("a")), 0.0)
    assert scheduler.counters().num_running == 3
    scheduler.check_invariants()


def test_completions_have_seeds_of_their_own_and_end_one_by_one() -> None:
    scheduler = opened()
    request = make_request(max_tokens=2, num_completions=2, seed=2**64 - 1, num_prompt_logprobs=None)
    (header,) = headers_of(arrive(scheduler, request))
    assert [change.params.seed for change in header.sampling_changes] == [2**64 - 1, 0]
    assert header.token_ids == request.prompt_token_ids * 2
    result = replace(completed(header), token_ids=(EOS, 7))
    instructions = scheduler.handle(StepCompleted(result), 0.0)
    assert [emit.finish_reason for emit in only(instructions, EmitTokens)] == [FinishReason.STOP, None]
    assert only(instructions, FinishRequest) == []
    (header,) = headers_of(instructions)
    (finish,) = only(complete(scheduler, header), FinishRequest)
    assert finish.report.num_completion_tokens == 3


def test_a_request_id_in_use_is_refused_and_its_owner_not_disturbed() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request("a", max_tokens=1)))
    assert isinstance(rejection(scheduler, make_request("a")), InvalidRequestError)
    assert len(only(complete(scheduler, header), FinishRequest)) == 1
    assert headers_of(arrive(scheduler, make_request("a")))


def test_a_draining_scheduler_finishes_what_it_has_and_takes_nothing_new() -> None:
    scheduler = opened(max_running=1)
    (header,) = headers_of(arrive(scheduler, make_request("a", max_tokens=1)))
    arrive(scheduler, make_request("b", max_tokens=1))
    assert scheduler.handle(DrainRequested(), 0.0) == []
    error = rejection(scheduler, make_request("c"))
    assert isinstance(error, NotReadyError)
    assert error.reason == "DRAINING"
    (header,) = headers_of(complete(scheduler, header))
    complete(scheduler, header)
    assert scheduler.is_idle


# --- aborts ----------------------------------------------------------------------------------------------------------


def test_an_abort_while_waiting_leaves_nothing() -> None:
    scheduler = opened(max_running=1)
    arrive(scheduler, make_request("a", max_tokens=9))
    arrive(scheduler, make_request("b"))
    emit, finish = scheduler.handle(RequestAborted(RequestId("b")), 3.0)
    assert isinstance(emit, EmitTokens)
    assert emit.finish_reason is FinishReason.ABORTED
    assert isinstance(finish, FinishRequest)
    assert (finish.report.queue_seconds, finish.report.decode_seconds) == (3.0, 0.0)
    assert scheduler.counters().num_waiting == 0
    scheduler.check_invariants()


def test_an_aborted_prompt_frees_its_pages_at_once_and_its_chunks_in_flight_are_ignored() -> None:
    scheduler = opened(num_stages=2, max_step_tokens=8)
    headers = headers_of(arrive(scheduler, make_request("a", prompt=20)))
    assert [header.lengths for header in headers] == [(8,), (8,)]
    scheduler.handle(RequestAborted(RequestId("a")), 0.0)
    assert scheduler.counters().num_free_pages == scheduler.counters().num_pages
    assert [complete(scheduler, header) for header in headers] == [[], []]
    (header,) = headers_of(arrive(scheduler, make_request("b")))
    assert header.finished_sequence_ids == (1,)


def test_stages_are_not_told_of_a_sequence_that_they_never_saw() -> None:
    scheduler = opened(max_step_tokens=4)
    (header,) = headers_of(arrive(scheduler, make_request("a", 4, max_tokens=1)))
    arrive(scheduler, make_request("b", 4))
    scheduler.handle(RequestAborted(RequestId("b")), 0.0)
    complete(scheduler, header)
    (header,) = headers_of(arrive(scheduler, make_request("c")))
    assert header.finished_sequence_ids == (1,)


def test_an_abort_of_nothing_does_nothing() -> None:
    assert opened().handle(RequestAborted(RequestId("a")), 0.0) == []


# --- log probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_pass_through_when_asked_for() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request(num_logprobs=0)))
    logprob = TokenLogprobs(7, -0.5)
    result = replace(completed(header), logprobs=(logprob,))
    (emit,) = only(scheduler.handle(StepCompleted(result), 0.0), EmitTokens)
    assert emit.logprobs == (logprob,)


def test_prompt_logprobs_are_collected_over_chunks_and_come_once_before_the_first_token() -> None:
    scheduler = opened(num_stages=2, max_step_tokens=8, page_size=2)
    request = make_request(prompt=10, num_prompt_logprobs=2, num_completions=2)
    headers = headers_of(arrive(scheduler, request))
    assert [header.lengths for header in headers] == [(8,), (2, 6)]
    assert [header.logits_rows for header in headers] == [(8,), (2, 0)]
    assert headers[1].sampling_changes[0].params.num_prompt_logprobs is None

    tokens = tuple(TokenLogprobs(token_id, None) for token_id in request.prompt_token_ids)
    chunks = [PromptLogprobs(SequenceId(1), 0, tokens[:8]), PromptLogprobs(SequenceId(1), 8, tokens[8:])]
    first = replace(completed(headers[0]), prompt_logprobs=(chunks[0],))
    assert only(scheduler.handle(StepCompleted(first), 0.0), EmitPromptLogprobs) == []
    second = replace(completed(headers[1]), prompt_logprobs=(chunks[1],))
    instructions = scheduler.handle(StepCompleted(second), 0.0)
    shown = [item for item in instructions if isinstance(item, EmitPromptLogprobs | EmitTokens)]
    assert shown[0] == EmitPromptLogprobs(RequestId("a"), tokens)
    assert isinstance(shown[1], EmitTokens)


def test_a_gap_in_the_prompt_logprobs_is_a_bug() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request(num_prompt_logprobs=0)))
    gap = PromptLogprobs(SequenceId(1), 1, (TokenLogprobs(12, -1.0),))
    with pytest.raises(InvariantError, match="from position 1 follow 0 others"):
        scheduler.handle(StepCompleted(replace(completed(header), prompt_logprobs=(gap,))), 0.0)


def test_missing_prompt_logprobs_are_a_bug() -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request(num_prompt_logprobs=0)))
    with pytest.raises(InvariantError, match="of its 3 prompt tokens; those of 0 came"):
        scheduler.handle(StepCompleted(completed(header)), 0.0)


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_nothing_runs_before_an_epoch_is_open() -> None:
    scheduler = Scheduler(make_limits())
    assert headers_of(arrive(scheduler, make_request())) == []
    assert scheduler.counters().num_waiting == 1
    assert len(headers_of(scheduler.handle(EpochOpened(EPOCH, 1), 1.0))) == 1


def test_a_lost_epoch_fails_what_the_stages_knew_and_keeps_the_queue() -> None:
    scheduler = opened(num_stages=2, max_running=2)
    headers = [headers_of(arrive(scheduler, make_request(name)))[0] for name in ("a", "b")]
    arrive(scheduler, make_request("c"))
    assert scheduler.handle(EpochLost(EPOCH, LOST), 1.0) == [
        FailRequest(RequestId("a"), LOST),
        FailRequest(RequestId("b"), LOST),
        OpenEpoch(EPOCH, LOST),
    ]
    scheduler.check_invariants()
    assert scheduler.handle(EpochLost(EPOCH, LOST), 1.0) == []
    assert complete(scheduler, headers[0]) == []
    assert scheduler.counters().num_steps_in_flight == 0

    instructions = scheduler.handle(EpochOpened(Epoch(1, 2), 2), 2.0)
    (header,) = headers_of(instructions)
    assert (header.epoch, header.step_id, header.sequence_ids) == (Epoch(1, 2), 1, (3,))
    assert header.finished_sequence_ids == ()
    assert complete(scheduler, headers[0]) == []
    assert scheduler.handle(EpochLost(EPOCH, LOST), 3.0) == []


def test_a_running_request_that_no_stage_has_seen_survives_a_lost_epoch() -> None:
    scheduler = opened(max_step_tokens=4)
    arrive(scheduler, make_request("a", 4))
    arrive(scheduler, make_request("b", 4))
    assert scheduler.counters().num_running == 2
    instructions = scheduler.handle(EpochLost(EPOCH, LOST), 1.0)
    assert [failed.request_id for failed in only(instructions, FailRequest)] == ["a"]
    (header,) = headers_of(scheduler.handle(EpochOpened(Epoch(2, 1), 1), 2.0))
    assert header.sequence_ids == (2,)
    assert len(header.page_deltas) == 1


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("StageUnavailableError", StageUnavailableError),
        ("StageTimeoutError", StageTimeoutError),
        ("RuntimeError", InvariantError),
        ("annotations", InvariantError),
    ],
)
def test_a_failed_step_costs_its_epoch_and_says_where(reason: str, kind: type[SpanwiseError]) -> None:
    scheduler = opened()
    (header,) = headers_of(arrive(scheduler, make_request()))
    failure = StepFailure(EPOCH, header.step_id, 1, reason, "out of luck")
    failed, reopen = scheduler.handle(StepFailed(failure), 1.0)
    assert isinstance(failed, FailRequest)
    assert type(failed.error) is kind
    assert "step 1 failed at stage 1: out of luck" in str(failed.error)
    assert isinstance(reopen, OpenEpoch)


def test_an_epoch_must_be_higher_and_the_one_before_lost() -> None:
    scheduler = opened()
    with pytest.raises(InvariantError, match=r"epoch 1\.2 opened after 1\.1"):
        scheduler.handle(EpochOpened(Epoch(1, 2), 1), 0.0)
    scheduler = opened()
    scheduler.handle(EpochLost(EPOCH, LOST), 0.0)
    with pytest.raises(InvariantError, match=r"epoch 1\.1 opened after 1\.1"):
        scheduler.handle(EpochOpened(EPOCH, 1), 0.0)


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_counts_prompt_tokens_and_names_the_step_that_carries_the_request() -> None:
    scheduler = opened(num_stages=2, max_step_tokens=4)
    first, second = headers_of(arrive(scheduler, make_request("a", 10)))
    assert scheduler.progress_of(RequestId("a")) == RequestProgress(Phase.PREFILL, 0, 0, 10, first.step_id)
    complete(scheduler, first)
    assert scheduler.progress_of(RequestId("a")) == RequestProgress(Phase.PREFILL, 0, 4, 10, second.step_id)


def test_progress_of_an_ended_request_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="no live request 'a'"):
        opened().progress_of(RequestId("a"))
