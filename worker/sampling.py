"""Sampling on the last stage: from the hidden states asked for to tokens and log probabilities.

Covers what is remembered per sequence (settings, tokens seen) and how a step's rows are grouped. How one row becomes a
token is in `worker.penalties` and `worker.drawing`, its log probabilities in `worker.logprobs`.

A row's logits are processed in the order of transformers and vLLM: logit bias, repetition penalty, presence and
frequency penalties, temperature, top-k, top-p, min-p. Temperature 0 takes the best of the logits after penalties, the
lowest id among equals. A row's token depends on its logits, its sequence's tokens and (seed, position) alone.

Everything remembered comes from step headers: replaying a sequence's slices after its sampling change rebuilds it.

Prompt log probabilities: the coordinator asks for the logits of every row of every prompt slice. The row at position p
predicts the token at p + 1, so a slice's last row predicts a token that arrives with the next slice: its hidden
state waits here until then. Every slice thus reports its own tokens; position 0, which nothing predicts, has None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.errors import InvariantError
from cluster.microbatch import PromptLogprobs, SequenceSampling, StepHeader, StepResult
from cluster.request import SamplingParams, SequenceId, TokenLogprobs
from worker.drawing import draw
from worker.logprobs import token_logprobs
from worker.penalties import TokenHistory, edited, has_penalties, logit_edits
from worker.randomness import uniforms

Head = Callable[[Tensor], Tensor]
"""Final norm and head: `[num_rows, hidden_size]` → `[num_rows, vocab_size]`."""

MAX_LOGITS_BYTES = 32 * 1024**2
"""The head's output at a time; sampling it takes up to about seven times as much for a moment."""
_ROW_TILE = 16  # rows that the head computes at once anyway


@dataclass(slots=True)
class _SequenceState:
    """What the last stage knows of a sequence."""

    params: SamplingParams
    prompt_length: int
    history: TokenHistory = field(default_factory=TokenHistory)
    last_row: tuple[int, Tensor] | None = None  # hidden state of a prompt slice's end, and the position it predicts


@dataclass(frozen=True, slots=True)
class _Row:
    """A hidden state `[hidden_size]` and the position of the token that it predicts."""

    sequence_id: SequenceId
    state: _SequenceState
    position: int
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class _Slice:
    """One slice of a step and its rows that go through the head."""

    sequence_id: SequenceId
    state: _SequenceState
    start: int
    token_ids: tuple[int, ...]
    is_sampled: bool
    rows: Tensor  # [logits_rows, hidden_size]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def is_scored(self) -> bool:
        """Whether log probabilities of these prompt tokens were asked for."""
        is_asked = self.state.params.num_prompt_logprobs is not None and self.start < self.state.prompt_length
        return is_asked and len(self.rows) == len(self.token_ids)


class Sampler:
    """The sampling state of all sequences of an epoch. Not thread-safe: one compute thread calls it."""

    def __init__(self, vocab_size: int) -> None:
        rows = MAX_LOGITS_BYTES // (4 * vocab_size)
        self._max_rows = max(_ROW_TILE, rows // _ROW_TILE * _ROW_TILE)
        self._states: dict[SequenceId, _SequenceState] = {}

    def apply(self, header: StepHeader) -> None:
        """Take finished sequences, sampling changes and tokens from a step's header; before `sample`, once per step."""
        for sequence_id in header.finished_sequence_ids:
            self._states.pop(sequence_id, None)
        for change in header.sampling_changes:
            self._states[change.sequence_id] = _new_state(change)
        offset = 0
        for sequence_id, start, length in zip(header.sequence_ids, header.start_positions, header.lengths, strict=True):
            state = self._states.get(sequence_id)
            if state is not None and has_penalties(state.params):
                state.history.write(start, header.token_ids[offset : offset + length])
            offset += length

    def clear(self) -> None:
        """Forget every sequence."""
        self._states.clear()

    def sample(self, header: StepHeader, head: Head, hidden: Tensor) -> StepResult:
        """Return tokens for the slices with `is_sampled`, and log probabilities where asked for.

        `hidden` `[sum(logits_rows), hidden_size]` holds the rows that the header asks for, in slice order. Raises
        InvariantError naming the sequence when there is nothing to choose from.
        """
        slices = list(self._slices(header, hidden))
        prompt_logprobs = [self._score_prompt(piece, head) for piece in slices if piece.is_scored]
        rows = [_Row(piece.sequence_id, piece.state, piece.end, piece.rows[-1]) for piece in slices if piece.is_sampled]
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        for some, logits in self._logits(rows, head):
            chosen = _choose(some, logits)
            tokens += chosen
            logprobs += _chosen_logprobs(some, logits, chosen)
        for piece in slices:
            if piece.is_scored:  # now that no row can fail any more: a step may be computed again
                piece.state.last_row = (piece.end, piece.rows[-1].clone())
        return StepResult(
            header.epoch,
            header.step_id,
            sequence_ids=tuple(row.sequence_id for row in rows),
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            prompt_logprobs=tuple(prompt_logprobs),
        )

    def _slices(self, header: StepHeader, hidden: Tensor) -> Iterator[_Slice]:
        first_token = first_row = 0
        for sequence_id, start, length, num_rows, is_sampled in zip(
            header.sequence_ids,
            header.start_positions,
            header.lengths,
            header.logits_rows,
            header.is_sampled,
            strict=True,
        ):
            token_ids = header.token_ids[first_token : first_token + length]
            rows = hidden[first_row : first_row + num_rows]
            first_token, first_row = first_token + length, first_row + num_rows
            if num_rows:
                yield _Slice(sequence_id, self._state(sequence_id), start, token_ids, is_sampled, rows)

    def _state(self, sequence_id: SequenceId) -> _SequenceState:
        try:
            return self._states[sequence_id]
        except KeyError:
            raise InvariantError(
                f"sequence {sequence_id} asks for logits, but its sampling settings never came"
            ) from None

    def _logits(self, rows: Sequence[_Row], head: Head) -> Iterator[tuple[Sequence[_Row], Tensor]]:
        """Yield rows with their logits in float32, as many at a time as memory allows."""
        for first in range(0, len(rows), self._max_rows):
            some = rows[first : first + self._max_rows]
            yield some, head(torch.stack([row.hidden for row in some])).float()

    def _score_prompt(self, piece: _Slice, head: Head) -> PromptLogprobs:
        """Return the log probabilities of a slice's prompt tokens."""
        state = piece.state
        rows = _predicting_rows(piece)
        first = rows[0].position if rows else piece.end
        num_best = state.params.num_prompt_logprobs or 0
        tokens: list[TokenLogprobs] = []
        if piece.start == 0:
            first = 0
            tokens.append(TokenLogprobs(piece.token_ids[0], None))
        for some, logits in self._logits(rows, head):
            _check_best(some, logits.amax(dim=1))
            targets = [piece.token_ids[row.position - piece.start] for row in some]
            tokens += token_logprobs(logits, targets, [num_best] * len(some))
        return PromptLogprobs(piece.sequence_id, first, tuple(tokens))


def _new_state(change: SequenceSampling) -> _SequenceState:
    return _SequenceState(change.params, change.prompt_length)


def _predicting_rows(piece: _Slice) -> list[_Row]:
    """Return the rows that predict a slice's prompt tokens; the first one's row came with the slice before."""
    hidden = list(enumerate(piece.rows[:-1], start=piece.start + 1))
    if piece.state.last_row is not None and piece.state.last_row[0] == piece.start:
        hidden.insert(0, piece.state.last_row)
    return [
        _Row(piece.sequence_id, piece.state, position, row)
        for position, row in hidden
        if position < piece.state.prompt_length
    ]


def _choose(rows: Sequence[_Row], logits: Tensor) -> list[int]:
    """Return one token id per row of `logits`, which stay as they are."""
    edits = [
        (index, logit_edits(row.state.params, row.state.history, row.state.prompt_length, row.position))
        for index, row in enumerate(rows)
        if row.state.params.logit_bias or has_penalties(row.state.params)
    ]
    logits = edited(logits, edits)
    best, token_ids = logits.max(dim=1)
    _check_best(rows, best)
    drawn = [index for index, row in enumerate(rows) if row.state.params.temperature > 0]
    if drawn:
        params = [rows[index].state.params for index in drawn]
        chances = uniforms([p.seed for p in params], [rows[index].position for index in drawn])
        of_drawn = logits if len(drawn) == len(rows) else logits[drawn]
        token_ids[drawn] = draw(of_drawn, params, torch.from_numpy(chances).to(logits.device))
    chosen: list[int] = token_ids.tolist()
    return chosen


def _check_best(rows: Sequence[_Row], best: Tensor) -> None:
    """Raise InvariantError for the first row whose best logit is no number: NaN anywhere in it, or -inf everywhere."""
    if bool(best.isfinite().all()):
        return
    index = int(best.isfinite().logical_not().nonzero()[0])
    row = rows[index]
    raise InvariantError(
        f"sequence {row.sequence_id} has no token to choose at position {row.position}: its best logit is "
        f"{best[index].item()}; if the model is served in fp16, serve it with --precision bf16 or fp32",
        reason="BAD_LOGITS",
    )


def _chosen_logprobs(rows: Sequence[_Row], logits: Tensor, tokens: Sequence[int]) -> list[TokenLogprobs | None]:
    asked = [index for index, row in enumerate(rows) if row.state.params.num_logprobs is not None]
    result: list[TokenLogprobs | None] = [None] * len(rows)
    if asked:
        num_best = [rows[index].state.params.num_logprobs or 0 for index in asked]
        found = token_logprobs(logits[asked], [tokens[index] for index in asked], num_best)
        for index, entry in zip(asked, found, strict=True):
            result[index] = entry
    return result
