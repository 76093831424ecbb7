"""The shell around the scheduler: performs its instructions, feeds it what happens. Decides nothing.

Covers requests' streams, steps, deadlines and repair. All methods run on the coordinator's event loop; bringing the
pipeline up is `coordinator.bring_up`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import singledispatchmethod

from cluster import errors
from cluster.clock import Clock
from cluster.errors import NotFoundError, SpanwiseError, StageTimeoutError, StageUnavailableError
from cluster.microbatch import StepFailure, StepProgress, StepResult
from cluster.request import RequestId, SequenceId, TokenizedRequest
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.wire.status import as_spanwise_error
from coordinator import events
from coordinator.board import StatusBoard
from coordinator.events import Event, Instruction
from coordinator.flight import FlightLog
from coordinator.pipeline import Pipeline, StageLost
from coordinator.scheduler import Scheduler
from coordinator.streams import RequestStream
from coordinator.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_PHASES = {
    events.Phase.QUEUED: generation.Progress.PHASE_QUEUED,
    events.Phase.PREFILL: generation.Progress.PHASE_PREFILL,
    events.Phase.DECODE: generation.Progress.PHASE_DECODE,
}


class Engine:
    """One model's requests, from submission to their last message."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        pipeline: Pipeline,
        tokenizer: Tokenizer,
        board: StatusBoard,
        clock: Clock,
        flight: FlightLog,
        on_failed: Callable[[str, int | None], None],
    ) -> None:
        self.board = board
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        self._clock = clock
        self._on_failed = on_failed
        self._streams: dict[RequestId, RequestStream] = {}
        self._pending: deque[Event] = deque()
        self._is_handling = False
        self._is_broken = False
        self._flight = flight
        self._repair: asyncio.Task[None] | None = None
        self._gathering: asyncio.TimerHandle | None = None

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: TokenizedRequest) -> RequestStream:
        """Admit a request; its messages come from the returned stream. Raises what the scheduler's
        limits raise."""
        if request.request_id in self._streams:
            raise errors.InvalidRequestError(
                f"request_id {request.request_id!r} is that of a live request; make a new one"
            )
        stream = RequestStream(request, self._tokenizer)
        stream.accept()
        self._streams[request.request_id] = stream
        self.post(events.RequestArrived(request))
        if stream.rejection is not None:
            raise stream.rejection
        return stream

    def abort(self, request_id: RequestId) -> None:
        """End a request at its client's wish. Raises NotFoundError when there is none."""
        if request_id not in self._streams:
            raise NotFoundError(f"there is no live request {request_id!r}")
        self.post(events.RequestAborted(request_id))

    def abandon(self, stream: RequestStream) -> None:
        """Forget a stream whose client is done with it, aborting the request if it still runs."""
        request_id = stream.request.request_id
        if self._streams.get(request_id) is stream:
            self.post(events.RequestAborted(request_id))
            self._streams.pop(request_id, None)

    def progress_of(self, stream: RequestStream) -> generation.Progress:
        """Return where a live request stands."""
        progress = self._scheduler.progress_of(stream.request.request_id)
        return self._progress_message(progress)

    def describe(self) -> service.DescribeClusterResponse:
        """Return the board with the scheduler's counters."""
        description = self.board.describe()
        counters = self._scheduler.counters()
        description.num_running = counters.num_running
        description.num_waiting = counters.num_waiting
        description.num_free_pages = counters.num_free_pages
        description.num_steps_in_flight = counters.num_steps_in_flight
        description.max_waiting = self._scheduler.limits.max_waiting
        description.epoch = str(self._pipeline.epoch)
        return description

    # --- events ------------------------------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """Hand an event to the scheduler and perform what it asks for. Events raised meanwhile wait their turn.

        Never raises: after an error of ours nobody knows what the scheduler's state means, so the cluster has failed.
        """
        self._pending.append(event)
        if self._is_handling or self._is_broken:
            return
        self._is_handling = True
        try:
            while self._pending:
                for instruction in self._scheduler.handle(self._pending.popleft(), self._clock.now()):
                    self._perform(instruction)
        except Exception as error:  # the top of every event's way: whatever it was must be reported
            self._is_broken = True
            self._on_failed(f"the coordinator cannot go on: {as_spanwise_error(error)}", None)
        finally:
            self._is_handling = False

    def on_pipeline(self, event: StepResult | StepFailure | StepProgress | StageLost) -> None:
        """Take what the stages report."""
        if isinstance(event, StepResult):
            self._on_result(event)
        elif isinstance(event, StepProgress):
            self._flight.note_progress(event, self._clock.now())
        elif isinstance(event, StepFailure):
            logger.error("step %s failed at stage %s: %s", event.step_id, event.stage, event.message)
            self.post(events.StepFailed(event))
        else:
            logger.error("%s", event.message)
            self.post(events.EpochLost(event.epoch, StageUnavailableError(event.message)))

    def check_deadlines(self) -> None:
        """Give the epoch up when its oldest step is overdue. Called about once a second."""
        overdue = self._flight.overdue(self._clock.now())
        if overdue is None:
            return
        message = (
            f"step {overdue.step_id} made no progress in {self._flight.timeout_seconds:g} s; its fate is "
            "unknown, so its epoch is given up (--step-timeout raises the limit)"
        )
        logger.error(message)
        self._flight.clear()
        self.post(events.EpochLost(self._pipeline.epoch, StageTimeoutError(message)))

    def end_all(self, error: SpanwiseError) -> None:
        """End every live request with an error."""
        streams, self._streams = self._streams, {}  # first: a stream that knew of the abort would end as aborted
        for request_id, stream in streams.items():
            stream.fail(error)
            self.board.num_requests_failed += 1
            self.post(events.RequestAborted(request_id))

    async def close(self) -> None:
        """Wait for no more requests, and for a repair under way to end."""
        if self._gathering is not None:
            self._gathering.cancel()
        if self._repair is not None:
            self._repair.cancel()
            await asyncio.gather(self._repair, return_exceptions=True)

    # --- instructions ------------------------------------------------------------------------------------------------

    @singledispatchmethod
    def _perform(self, instruction: Instruction) -> None:
        raise errors.InvariantError(f"no way to perform {type(instruction).__name__}")

    @_perform.register
    def _(self, instruction: events.RunStep) -> None:
        self._flight.note_sent(instruction.header.step_id, self._clock.now())
        self._pipeline.send(instruction.header)
        self.board.count_tokens(prompt=_num_prompt_tokens(instruction), output=0)

    @_perform.register
    def _(self, instruction: events.GatherRequests) -> None:
        if self._gathering is not None:
            self._gathering.cancel()  # that of an epoch that was lost meanwhile
        loop = asyncio.get_running_loop()
        self._gathering = loop.call_later(instruction.seconds, self.post, events.GatheringEnded())

    @_perform.register
    def _(self, instruction: events.EmitTokens) -> None:
        stream = self._streams.get(instruction.request_id)
        if stream is None:
            return
        reason, num_tokens = instruction.finish_reason, len(instruction.token_ids)
        ends_with_stop_token = reason is not None and reason.value == "stop" and num_tokens > 0
        is_matched = stream.push(
            instruction.completion_index,
            instruction.token_ids,
            instruction.logprobs,
            num_rendered=num_tokens - ends_with_stop_token,
            reason=reason,
        )
        if is_matched and reason is None:
            self.post(events.StopStringMatched(SequenceId(instruction.sequence_id)))

    @_perform.register
    def _(self, instruction: events.EmitPromptLogprobs) -> None:
        if stream := self._streams.get(instruction.request_id):
            stream.echo(instruction.tokens)

    @_perform.register
    def _(self, instruction: events.ReportProgress) -> None:
        if stream := self._streams.get(instruction.request_id):
            stream.progress(self._progress_message(instruction.progress))

    @_perform.register
    def _(self, instruction: events.FinishRequest) -> None:
        if stream := self._streams.pop(instruction.request_id, None):
            self.board.num_requests_finished += 1
            stream.finish(self._finished_message(instruction.report))

    @_perform.register
    def _(self, instruction: events.FailRequest) -> None:
        self.board.num_requests_failed += 1
        if stream := self._streams.pop(instruction.request_id, None):
            stream.fail(instruction.error)

    @_perform.register
    def _(self, instruction: events.RejectRequest) -> None:
        if stream := self._streams.pop(instruction.request_id, None):
            stream.reject(instruction.error)

    @_perform.register
    def _(self, instruction: events.OpenEpoch) -> None:
        self._flight.clear()
        if self._repair is None or self._repair.done():
            self._repair = asyncio.get_running_loop().create_task(self._reopen(instruction.error))

    # --- repair ------------------------------------------------------------------------------------------------------

    async def _reopen(self, cause: SpanwiseError) -> None:
        """Open the next epoch on every stage; without all of them the cluster has failed."""
        logger.warning("opening a new epoch after: %s", cause)
        try:
            epoch = await self._pipeline.prove()
        except Exception as error:  # the top of a task: whatever it was must be reported
            message = f"{as_spanwise_error(error)} (first noticed as: {cause})"
            self._on_failed(message, self._pipeline.lost_stage)
            return
        self.board.start_epoch()
        self.post(events.EpochOpened(epoch, self._pipeline.num_stages))

    def _on_result(self, result: StepResult) -> None:
        if result.epoch == self._pipeline.epoch:
            self._flight.note_finished(result, self._clock.now())
            self.board.count_timings(result.timings)
            self.board.count_tokens(prompt=0, output=len(result.token_ids))
        self.post(events.StepCompleted(result))
        if self._scheduler.is_idle:
            self.board.rest()

    def _progress_message(self, progress: events.RequestProgress) -> generation.Progress:
        done, total = self._flight.blocks_done(progress.step_id)
        return generation.Progress(
            phase=_PHASES[progress.phase],
            queue_position=progress.queue_position,
            num_prompt_tokens_done=progress.num_prompt_tokens_done,
            num_prompt_tokens=progress.num_prompt_tokens,
            num_blocks_done=done,
            num_blocks=total,
        )

    def _finished_message(self, report: events.RequestReport) -> generation.Finished:
        return generation.Finished(
            num_prompt_tokens=report.num_prompt_tokens,
            num_completion_tokens=report.num_completion_tokens,
            queue_seconds=report.queue_seconds,
            prefill_seconds=report.prefill_seconds,
            decode_seconds=report.decode_seconds,
            stages=[
                generation.StageSeconds(
                    stage=stage, compute_seconds=entry.compute_seconds, queue_seconds=entry.queue_seconds
                )
                for stage, entry in enumerate(report.stages)
            ],
            fingerprint=self.board.fingerprint(),
        )


def _num_prompt_tokens(instruction: events.RunStep) -> int:
    """Tokens of the step that extend a prompt: slices longer than one token, or not sampled from."""
    header = instruction.header
    pairs = zip(header.lengths, header.is_sampled, strict=True)
    return sum(length for length, is_sampled in pairs if length > 1 or not is_sampled)
