"""The scheduler's records: one per request, one per sequence, and the states a sequence goes through.

A sequence has one record for its whole life, never one per slice: the columns of a step are read off the records.
Covers what is remembered; `coordinator.scheduler` decides what happens to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from cluster.microbatch import StepId
from cluster.request import RequestId, SamplingParams, SequenceId, TokenizedRequest, TokenLogprobs
from coordinator.events import Phase, RequestProgress, RequestReport, StageSeconds
from coordinator.pages import Extent


class SequenceState(Enum):
    """WAITING: queued, holds nothing. RUNNING: holds its pages and takes part in steps. FINISHED: holds nothing."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class RequestRecord:
    """A request that was accepted and has not ended."""

    request: TokenizedRequest
    stop_token_ids: frozenset[int]  # the request's and, unless ignored, the model's eos ids
    arrived_at: float
    admitted_at: float | None = None
    first_token_at: float | None = None
    sequences: list[SequenceRecord] = field(default_factory=list)  # one per completion, in order
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    stage_seconds: list[float] = field(default_factory=list)  # stage 0's compute, its queue, stage 1's compute, …

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    @property
    def phase(self) -> Phase:
        if self.admitted_at is None:
            return Phase.QUEUED
        return Phase.PREFILL if self.first_token_at is None else Phase.DECODE

    @property
    def has_ended(self) -> bool:
        return not self.unfinished_sequences()

    def unfinished_sequences(self) -> list[SequenceRecord]:
        """Return the completions that have not ended."""
        return [sequence for sequence in self.sequences if sequence.state is not SequenceState.FINISHED]

    @property
    def is_known_to_stages(self) -> bool:
        """Whether any slice of it has been sent."""
        return any(sequence.num_scheduled for sequence in self.sequences)

    def progress(self, queue_position: int = 0, step_id: StepId | None = None) -> RequestProgress:
        """Return how far the request is."""
        return RequestProgress(
            phase=self.phase,
            queue_position=queue_position,
            num_prompt_tokens_done=self.sequences[0].num_prompt_tokens_done,
            num_prompt_tokens=len(self.prompt_token_ids),
            step_id=step_id,
        )

    def report(self, now: float) -> RequestReport:
        """Return the account of a request that ends now."""
        admitted_at = now if self.admitted_at is None else self.admitted_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        return RequestReport(
            num_prompt_tokens=len(self.prompt_token_ids),
            num_completion_tokens=sum(len(sequence.output_token_ids) for sequence in self.sequences),
            queue_seconds=admitted_at - self.arrived_at,
            prefill_seconds=first_token_at - admitted_at,
            decode_seconds=now - first_token_at,
            stages=tuple(map(StageSeconds, self.stage_seconds[::2], self.stage_seconds[1::2])),
        )


@dataclass(slots=True, eq=False)
class SequenceRecord:
    """One completion of a request."""

    sequence_id: SequenceId
    owner: RequestRecord
    completion_index: int
    sampling: SamplingParams
    state: SequenceState = SequenceState.WAITING
    extents: tuple[Extent, ...] = ()  # its page table, in runs
    num_scheduled: int = 0  # tokens [0, num_scheduled) have been sent into the pipeline
    num_prompt_tokens_done: int = 0
    output_token_ids: list[int] = field(default_factory=list)

    @property
    def num_prompt_tokens_left(self) -> int:
        """Prompt tokens not yet scheduled."""
        return len(self.owner.request.prompt_token_ids) - self.num_scheduled


def num_kv_slots(request: TokenizedRequest) -> int:
    """Return the positions of a sequence that need keys and values: all but the last token, which nothing follows."""
    return len(request.prompt_token_ids) + request.stop.max_tokens - 1


def completion_sampling(params: SamplingParams, completion_index: int) -> SamplingParams:
    """Return the sampling of completion i: its seed is i more; the prompt is reported on by the first one only."""
    if completion_index == 0:
        return params
    return replace(params, seed=(params.seed + completion_index) % 2**64, num_prompt_logprobs=None)


class RunningSequences:
    """The sequences between admission and end. Of these, `prefilling` have prompt tokens left to schedule and `ready`
    have a token to decode; the next token of all others is in flight."""

    def __init__(self) -> None:
        self.all: dict[SequenceId, SequenceRecord] = {}
        self.prefilling: dict[SequenceId, SequenceRecord] = {}  # earliest admitted first
        self.ready: dict[SequenceId, SequenceRecord] = {}  # longest ready first

    @property
    def num_decoding(self) -> int:
        """Sequences whose prompt is scheduled to the end."""
        return len(self.all) - len(self.prefilling)

    def num_prompt_tokens_left(self) -> int:
        """Return the prompt tokens that are not scheduled yet."""
        return sum([sequence.num_prompt_tokens_left for sequence in self.prefilling.values()])

    def add(self, sequence: SequenceRecord) -> None:
        """Take in a sequence none of whose tokens is scheduled."""
        self.all[sequence.sequence_id] = self.prefilling[sequence.sequence_id] = sequence

    def remove(self, sequence: SequenceRecord) -> None:
        """Let a sequence go, wherever it stands."""
        del self.all[sequence.sequence_id]
        self.prefilling.pop(sequence.sequence_id, None)
        self.ready.pop(sequence.sequence_id, None)
