"""What travels through the pipeline: the columnar step header, its result, its failure.

Columnar: one tuple per field with one entry per slice, since thousands of small objects per step would cost
milliseconds. Covers values only; `cluster.wire.steps` turns them into protobuf and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

from cluster.request import SamplingParams, SequenceId, TokenLogprobs

StepId = NewType("StepId", int)


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """Fences stale calls: (which coordinator, which of its placements). Ordered; workers refuse lower ones."""

    generation: int
    number: int

    def __str__(self) -> str:
        return f"{self.generation}.{self.number}"


@dataclass(frozen=True, slots=True)
class PageDelta:
    """Pages appended to a sequence's page table: `page_ids` become its pages `first_page, first_page + 1, …`."""

    sequence_id: SequenceId
    first_page: int
    page_ids: tuple[int, ...]
    cache_group: int = 0  # 0: full attention and sliding window; room for state caches


@dataclass(frozen=True, slots=True)
class SequenceSampling:
    """Sampling settings of a sequence, sent with its first slice; with the slices' token ids it is all that the
    last stage needs, so a lost last stage is rebuilt by replaying."""

    sequence_id: SequenceId
    prompt_length: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One stage's part of a step. The clock is the stage's own monotonic clock, in nanoseconds: differences between
    two stages mean something only on one machine."""

    stage: int
    received_ns: int  # the whole payload is here
    started_ns: int  # the compute thread begins
    finished_ns: int  # the output is handed to the sender
    received_bytes: int = 0
    read_bytes: int = 0  # of weights, from disk, that this step used
    stall_ns: int = 0  # that the compute thread waited for them
    resident_bytes: int = 0  # of weights, in memory when the step ended


@dataclass(frozen=True, slots=True)
class WeightTraffic:
    """What a step read from disk because not all weights are in memory."""

    read_bytes: int = 0
    stall_ns: int = 0  # that the compute thread waited for reads
    resident_bytes: int = 0  # of weights in memory when the step ended


@dataclass(frozen=True, slots=True)
class StepHeader:
    """One step: the slices that traverse the pipeline together.

    Slice i computes tokens `token_ids[sum(lengths[:i]) :][: lengths[i]]` of sequence `sequence_ids[i]`, whose first
    one stands at position `start_positions[i]`. The last `logits_rows[i]` rows of the slice go through the head;
    a token is sampled from the final one of them where `is_sampled[i]`.
    """

    epoch: Epoch
    step_id: StepId
    deadline_ms: int  # milliseconds left when sent, never a wall-clock time
    sequence_ids: tuple[SequenceId, ...]
    start_positions: tuple[int, ...]
    lengths: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits_rows: tuple[int, ...]
    is_sampled: tuple[bool, ...]
    page_deltas: tuple[PageDelta, ...] = ()
    sampling_changes: tuple[SequenceSampling, ...] = ()
    finished_sequence_ids: tuple[SequenceId, ...] = ()  # forgotten before this step's slices are computed
    last_stage: int = 0  # the last stage that executes this step
    timings: tuple[StageTiming, ...] = field(default=())

    @property
    def num_tokens(self) -> int:
        """Rows of the hidden states `[num_tokens, hidden_size]`."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of a sequence's prompt tokens at positions `start_position, start_position + 1, …`."""

    sequence_id: SequenceId
    start_position: int
    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the last stage reports: one sampled token per slice with `is_sampled`, in slice order."""

    epoch: Epoch
    step_id: StepId
    sequence_ids: tuple[SequenceId, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    timings: tuple[StageTiming, ...] = ()


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A step that ends without a result, reported by whichever stage noticed. `reason` is an error class name of
    `cluster.errors`; `is_stage_lost` tells that a neighbour is gone rather than that this step went wrong."""

    epoch: Epoch
    step_id: StepId
    stage: int
    reason: str
    message: str
    is_stage_lost: bool = False


@dataclass(frozen=True, slots=True)
class StepProgress:
    """A sign of life from a stage whose step takes long: it has finished `blocks_done` of its span."""

    epoch: Epoch
    step_id: StepId
    stage: int
    blocks_done: int
    num_blocks: int
