"""Changes to single logits: logit bias, repetition, presence and frequency penalties.

Touches only the tokens that a sequence has seen or biased, never the whole vocabulary. In this order, as transformers
and vLLM apply them: bias, repetition (CTRL: positive logits divided, negative ones multiplied; prompt and output),
presence and frequency (OpenAI: subtracted once and per occurrence; output only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.request import SamplingParams

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def has_penalties(params: SamplingParams) -> bool:
    """Tell whether tokens seen so far matter to the next one's logits."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class TokenHistory:
    """A sequence's token ids by position. Writing a position again replaces it."""

    def __init__(self) -> None:
        self._ids = np.zeros(64, dtype=np.int64)

    def write(self, start: int, token_ids: Sequence[int]) -> None:
        """Record tokens at positions `start, start + 1, …`."""
        end = start + len(token_ids)
        if end > len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros(max(end, len(self._ids)), dtype=np.int64)))
        self._ids[start:end] = token_ids

    def read(self, start: int, end: int) -> NDArray[np.int64]:
        """Return a view of positions `[start, end)`."""
        return self._ids[start:end]


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """What happens to some logits of one row; arrays have one entry per distinct token id."""

    token_ids: NDArray[np.int64]
    biases: NDArray[np.float64]  # added
    penalties: NDArray[np.float64]  # then positive logits are divided by it, negative ones multiplied
    deductions: NDArray[np.float64]  # then subtracted


def logit_edits(params: SamplingParams, history: TokenHistory, prompt_length: int, position: int) -> LogitEdits:
    """Return the edits for the token at `position`, which tokens at positions below it influence."""
    output = history.read(prompt_length, position)
    seen = history.read(0, position) if params.repetition_penalty != 1.0 else output[:0]
    biased = np.fromiter(params.logit_bias.keys(), dtype=np.int64, count=len(params.logit_bias))
    token_ids = np.unique(np.concatenate((biased, seen, output)))
    biases, deductions = np.zeros(len(token_ids)), np.zeros(len(token_ids))
    biases[np.searchsorted(token_ids, biased)] = list(params.logit_bias.values())
    output_ids, counts = np.unique(output, return_counts=True)
    deduction = params.presence_penalty + params.frequency_penalty * counts
    deductions[np.searchsorted(token_ids, output_ids)] = deduction
    penalties = np.where(np.isin(token_ids, seen), params.repetition_penalty, 1.0)
    return LogitEdits(token_ids, biases, penalties, deductions)


def edited(logits: Tensor, edits: Sequence[tuple[int, LogitEdits]]) -> Tensor:
    """Return `logits` `[num_rows, vocab_size]` with each (row, edits) applied; a copy unless there are none.

    Results are computed in float64 and held within float32, so that no permitted setting makes a NaN or +inf.
    """
    if not edits:
        return logits
    rows = torch.from_numpy(np.repeat([row for row, _ in edits], [len(edit.token_ids) for _, edit in edits]))
    columns = torch.from_numpy(np.concatenate([edit.token_ids for _, edit in edits]))
    biases, penalties, deductions = (
        torch.from_numpy(np.concatenate([getattr(edit, name) for _, edit in edits])).to(logits.device)
        for name in ("biases", "penalties", "deductions")
    )
    place = (rows.to(logits.device), columns.to(logits.device))
    values = logits[place].double() + biases
    values = torch.where(values > 0, values / penalties, values * penalties) - deductions
    return logits.index_put(place, _within_float32(values))


def _within_float32(values: Tensor) -> Tensor:
    bounded = values.clamp(-_FLOAT32_MAX, _FLOAT32_MAX).float()
    return torch.where(values == -torch.inf, -torch.inf, bounded)  # -inf forbids a token
