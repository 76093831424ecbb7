"""What can never be served is refused at once, with the numbers and the way out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cluster.errors import InvalidRequestError
from coordinator.admission import pages_per_sequence, validate
from tests.coordinator.requests import make_limits, make_request

LIMITS = make_limits(max_context=20, num_pages=8, page_size=4, max_running=4)


def test_the_largest_request_that_fits_is_accepted() -> None:
    validate(make_request(prompt=1, max_tokens=19), LIMITS)
    validate(make_request(prompt=5, max_tokens=4, num_completions=4), LIMITS)


def test_the_last_token_needs_no_slot() -> None:
    assert pages_per_sequence(make_request(prompt=4, max_tokens=1), LIMITS) == 1
    assert pages_per_sequence(make_request(prompt=4, max_tokens=2), LIMITS) == 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": -3}, "max_tokens must be at least 1, not -3"),
        ({"num_completions": 0}, "num_completions must be at least 1"),
        ({"num_completions": 5}, "num_completions 5 is more than the 4 sequences.*--max-running"),
        ({"prompt": (11, 100)}, "the prompt has token id 100; the vocabulary has 100"),
        ({"prompt": (-1,)}, "the prompt has token id -1"),
        ({"stop_token_ids": frozenset({100})}, "stop_token_ids has token id 100"),
        ({"temperature": math.nan}, "temperature"),
        ({"prompt": 15, "max_tokens": 6}, "15 prompt tokens and max_tokens 6.*context of 20; lower max_tokens to 5"),
        ({"prompt": 20, "max_tokens": 1}, "shorten the prompt to at most 19 tokens.*--max-context"),
        ({"prompt": 9, "max_tokens": 4, "num_completions": 3}, "3 x 12 tokens need 9 pages of 4.*has 8.*--kv-memory"),
    ],
)
def test_what_can_never_work_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        validate(make_request(**request_), LIMITS)
