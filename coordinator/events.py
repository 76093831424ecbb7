"""What goes into the scheduler and what comes out: events in past tense, instructions in the imperative.

The shell calls `Scheduler.handle(event, now)` and performs the instructions it returns, in order, before it hands
in the next event. Covers the values only; `coordinator.scheduler` decides, `coordinator.engine` performs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cluster.errors import SpanwiseError
from cluster.microbatch import Epoch, StepFailure, StepHeader, StepId, StepResult
from cluster.request import FinishReason, RequestId, SequenceId, TokenizedRequest, TokenLogprobs

# Events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client asks. Either the request is rejected in the same call or it has been accepted."""

    request: TokenizedRequest


@dataclass(frozen=True, slots=True)
class RequestAborted:
    """The client asked to stop, or went away. Of no effect once the request has ended."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class StopStringMatched:
    """The shell, which turns tokens into text, found a stop string. Of no effect once the sequence has ended."""

    sequence_id: SequenceId


@dataclass(frozen=True, slots=True)
class StepCompleted:
    """The last stage reported. Results come in step order; those of older epochs are ignored."""

    result: StepResult


@dataclass(frozen=True, slots=True)
class StepFailed:
    """A stage reported that a step ends without a result; its epoch is given up."""

    failure: StepFailure


@dataclass(frozen=True, slots=True)
class EpochLost:
    """The shell noticed that an epoch cannot go on: a worker died, a stream broke, a deadline passed."""

    epoch: Epoch
    error: SpanwiseError


@dataclass(frozen=True, slots=True)
class EpochOpened:
    """Every stage has opened the epoch and forgotten all sequences; steps may run."""

    epoch: Epoch
    num_stages: int


@dataclass(frozen=True, slots=True)
class GatheringEnded:
    """The time that a GatherRequests asked for is over."""


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """No request is accepted from now on; those accepted before are served to their end."""


Event = (
    RequestArrived
    | RequestAborted
    | StopStringMatched
    | StepCompleted
    | StepFailed
    | EpochLost
    | EpochOpened
    | GatheringEnded
    | DrainRequested
)

# Instructions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunStep:
    """Send this step to stage 0. Comes before all other instructions of a call: the pipeline's work is first."""

    header: StepHeader


@dataclass(frozen=True, slots=True)
class GatherRequests:
    """Say GatheringEnded after so many seconds: no step is formed until then."""

    seconds: float


@dataclass(frozen=True, slots=True)
class EmitTokens:
    """Give a completion its next tokens.

    A sequence's last one of these has `finish_reason`. When that is STOP and there are tokens, the final token is
    an eos or stop token: counted and reported, never rendered as text. After `StopStringMatched` and
    `RequestAborted` there are no tokens.
    """

    request_id: RequestId
    sequence_id: SequenceId
    completion_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one per token when asked for, else empty
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class EmitPromptLogprobs:
    """Give the log probabilities of all prompt tokens, once per request and before its first EmitTokens."""

    request_id: RequestId
    tokens: tuple[TokenLogprobs, ...]  # one per prompt token; the first has no logprob


@dataclass(frozen=True, slots=True)
class ReportProgress:
    """Tell the client that its request has reached another phase."""

    request_id: RequestId
    progress: RequestProgress


@dataclass(frozen=True, slots=True)
class FinishRequest:
    """All completions have ended: close the stream with this account."""

    request_id: RequestId
    report: RequestReport


@dataclass(frozen=True, slots=True)
class FailRequest:
    """End the stream of an accepted request with an error."""

    request_id: RequestId
    error: SpanwiseError


@dataclass(frozen=True, slots=True)
class RejectRequest:
    """Answer the arrival with an error; nothing is kept of it. The id may be that of another, accepted request."""

    request_id: RequestId
    error: SpanwiseError


@dataclass(frozen=True, slots=True)
class OpenEpoch:
    """Give `lost` up and open a higher epoch on every stage; say so with EpochOpened. Until then nothing runs."""

    lost: Epoch
    error: SpanwiseError


Instruction = (
    RunStep
    | GatherRequests
    | EmitTokens
    | EmitPromptLogprobs
    | ReportProgress
    | FinishRequest
    | FailRequest
    | RejectRequest
    | OpenEpoch
)

# What they carry ------------------------------------------------------------------------------------------------


class Phase(Enum):
    """Where a request stands."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """How far a request is."""

    phase: Phase
    queue_position: int  # requests ahead of it; QUEUED only
    num_prompt_tokens_done: int  # of its first completion
    num_prompt_tokens: int
    step_id: StepId | None = None  # its oldest step in flight, whose StepProgress is the request's own


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Time of a request's steps at one stage, shared with the other requests of those steps."""

    compute_seconds: float
    queue_seconds: float


@dataclass(frozen=True, slots=True)
class RequestReport:
    """A request's account. The three durations add up to the time from arrival to end."""

    num_prompt_tokens: int
    num_completion_tokens: int
    queue_seconds: float  # until admission
    prefill_seconds: float  # from admission to the first token
    decode_seconds: float
    stages: tuple[StageSeconds, ...]


@dataclass(frozen=True, slots=True)
class SchedulerCounters:
    """What the scheduler holds at this moment."""

    num_running: int  # sequences
    num_waiting: int  # requests
    num_pages: int
    num_free_pages: int
    num_steps_in_flight: int
    depth: int  # steps that it would like to have in flight
