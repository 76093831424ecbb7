"""Sampling settings are refused by name when they are out of range."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cluster.errors import InvalidRequestError
from cluster.request import SamplingParams

VOCAB_SIZE = 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": math.nan}, "temperature must be between 0 and 100, not nan"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": math.inf}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": 101.0}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"num_logprobs": 65}, "num_logprobs must be between 0 and 64"),
        ({"num_prompt_logprobs": -1}, "num_prompt_logprobs"),
        ({"logit_bias": {5: 1.0}}, "token id 5; the vocabulary has 5"),
        ({"logit_bias": {1: math.nan}}, "token id 1 must be a number or -inf"),
        ({"logit_bias": {1: math.inf}}, "token id 1 must be a number or -inf"),
        ({"logit_bias": dict.fromkeys(range(5), -math.inf)}, "forbids every token"),
    ],
)
def test_setting_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**settings).validate(VOCAB_SIZE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0, "top_k": 10**6, "top_p": 1e-9, "min_p": 1.0, "seed": 2**64 - 1},
        {"logit_bias": dict.fromkeys(range(4), -math.inf), "num_logprobs": 0, "num_prompt_logprobs": 64},
    ],
)
def test_setting_at_the_border_is_accepted(settings: dict[str, Any]) -> None:
    SamplingParams(**settings).validate(VOCAB_SIZE)
