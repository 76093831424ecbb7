"""Steps and what becomes of them: domain values to protobuf and back.

Columns are copied whole: nothing here runs once per slice but for the few slices whose pages or sampling change.
"""

from __future__ import annotations

from cluster.microbatch import (
    Epoch,
    PageDelta,
    PromptLogprobs,
    SequenceSampling,
    StageTiming,
    StepFailure,
    StepHeader,
    StepId,
    StepProgress,
    StepResult,
)
from cluster.request import SequenceId, TokenLogprobs
from cluster.rpc.v1 import generation_pb2
from cluster.rpc.v1 import stage_pb2 as pb
from cluster.wire.generation import (
    logprob_options_to_proto,
    logprobs_from_proto,
    logprobs_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)


def epoch_to_proto(epoch: Epoch) -> pb.Epoch:
    return pb.Epoch(generation=epoch.generation, number=epoch.number)


def epoch_from_proto(message: pb.Epoch) -> Epoch:
    return Epoch(message.generation, message.number)


def header_to_proto(header: StepHeader) -> pb.StepHeader:
    return pb.StepHeader(
        epoch=epoch_to_proto(header.epoch),
        step_id=header.step_id,
        deadline_ms=header.deadline_ms,
        sequence_ids=header.sequence_ids,
        start_positions=header.start_positions,
        lengths=header.lengths,
        token_ids=header.token_ids,
        logits_rows=header.logits_rows,
        is_sampled=header.is_sampled,
        page_deltas=[_page_delta_to_proto(delta) for delta in header.page_deltas],
        sampling_changes=[_sampling_change_to_proto(change) for change in header.sampling_changes],
        finished_sequence_ids=header.finished_sequence_ids,
        last_stage=header.last_stage,
        timings=[timing_to_proto(timing) for timing in header.timings],
    )


def header_from_proto(message: pb.StepHeader) -> StepHeader:
    return StepHeader(
        epoch=epoch_from_proto(message.epoch),
        step_id=StepId(message.step_id),
        deadline_ms=message.deadline_ms,
        sequence_ids=tuple(message.sequence_ids),  # type: ignore[arg-type]  # ids are NewTypes of int
        start_positions=tuple(message.start_positions),
        lengths=tuple(message.lengths),
        token_ids=tuple(message.token_ids),
        logits_rows=tuple(message.logits_rows),
        is_sampled=tuple(message.is_sampled),
        page_deltas=tuple(_page_delta_from_proto(delta) for delta in message.page_deltas),
        sampling_changes=tuple(_sampling_change_from_proto(change) for change in message.sampling_changes),
        finished_sequence_ids=tuple(message.finished_sequence_ids),  # type: ignore[arg-type]
        last_stage=message.last_stage,
        timings=tuple(timing_from_proto(timing) for timing in message.timings),
    )


def _page_delta_to_proto(delta: PageDelta) -> pb.PageDelta:
    return pb.PageDelta(
        sequence_id=delta.sequence_id,
        first_page=delta.first_page,
        page_ids=delta.page_ids,
        cache_group=delta.cache_group,
    )


def _page_delta_from_proto(message: pb.PageDelta) -> PageDelta:
    return PageDelta(SequenceId(message.sequence_id), message.first_page, tuple(message.page_ids), message.cache_group)


def _sampling_change_to_proto(change: SequenceSampling) -> pb.SequenceSampling:
    return pb.SequenceSampling(
        sequence_id=change.sequence_id,
        prompt_length=change.prompt_length,
        params=sampling_to_proto(change.params),
        logprobs=logprob_options_to_proto(change.params),
    )


def _sampling_change_from_proto(message: pb.SequenceSampling) -> SequenceSampling:
    params = sampling_from_proto(message.params, message.logprobs)
    return SequenceSampling(SequenceId(message.sequence_id), message.prompt_length, params)


def timing_to_proto(timing: StageTiming) -> pb.StageTiming:
    return pb.StageTiming(
        stage=timing.stage,
        received_ns=timing.received_ns,
        started_ns=timing.started_ns,
        finished_ns=timing.finished_ns,
        received_bytes=timing.received_bytes,
        read_bytes=timing.read_bytes,
        stall_ns=timing.stall_ns,
        resident_bytes=timing.resident_bytes,
    )


def timing_from_proto(message: pb.StageTiming) -> StageTiming:
    return StageTiming(
        stage=message.stage,
        received_ns=message.received_ns,
        started_ns=message.started_ns,
        finished_ns=message.finished_ns,
        received_bytes=message.received_bytes,
        read_bytes=message.read_bytes,
        stall_ns=message.stall_ns,
        resident_bytes=message.resident_bytes,
    )


def result_to_proto(result: StepResult) -> pb.StepResult:
    """Return the message; its `logprobs` are left out when no slice asked for any."""
    has_logprobs = any(entry is not None for entry in result.logprobs)
    return pb.StepResult(
        epoch=epoch_to_proto(result.epoch),
        step_id=result.step_id,
        sequence_ids=result.sequence_ids,
        token_ids=result.token_ids,
        logprobs=[_optional_logprobs_to_proto(entry) for entry in result.logprobs] if has_logprobs else (),
        prompt_logprobs=[_prompt_logprobs_to_proto(entry) for entry in result.prompt_logprobs],
        timings=[timing_to_proto(timing) for timing in result.timings],
    )


def result_from_proto(message: pb.StepResult) -> StepResult:
    logprobs: tuple[TokenLogprobs | None, ...] = (None,) * len(message.token_ids)
    if message.logprobs:
        logprobs = tuple(logprobs_from_proto(e) if e.HasField("logprob") else None for e in message.logprobs)
    return StepResult(
        epoch=epoch_from_proto(message.epoch),
        step_id=StepId(message.step_id),
        sequence_ids=tuple(message.sequence_ids),  # type: ignore[arg-type]
        token_ids=tuple(message.token_ids),
        logprobs=logprobs,
        prompt_logprobs=tuple(_prompt_logprobs_from_proto(entry) for entry in message.prompt_logprobs),
        timings=tuple(timing_from_proto(timing) for timing in message.timings),
    )


def _optional_logprobs_to_proto(entry: TokenLogprobs | None) -> generation_pb2.TokenLogprobs:
    return logprobs_to_proto(entry or TokenLogprobs(0, None))


def _prompt_logprobs_to_proto(entry: PromptLogprobs) -> pb.PromptLogprobs:
    return pb.PromptLogprobs(
        sequence_id=entry.sequence_id,
        start_position=entry.start_position,
        tokens=[logprobs_to_proto(token) for token in entry.tokens],
    )


def _prompt_logprobs_from_proto(message: pb.PromptLogprobs) -> PromptLogprobs:
    tokens = tuple(logprobs_from_proto(token) for token in message.tokens)
    return PromptLogprobs(SequenceId(message.sequence_id), message.start_position, tokens)


def failure_to_proto(failure: StepFailure) -> pb.StepFailure:
    return pb.StepFailure(
        epoch=epoch_to_proto(failure.epoch),
        step_id=failure.step_id,
        stage=failure.stage,
        reason=failure.reason,
        message=failure.message,
        is_stage_lost=failure.is_stage_lost,
    )


def failure_from_proto(message: pb.StepFailure) -> StepFailure:
    return StepFailure(
        epoch_from_proto(message.epoch),
        StepId(message.step_id),
        message.stage,
        message.reason,
        message.message,
        message.is_stage_lost,
    )


def progress_to_proto(progress: StepProgress) -> pb.StepProgress:
    return pb.StepProgress(
        epoch=epoch_to_proto(progress.epoch),
        step_id=progress.step_id,
        stage=progress.stage,
        num_blocks_done=progress.blocks_done,
        num_blocks=progress.num_blocks,
    )


def progress_from_proto(message: pb.StepProgress) -> StepProgress:
    return StepProgress(
        epoch_from_proto(message.epoch),
        StepId(message.step_id),
        message.stage,
        message.num_blocks_done,
        message.num_blocks,
    )
