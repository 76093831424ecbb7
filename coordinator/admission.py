"""What a request must be to be accepted at all: the limits of this placement, checked in one place.

Covers what can never work (InvalidRequestError, at once). Whether a valid request has to wait, or finds the queue
full, depends on the load and is `coordinator.scheduler`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import InvalidRequestError
from cluster.request import TokenizedRequest
from coordinator.pages import num_pages_for
from coordinator.sequences import num_kv_slots


@dataclass(frozen=True, slots=True)
class Limits:
    """What the placement holds and the settings allow."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    max_context: int  # prompt and output tokens of one sequence
    num_pages: int  # on every stage
    page_size: int  # token slots per page
    max_running: int  # sequences
    max_waiting: int  # requests
    max_step_tokens: int
    inter_token_target: float  # seconds
    step_timeout: float  # seconds
    is_streamed: bool = False  # some stage reads weights from disk at every step


def pages_per_sequence(request: TokenizedRequest, limits: Limits) -> int:
    """Return how many pages each completion reserves."""
    return num_pages_for(num_kv_slots(request), limits.page_size)


def validate(request: TokenizedRequest, limits: Limits) -> None:
    """Raise InvalidRequestError, with the numbers and the way out, for what this placement can never serve."""
    if not request.prompt_token_ids:
        raise InvalidRequestError("the prompt is empty; give at least one token")
    if request.stop.max_tokens <= 0:
        raise InvalidRequestError(f"max_tokens must be at least 1, not {request.stop.max_tokens}")
    if request.num_completions <= 0:
        raise InvalidRequestError(f"num_completions must be at least 1, not {request.num_completions}")
    request.sampling.validate(limits.vocab_size)
    _check_token_ids(request, limits.vocab_size)
    _check_room(request, limits)


def _check_token_ids(request: TokenizedRequest, vocab_size: int) -> None:
    named = {"the prompt": request.prompt_token_ids, "stop_token_ids": request.stop.stop_token_ids}
    for name, token_ids in named.items():
        for extreme in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= extreme < vocab_size:
                raise InvalidRequestError(
                    f"{name} has token id {extreme}; the vocabulary has {vocab_size}, numbered from 0"
                )


def _check_room(request: TokenizedRequest, limits: Limits) -> None:
    prompt, output = len(request.prompt_token_ids), request.stop.max_tokens
    if prompt + output > limits.max_context:
        raise InvalidRequestError(
            f"{prompt} prompt tokens and max_tokens {output} exceed the context of {limits.max_context}; "
            + _way_out(prompt, limits.max_context)
        )
    count = request.num_completions
    if count > limits.max_running:
        raise InvalidRequestError(
            f"num_completions {count} is more than the {limits.max_running} sequences that run at once; "
            "ask for fewer, or serve with a larger --max-running"
        )
    pages = pages_per_sequence(request, limits)
    if count * pages > limits.num_pages:
        raise InvalidRequestError(
            f"{count} x {prompt + output - 1} tokens need {count * pages} pages of {limits.page_size}, but the "
            f"KV cache has {limits.num_pages}; lower max_tokens or num_completions, or serve with a larger --kv-memory"
        )


def _way_out(prompt: int, max_context: int) -> str:
    if prompt < max_context:
        return f"lower max_tokens to {max_context - prompt} or shorten the prompt"
    return f"shorten the prompt to at most {max_context - 1} tokens or serve with a larger --max-context"
