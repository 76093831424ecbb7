"""What the client hands out: pieces, completions, models, the cluster's state. Values only; immutable.

Covers reading them from messages too. Requests are made in `cluster.client.options`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from cluster.request import FinishReason, TokenLogprobs
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.wire.generation import finish_reason_from_proto, logprobs_from_proto


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat. `role` is "system", "user" or "assistant", as the model's template knows them."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a request is, for a person who waits. Told when the phase changes and at least every 15 s."""

    phase: str  # "queued", "prefill" or "decode"
    queue_position: int  # requests ahead of this one
    num_prompt_tokens_done: int
    num_prompt_tokens: int
    num_blocks_done: int  # of the step in flight
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of one completion. Text never ends within a character; it may lag behind the token ids.

    The last piece of each completion has `finish_reason`. With `echo` or `prompt_logprobs` the first piece is the
    prompt's (`is_prompt`); its text is empty unless `echo` asked for it.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id when asked for
    completion_index: int = 0
    finish_reason: FinishReason | None = None
    stop_string: str = ""  # the one that ended the completion, if one did
    is_prompt: bool = False


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """One stage's share in a request: its steps' computing time (shared with other requests) and their waiting."""

    stage: int
    compute_seconds: float
    queue_seconds: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went."""

    queue_seconds: float
    prefill_seconds: float  # from admission to the first token
    decode_seconds: float
    stages: tuple[StageSeconds, ...]


@dataclass(frozen=True, slots=True)
class StageNumerics:
    """How a stage computes. Block numbers are a half-open range."""

    first_block: int
    end_block: int
    precision: str
    compute_dtype: str
    kv_dtype: str
    wire_dtype: str
    device: str
    isa: str
    num_threads: int
    is_exact: bool


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What must be equal for the same request and seed to give the same tokens bit for bit."""

    model: str
    revision: str  # commit of the repository, or digest of the folder
    stages: tuple[StageNumerics, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request read and wrote (over all its completions)."""

    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What the server tells when a request is done."""

    usage: Usage
    timings: Timings
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole completion of a prompt."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_string: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """All that a request gave. `text`, `token_ids`, `logprobs` and `finish_reason` are the first choice's."""

    request_id: str
    choices: tuple[Choice, ...]
    summary: Summary
    prompt: Piece | None = None  # with echo or prompt_logprobs

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def usage(self) -> Usage:
        return self.summary.usage

    @property
    def timings(self) -> Timings:
        return self.summary.timings

    @property
    def fingerprint(self) -> Fingerprint:
        return self.summary.fingerprint


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server serves."""

    name: str
    architecture: str
    revision: str
    max_context: int
    vocab_size: int
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage as the coordinator sees it. Progress is of the present state; its total is 0 when unknown."""

    stage: int
    state: str  # "connecting", "downloading", "converting", "verifying", "loading", "ready" or "lost"
    worker_id: str
    node_name: str
    address: str
    process_id: int
    device: str
    numerics: StageNumerics
    weight_bytes: int
    kv_bytes: int
    free_memory_bytes: int
    total_memory_bytes: int
    progress_bytes: int
    progress_total_bytes: int
    busy_share: float  # of the last minute, 0 to 1
    message: str  # why it is lost
    num_steps: int  # since the epoch opened
    busy_seconds: float
    bubble_seconds: float
    received_bytes: int
    hop_seconds: float | None  # from the finish of the stage before to the start here; median; None: not known
    resident_bytes: int  # of weights, in memory now
    streamed_bytes: int  # of weights, read from disk at every step now; of experts, all that are read on demand
    read_bytes: int  # by the steps since the epoch opened
    stall_seconds: float  # that they waited for it
    disk_bytes_per_second: float  # as probed when the span was loaded; 0: not probed
    num_streamed: int  # blocks (and the head) that are streamed, as planned
    ring_bytes: int  # of buffers that they pass through
    buffer_bytes: int  # that computing or loading takes for a moment
    expert_cache_bytes: int
    process_bytes: int  # that the process took before it loaded anything
    resident_share: float  # of the weights, in memory now, 0 to 1
    read_bytes_per_second: float  # of `busy_seconds`


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What `describe` tells. Token rates are over the last ten seconds."""

    version: str
    protocol_version: int
    state: str  # "loading", "ready", "draining" or "failed"
    message: str
    model: Model
    stages: tuple[StageStatus, ...]
    num_running: int
    num_waiting: int
    max_waiting: int
    num_pages: int
    num_free_pages: int
    page_size: int
    uptime_seconds: float
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    num_requests_finished: int
    num_requests_failed: int
    num_steps_in_flight: int
    epoch: str
    advice: str  # what would be better
    max_step_tokens: int


def read_progress(message: generation.Progress) -> Progress:
    phase = generation.Progress.Phase.Name(message.phase).removeprefix("PHASE_").lower()
    return Progress(phase=phase, **_same(Progress, message, but=("phase",)))


def read_piece(message: generation.Piece) -> Piece:
    return Piece(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_read_logprobs(message.logprobs),
        completion_index=message.completion_index,
    )


def read_prompt(message: generation.PromptEcho, *, has_text: bool) -> Piece:
    return Piece(
        text=message.text if has_text else "",
        token_ids=tuple(message.token_ids),
        logprobs=_read_logprobs(message.logprobs),
        is_prompt=True,
    )


def read_completion_finished(message: generation.CompletionFinished) -> Piece:
    return Piece(
        completion_index=message.completion_index,
        finish_reason=finish_reason_from_proto(message.reason),
        stop_string=message.stop_string,
    )


def read_finished(message: generation.Finished) -> Summary:
    stages = tuple(StageSeconds(**_same(StageSeconds, stage)) for stage in message.stages)
    numerics = tuple(_read_numerics(stage) for stage in message.fingerprint.stages)
    return Summary(
        usage=Usage(**_same(Usage, message)),
        timings=Timings(stages=stages, **_same(Timings, message, but=("stages",))),
        fingerprint=Fingerprint(message.fingerprint.model, message.fingerprint.revision, numerics),
    )


def read_model(message: service.Model) -> Model:
    return Model(**_same(Model, message))


def read_cluster(message: service.DescribeClusterResponse) -> ClusterStatus:
    """Read the answer of DescribeCluster; also what `cluster.serve` hands to its listener."""
    return ClusterStatus(
        state=service.ClusterState.Name(message.state).removeprefix("CLUSTER_STATE_").lower(),
        model=read_model(message.model),
        stages=tuple(_read_stage(stage) for stage in message.stages),
        **_same(ClusterStatus, message, but=("state", "model", "stages")),
    )


def _read_stage(message: service.StageStatus) -> StageStatus:
    return StageStatus(
        state=service.StageState.Name(message.state).removeprefix("STAGE_STATE_").lower(),
        numerics=_read_numerics(message.numerics),
        hop_seconds=message.hop_seconds if message.HasField("hop_seconds") else None,
        **_same(StageStatus, message, but=("state", "numerics", "hop_seconds")),
    )


def _read_numerics(message: generation.StageNumerics) -> StageNumerics:
    return StageNumerics(**_same(StageNumerics, message))


def _read_logprobs(messages: Sequence[generation.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(logprobs_from_proto(message) for message in messages)


def _same(value_class: Any, message: Any, *, but: Sequence[str] = ()) -> dict[str, Any]:
    """Return the message's fields that have the same name and meaning in the value class."""
    return {field.name: getattr(message, field.name) for field in fields(value_class) if field.name not in but}
