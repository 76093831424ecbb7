"""One step's slices: a throw-away adder holds what remains of the step's budget, then writes the columns.

Covers which slices go into one step, and its header. How large a step may be, and when one is formed, is decided by
`coordinator.scheduler`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice

from cluster.microbatch import Epoch, PageDelta, SequenceSampling, StepHeader, StepId
from cluster.request import SequenceId
from coordinator.sequences import SequenceRecord


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens `[start, start + length)` of a sequence; the last chunk is sampled from."""

    sequence: SequenceRecord
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        return self.start + self.length == len(self.sequence.owner.prompt_token_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.sequence.owner.prompt_token_ids[self.start : self.start + self.length]

    @property
    def logits_rows(self) -> int:
        """Every row when the prompt's log probabilities were asked for, else the one that is sampled from."""
        return self.length if self.sequence.sampling.num_prompt_logprobs is not None else int(self.is_last)


class Microbatch:
    """The slices of one step: decodes first, then chunks of prompts."""

    def __init__(self) -> None:
        self.decodes: list[SequenceRecord] = []
        self.chunks: list[Chunk] = []

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def sequences(self) -> list[SequenceRecord]:
        """Return the sequence of every slice, in slice order."""
        return self.decodes + [chunk.sequence for chunk in self.chunks]

    @property
    def sampled(self) -> list[SequenceRecord]:
        """Return the sequences that get a token, in slice order."""
        return self.decodes + [chunk.sequence for chunk in self.chunks if chunk.is_last]

    def add_decodes(self, ready: dict[SequenceId, SequenceRecord], max_decodes: int) -> None:
        """Take up to `max_decodes` sequences out of `ready`, longest ready first."""
        self.decodes = list(islice(ready.values(), max_decodes))
        for sequence in self.decodes:
            del ready[sequence.sequence_id]

    def add_chunks(self, prefilling: dict[SequenceId, SequenceRecord], max_tokens: int) -> None:
        """Take up to `max_tokens` prompt tokens of the sequences in `prefilling`, earliest admitted first; sequences
        whose prompts are scheduled to the end leave it."""
        for sequence in list(prefilling.values()):
            if max_tokens <= 0:
                break
            chunk = Chunk(sequence, sequence.num_scheduled, min(sequence.num_prompt_tokens_left, max_tokens))
            self.chunks.append(chunk)
            max_tokens -= chunk.length
            if chunk.is_last:
                del prefilling[sequence.sequence_id]

    def header(
        self,
        epoch: Epoch,
        step_id: StepId,
        *,
        deadline_ms: int,
        last_stage: int,
        finished_sequence_ids: Iterable[SequenceId],
    ) -> StepHeader:
        """Write the columns. A sequence's first slice brings its pages and its sampling settings."""
        decodes, chunks = self.decodes, self.chunks
        new = [chunk.sequence for chunk in chunks if chunk.start == 0]
        ones = [1] * len(decodes)
        return StepHeader(
            epoch=epoch,
            step_id=step_id,
            deadline_ms=deadline_ms,
            sequence_ids=tuple([sequence.sequence_id for sequence in self.sequences]),
            start_positions=(*[sequence.num_scheduled for sequence in decodes], *[chunk.start for chunk in chunks]),
            lengths=(*ones, *[chunk.length for chunk in chunks]),
            token_ids=(
                *[sequence.output_token_ids[-1] for sequence in decodes],
                *chain.from_iterable([chunk.token_ids for chunk in chunks]),
            ),
            logits_rows=(*ones, *[chunk.logits_rows for chunk in chunks]),
            is_sampled=(*([True] * len(decodes)), *[chunk.is_last for chunk in chunks]),
            page_deltas=tuple(map(_page_delta, new)),
            sampling_changes=tuple(map(_sampling_change, new)),
            finished_sequence_ids=tuple(finished_sequence_ids),
            last_stage=last_stage,
        )

    def advance(self) -> None:
        """Count the slices' tokens as scheduled: the header has been written."""
        for sequence in self.decodes:
            sequence.num_scheduled += 1
        for chunk in self.chunks:
            chunk.sequence.num_scheduled += chunk.length


def _page_delta(sequence: SequenceRecord) -> PageDelta:
    return PageDelta(sequence.sequence_id, 0, tuple(chain.from_iterable(sequence.extents)))


def _sampling_change(sequence: SequenceRecord) -> SequenceSampling:
    return SequenceSampling(sequence.sequence_id, len(sequence.owner.prompt_token_ids), sequence.sampling)
