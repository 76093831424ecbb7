"""What a client asks for, immutable: prompt, sampling, stop rules. Not how it is scheduled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from cluster.errors import InvalidRequestError

RequestId = NewType("RequestId", str)
SequenceId = NewType("SequenceId", int)

MAX_LOGPROBS = 64
"""Most alternatives that a request may ask for per position."""


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an eos or stop token, or a stop string
    LENGTH = "length"  # max_tokens or the context length
    ABORTED = "aborted"  # the client asked, or went away


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The defaults are the neutral values (plain softmax sampling).

    temperature 0 means greedy. top_k 0, top_p 1 and min_p 0 are off. Repetition penalty (CTRL, as in
    transformers) sees prompt and output; presence and frequency penalties see the output only, as OpenAI's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0  # 0 <= seed < 2**64
    num_logprobs: int | None = None  # None: none; 0: the chosen token's only; k: and the k best
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidRequestError naming the first value that is out of its range."""
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequestError(f"{name} must be between {low:g} and {high:g}, not {value}")
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be above 0; use temperature 0 for greedy decoding")
        if self.repetition_penalty == 0.0:
            raise InvalidRequestError("repetition_penalty must be above 0; 1 turns it off")
        for name in ("num_logprobs", "num_prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise InvalidRequestError(f"{name} must be between 0 and {MAX_LOGPROBS}, not {count}")
        self._validate_logit_bias(vocab_size)

    def _validate_logit_bias(self, vocab_size: int) -> None:
        if sum(bias == -math.inf for bias in self.logit_bias.values()) >= vocab_size:
            raise InvalidRequestError("logit_bias forbids every token of the vocabulary")
        for token_id, bias in self.logit_bias.items():
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(f"logit_bias names token id {token_id}; the vocabulary has {vocab_size}")
            if math.isnan(bias) or bias == math.inf:
                raise InvalidRequestError(f"logit_bias of token id {token_id} must be a number or -inf, not {bias}")


_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_k", 0, 2**31 - 1),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
    ("seed", 0, 2**64 - 1),
)


@dataclass(frozen=True, slots=True)
class StopRules:
    """When a sequence ends, besides the model's context length and its eos ids (unless ignored)."""

    max_tokens: int
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, before temperature, penalties and filters.

    `logprob` is None for a prompt's first token, which nothing predicts.
    """

    token_id: int
    logprob: float | None
    top_token_ids: tuple[int, ...] = ()  # best first
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizedRequest:
    """A request whose prompt is token ids and whose defaults are filled in."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopRules
    num_completions: int = 1
    echo: bool = False
