"""Requests and limits for tests of the scheduler, with everything that a test does not care about filled in."""

from __future__ import annotations

from typing import Any

from cluster.request import RequestId, SamplingParams, StopRules, TokenizedRequest
from coordinator.admission import Limits

EOS = 0


def make_limits(**changes: Any) -> Limits:
    """Return roomy limits: pages of 4 slots, 100 token ids of which 0 is eos."""
    values: dict[str, Any] = {
        "vocab_size": 100,
        "eos_token_ids": frozenset({EOS}),
        "max_context": 4096,
        "num_pages": 8192,
        "page_size": 4,
        "max_running": 256,
        "max_waiting": 64,
        "max_step_tokens": 512,
        "inter_token_target": 0.5,
        "step_timeout": 600.0,
    }
    return Limits(**(values | changes))


def make_request(
    name: str = "a",
    prompt: tuple[int, ...] | int = 3,
    max_tokens: int = 2,
    *,
    num_completions: int = 1,
    stop_token_ids: frozenset[int] = frozenset(),
    ignore_eos: bool = False,
    **sampling: Any,
) -> TokenizedRequest:
    """Return a request; a number as prompt stands for that many tokens 11, 12, …"""
    token_ids = tuple(11 + index % 80 for index in range(prompt)) if isinstance(prompt, int) else prompt
    stop = StopRules(max_tokens, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos)
    return TokenizedRequest(RequestId(name), token_ids, SamplingParams(**sampling), stop, num_completions)
