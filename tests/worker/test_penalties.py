"""Changes to single logits, against transformers' processors and the published definitions."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.request import SamplingParams
from worker.penalties import LogitEdits, TokenHistory, edited, has_penalties, logit_edits

VOCAB_SIZE = 50


def history_of(token_ids: list[int]) -> TokenHistory:
    history = TokenHistory()
    history.write(0, token_ids)
    return history


def processed(logits: torch.Tensor, params: SamplingParams, token_ids: list[int], prompt_length: int) -> torch.Tensor:
    edits = logit_edits(params, history_of(token_ids), prompt_length, len(token_ids))
    return edited(logits, [(0, edits)])


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=80), st.sampled_from([0.5, 1.3, 2.0]))
def test_repetition_penalty_is_that_of_transformers(token_ids: list[int], penalty: float) -> None:
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(len(token_ids)))
    reference = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = reference(torch.tensor([token_ids]), logits.clone())
    actual = processed(logits, SamplingParams(repetition_penalty=penalty), token_ids, len(token_ids) // 2)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 30))
def test_presence_and_frequency_count_the_output_only(token_ids: list[int], prompt_length: int) -> None:
    prompt_length = min(prompt_length, len(token_ids))
    params = SamplingParams(presence_penalty=0.75, frequency_penalty=-0.25)
    actual = processed(torch.zeros(1, 10), params, token_ids, prompt_length)[0].tolist()
    counts = Counter(token_ids[prompt_length:])
    assert actual == [-(0.75 * (counts[i] > 0) - 0.25 * counts[i]) for i in range(10)]


def test_bias_comes_first_then_repetition_then_deductions() -> None:
    params = SamplingParams(
        logit_bias={1: -3.0, 2: 1.0}, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    actual = processed(torch.ones(1, 4), params, [0, 1, 1], prompt_length=1)
    assert actual[0].tolist() == [0.5, (1 - 3) * 2 - 0.5 - 2 * 0.25, 2.0, 1.0]


def test_forbidden_token_stays_forbidden() -> None:
    params = SamplingParams(logit_bias={1: -math.inf}, repetition_penalty=2.0, presence_penalty=-100.0)
    assert processed(torch.ones(1, 4), params, [1, 1], prompt_length=1)[0, 1] == -math.inf


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={0: 1e308, 1: -1e308}),
        SamplingParams(repetition_penalty=1e-300),
        SamplingParams(repetition_penalty=100.0, frequency_penalty=-100.0),
    ],
)
def test_no_permitted_setting_makes_a_nan_or_infinity(params: SamplingParams) -> None:
    params.validate(3)
    actual = processed(torch.tensor([[0.0, -5.0, 5.0]]), params, [0, 1, 2, 0, 1, 2], prompt_length=3)
    assert bool(actual.isfinite().all())


def test_rows_are_edited_apart_and_the_input_stays() -> None:
    logits = torch.zeros(3, 4)
    first = logit_edits(SamplingParams(logit_bias={0: 1.0}), TokenHistory(), 0, 0)
    second = logit_edits(SamplingParams(logit_bias={0: 2.0, 3: 3.0}), TokenHistory(), 0, 0)
    actual = edited(logits, [(0, first), (2, second)])
    assert actual.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 3]]
    assert logits.count_nonzero() == 0
    assert edited(logits, []) is logits


def test_writing_a_position_again_replaces_its_token_and_what_follows_is_not_seen() -> None:
    history = history_of([1, 2, 3])
    history.write(1, [4])
    edits: LogitEdits = logit_edits(SamplingParams(repetition_penalty=2.0), history, 3, 2)
    assert edits.token_ids.tolist() == [1, 4]


def test_history_grows_to_any_length() -> None:
    history = TokenHistory()
    for start in range(0, 1000, 50):
        history.write(start, range(start, start + 50))
    assert history.read(0, 1000).tolist() == list(range(1000))


def test_neutral_settings_need_no_history() -> None:
    assert not has_penalties(SamplingParams(logit_bias={1: 1.0}))
    assert has_penalties(SamplingParams(repetition_penalty=1.1))
    assert has_penalties(SamplingParams(presence_penalty=0.1))
    assert has_penalties(SamplingParams(frequency_penalty=0.1))
