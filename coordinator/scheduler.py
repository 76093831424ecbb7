"""The scheduler: a state machine that is told what happened and says what to do.

`handle(event, now)` is the only way to change its state. It reads no clock and does no I/O, so a transcript of events
determines every decision.

Covers queueing, admission, stop rules (stop strings are found by the shell) and failure. What can be accepted at all:
`admission`; which pages: `pages`; when a step is formed and of what: `steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from cluster import errors
from cluster.errors import (
    InvalidRequestError,
    InvariantError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    SpanwiseError,
)
from cluster.microbatch import Epoch, PromptLogprobs, StepFailure, StepResult
from cluster.request import FinishReason, RequestId, SequenceId, TokenizedRequest, TokenLogprobs
from coordinator import events
from coordinator.admission import Limits, pages_per_sequence, validate
from coordinator.events import Event, Instruction
from coordinator.pages import PagePool
from coordinator.sequences import (
    RequestRecord,
    RunningSequences,
    SequenceRecord,
    SequenceState,
    completion_sampling,
)
from coordinator.steps import GATHER_SECONDS, EpochSteps
from coordinator.story import Story


class Scheduler:
    """All requests of one model, from arrival to end."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._requests: dict[RequestId, RequestRecord] = {}  # accepted and not ended
        self._waiting: dict[RequestId, RequestRecord] = {}  # of those, the queue: first come, first served
        self._running = RunningSequences()
        self._pages = PagePool(limits.num_pages)
        self._steps: EpochSteps | None = None  # while an epoch is open
        self._latest_epoch: Epoch | None = None
        self._num_sequences = 0  # ever
        self._is_draining = False
        self._story = Story()

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take an event that happened at `now` (seconds) and return what to do about it, in order.

        Raises InvariantError for an event that cannot have happened; the scheduler is of no use afterwards.
        """
        decided = [*self._on(event, now), *self._admit(now)]
        if self._steps is None:
            return decided
        if not isinstance(event, events.GatheringEnded) and self._steps.begin_gathering(self._running):
            return [events.GatherRequests(GATHER_SECONDS), *decided]
        return [*map(events.RunStep, self._steps.form(self._running, now)), *decided]

    @property
    def is_idle(self) -> bool:
        """Whether every accepted request has ended."""
        return not self._requests

    def progress_of(self, request_id: RequestId) -> events.RequestProgress:
        """Return where a request stands. Raises NotFoundError once it has ended."""
        record = self._requests.get(request_id)
        if record is None:
            raise NotFoundError(f"there is no live request {request_id!r}")
        position = list(self._waiting).index(request_id) if request_id in self._waiting else 0
        step_id = self._steps.oldest_step_of(record) if self._steps else None
        return record.progress(position, step_id)

    def counters(self) -> events.SchedulerCounters:
        """Return what is held at this moment."""
        return events.SchedulerCounters(
            num_running=len(self._running.all),
            num_waiting=len(self._waiting),
            num_pages=self._pages.num_pages,
            num_free_pages=self._pages.num_free,
            num_steps_in_flight=len(self._steps.in_flight) if self._steps else 0,
            depth=self._steps.depth(self._running) if self._steps else 0,
        )

    def check_invariants(self) -> None:
        """Raise InvariantError unless the records agree with each other. For tests and for idle moments."""
        running = self._running
        self._pages.check_invariants(extent for sequence in running.all.values() for extent in sequence.extents)
        steps = self._steps.in_flight if self._steps else ()
        in_flight = {sequence.sequence_id for step in steps for sequence in step.microbatch.sampled}
        places = [*running.prefilling, *running.ready, *(in_flight & running.all.keys())]
        unfinished = [s for record in self._requests.values() for s in record.unfinished_sequences()]
        in_state = {s.sequence_id for s in unfinished if s.state is SequenceState.RUNNING}
        claims = {
            "a running sequence is prefilling, ready or in flight": sorted(places) == sorted(running.all),
            "running sequences are those in state RUNNING": in_state == running.all.keys(),
            "at most max_running sequences run": len(running.all) <= self.limits.max_running,
            "at most max_waiting requests wait": len(self._waiting) <= self.limits.max_waiting,
            "waiting requests are not admitted": all(r.admitted_at is None for r in self._waiting.values()),
            "a request that has ended is forgotten": not any(r.has_ended for r in self._requests.values()),
        }
        for claim, holds in claims.items():
            if not holds:
                raise self._story.error(f"it does not hold that {claim}")

    # --- events ------------------------------------------------------------------------------------------------------

    def _on(self, event: Event, now: float) -> Iterator[Instruction]:
        match event:
            case events.StepCompleted(result):
                return self._complete(result, now)
            case events.RequestArrived(request):
                return self._arrive(request, now)
            case events.RequestAborted(request_id):
                return self._abort(request_id, now)
            case events.StopStringMatched(sequence_id):
                return self._stop(sequence_id, now)
            case events.StepFailed(failure):
                return self._lose(failure.epoch, _error_of(failure), now)
            case events.EpochLost(epoch, error):
                return self._lose(epoch, error, now)
            case events.EpochOpened(epoch, num_stages):
                return self._open(epoch, num_stages, now)
            case events.GatheringEnded():
                return self._end_gathering()
            case events.DrainRequested():
                return self._drain()

    def _arrive(self, request: TokenizedRequest, now: float) -> Iterator[Instruction]:
        try:
            self._check_acceptable(request)
        except SpanwiseError as error:
            yield events.RejectRequest(request.request_id, error)
            return
        record = self._new_record(request, now)
        self._requests[record.request_id] = self._waiting[record.request_id] = record
        yield from self._admit(now)
        if record.request_id in self._waiting:
            yield events.ReportProgress(record.request_id, record.progress(len(self._waiting) - 1))

    def _abort(self, request_id: RequestId, now: float) -> Iterator[Instruction]:
        if record := self._requests.get(request_id):
            self._waiting.pop(request_id, None)
            for sequence in record.unfinished_sequences():
                yield from self._emit(sequence, (), (), FinishReason.ABORTED, now)

    def _stop(self, sequence_id: SequenceId, now: float) -> Iterator[Instruction]:
        if not 0 < sequence_id <= self._num_sequences:
            raise self._story.error(f"a stop string in sequence {sequence_id}, which never existed")
        if sequence := self._running.all.get(sequence_id):
            yield from self._emit(sequence, (), (), FinishReason.STOP, now)

    def _complete(self, result: StepResult, now: float) -> Iterator[Instruction]:
        if self._steps is None or self._is_stale(result.epoch):
            return
        microbatch = self._steps.complete(result, now)
        for chunk in microbatch.chunks:
            chunk.sequence.num_prompt_tokens_done += chunk.length
        for prompt in result.prompt_logprobs:
            self._collect(prompt)
        logprobs = result.logprobs or (None,) * len(result.token_ids)
        for sequence, token_id, logprob in zip(microbatch.sampled, result.token_ids, logprobs, strict=True):
            if sequence.state is SequenceState.RUNNING:
                yield from self._append(sequence, token_id, logprob, now)

    def _open(self, epoch: Epoch, num_stages: int, now: float) -> Iterator[Instruction]:
        if self._steps is not None or (self._latest_epoch is not None and epoch <= self._latest_epoch):
            raise self._story.error(f"epoch {epoch} opened after {self._latest_epoch}, which is not lost or not lower")
        self._latest_epoch = epoch
        self._steps = EpochSteps(epoch, num_stages, self.limits, self._story)
        self._story.note(now, f"epoch {epoch} opened")
        yield from ()

    def _lose(self, epoch: Epoch, error: SpanwiseError, now: float) -> Iterator[Instruction]:
        """Give the epoch up. What the stages knew of is lost with it; all other requests stay as they are."""
        if self._steps is None or self._is_stale(epoch):
            return
        self._steps = None
        self._story.note(now, f"epoch {epoch} lost: {error}")
        for record in [record for record in self._requests.values() if record.is_known_to_stages]:
            for sequence in record.unfinished_sequences():
                self._move(sequence, SequenceState.FINISHED, now)
            del self._requests[record.request_id]
            yield events.FailRequest(record.request_id, error)
        yield events.OpenEpoch(epoch, error)

    def _end_gathering(self) -> Iterator[Instruction]:
        if self._steps is not None:
            self._steps.end_gathering()
        yield from ()

    def _drain(self) -> Iterator[Instruction]:
        self._is_draining = True
        yield from ()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _check_acceptable(self, request: TokenizedRequest) -> None:
        if self._is_draining:
            raise NotReadyError("the server is shutting down and takes no new requests", reason="DRAINING")
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request_id {request.request_id!r} is that of a live request; make a new one")
        validate(request, self.limits)
        if len(self._waiting) >= self.limits.max_waiting:
            raise OverloadedError(
                f"{len(self._waiting)} requests are waiting already, the most allowed; try again later"
            )

    def _new_record(self, request: TokenizedRequest, now: float) -> RequestRecord:
        eos_token_ids = frozenset() if request.stop.ignore_eos else self.limits.eos_token_ids
        record = RequestRecord(request, request.stop.stop_token_ids | eos_token_ids, arrived_at=now)
        for index in range(request.num_completions):
            self._num_sequences += 1
            sampling = completion_sampling(request.sampling, index)
            sequence = SequenceRecord(SequenceId(self._num_sequences), record, index, sampling)
            record.sequences.append(sequence)
        return record

    def _admit(self, now: float) -> Iterator[Instruction]:
        """Let requests run while the first of the queue finds room: nobody overtakes it."""
        while self._steps and self._waiting:
            record = next(iter(self._waiting.values()))
            if not self._has_room(record.request):
                return
            del self._waiting[record.request_id]
            record.admitted_at = now
            for sequence in record.sequences:
                self._move(sequence, SequenceState.RUNNING, now)
            yield events.ReportProgress(record.request_id, record.progress())

    def _has_room(self, request: TokenizedRequest) -> bool:
        num_running = len(self._running.all) + request.num_completions
        num_pages = request.num_completions * pages_per_sequence(request, self.limits)
        return num_running <= self.limits.max_running and num_pages <= self._pages.num_free

    # --- sequences ---------------------------------------------------------------------------------------------------

    def _append(
        self, sequence: SequenceRecord, token_id: int, logprob: TokenLogprobs | None, now: float
    ) -> Iterator[Instruction]:
        """Take the next token of a running sequence."""
        record = sequence.owner
        if sequence.sampling.num_prompt_logprobs is not None and not sequence.output_token_ids:
            yield self._prompt_logprobs_of(record)
        sequence.output_token_ids.append(token_id)
        self._running.ready[sequence.sequence_id] = sequence
        if record.first_token_at is None:
            record.first_token_at = now
            yield events.ReportProgress(record.request_id, record.progress())
        logprobs = () if logprob is None else (logprob,)
        yield from self._emit(sequence, (token_id,), logprobs, _finish_reason(sequence), now)

    def _emit(
        self,
        sequence: SequenceRecord,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        reason: FinishReason | None,
        now: float,
    ) -> Iterator[Instruction]:
        """Give a completion its tokens, and end it where there is a reason to."""
        record = sequence.owner
        yield events.EmitTokens(
            record.request_id, sequence.sequence_id, sequence.completion_index, token_ids, logprobs, reason
        )
        if reason is None:
            return
        self._move(sequence, SequenceState.FINISHED, now)
        if record.has_ended:
            del self._requests[record.request_id]
            yield events.FinishRequest(record.request_id, record.report(now))

    def _collect(self, prompt: PromptLogprobs) -> None:
        """Append a chunk's log probabilities to those of the chunks before it."""
        sequence = self._running.all.get(prompt.sequence_id)
        if sequence is None:
            return
        collected = sequence.owner.prompt_logprobs
        if prompt.start_position != len(collected):
            raise self._story.error(
                f"prompt log probabilities from position {prompt.start_position} follow {len(collected)} others",
                prompt.sequence_id,
            )
        collected.extend(prompt.tokens)

    def _prompt_logprobs_of(self, record: RequestRecord) -> Instruction:
        collected = tuple(record.prompt_logprobs)
        if len(collected) != len(record.prompt_token_ids):
            raise self._story.error(
                f"request {record.request_id!r} asked for log probabilities of its {len(record.prompt_token_ids)} "
                f"prompt tokens; those of {len(collected)} came"
            )
        return events.EmitPromptLogprobs(record.request_id, collected)

    def _move(self, sequence: SequenceRecord, state: SequenceState, now: float) -> None:
        """Bring a sequence into another state, with all that it gains or gives up by that."""
        text = f"sequence {sequence.sequence_id}: {sequence.state.name} → {state.name}"
        transition = _TRANSITIONS.get((sequence.state, state))
        if transition is None:
            raise self._story.error(f"{text} is no legal transition", sequence.sequence_id)
        transition(self, sequence)
        sequence.state = state
        self._story.note(now, text, sequence.sequence_id)

    def _start(self, sequence: SequenceRecord) -> None:
        sequence.extents = self._pages.allocate(pages_per_sequence(sequence.owner.request, self.limits))
        self._running.add(sequence)

    def _withdraw(self, sequence: SequenceRecord) -> None:
        """A waiting sequence holds nothing."""

    def _release(self, sequence: SequenceRecord) -> None:
        self._running.remove(sequence)
        self._pages.release(sequence.extents)
        sequence.extents = ()
        if self._steps and sequence.num_scheduled:
            self._steps.forget(sequence.sequence_id)

    def _is_stale(self, epoch: Epoch) -> bool:
        """Tell whether a report is about an epoch that has been given up."""
        if self._latest_epoch is None or epoch > self._latest_epoch:
            raise self._story.error(f"a report about epoch {epoch}; the latest one opened is {self._latest_epoch}")
        return epoch < self._latest_epoch


_TRANSITIONS: Mapping[tuple[SequenceState, SequenceState], Callable[[Scheduler, SequenceRecord], None]] = {
    (SequenceState.WAITING, SequenceState.RUNNING): Scheduler._start,
    (SequenceState.WAITING, SequenceState.FINISHED): Scheduler._withdraw,
    (SequenceState.RUNNING, SequenceState.FINISHED): Scheduler._release,
}


def _finish_reason(sequence: SequenceRecord) -> FinishReason | None:
    """Tell why a sequence ends with its latest token. `validate` made sure that max_tokens ends before the context."""
    if sequence.output_token_ids[-1] in sequence.owner.stop_token_ids:
        return FinishReason.STOP
    if len(sequence.output_token_ids) == sequence.owner.request.stop.max_tokens:
        return FinishReason.LENGTH
    return None


def _error_of(failure: StepFailure) -> SpanwiseError:
    """Return a stage's report as the error it names."""
    kind = getattr(errors, failure.reason, None)
    message = f"step {failure.step_id} failed at stage {failure.stage}: {failure.message}"
    if isinstance(kind, type) and issubclass(kind, SpanwiseError):
        return kind(message)
    return InvariantError(f"{message} ({failure.reason})")
