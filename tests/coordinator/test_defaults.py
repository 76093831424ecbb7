"""What a request leaves unset comes from generation_config.json, then from neutral values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from cluster.errors import ConfigurationError
from cluster.request import SamplingParams
from cluster.rpc.v1 import generation_pb2 as generation
from coordinator.defaults import complete_sampling


def completed(generation_config: Mapping[str, Any] | None = None, **fields: Any) -> SamplingParams:
    return complete_sampling(
        generation.SamplingParams(**fields),
        generation.LogprobOptions(),
        generation_config=generation_config or {},
        draw_seed=lambda: 77,
    )


def test_unset_request_on_a_model_without_settings_is_greedy_and_neutral() -> None:
    assert completed() == SamplingParams(temperature=0.0, seed=77)


def test_settings_of_a_model_that_samples_are_taken() -> None:
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
    }
    assert completed(settings) == SamplingParams(
        temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1, seed=77
    )


def test_model_that_samples_without_a_temperature_has_temperature_1() -> None:
    assert completed({"do_sample": True}).temperature == 1.0


def test_model_that_does_not_sample_is_greedy_whatever_its_temperature() -> None:
    assert completed({"do_sample": False, "temperature": 0.6}).temperature == 0.0
    assert completed({"temperature": 0.6}).temperature == 0.0


def test_what_the_client_sets_wins() -> None:
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    params = completed(settings, temperature=0.0, top_p=0.5, top_k=0, seed=5)
    assert params == SamplingParams(temperature=0.0, top_p=0.5, top_k=0, seed=5)


@pytest.mark.parametrize("asked", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_client_that_sets_a_filter_wants_to_sample(asked: dict[str, float]) -> None:
    assert completed(**asked).temperature == 1.0
    assert completed({"temperature": 0.6}, **asked).temperature == 0.6


def test_repetition_penalty_of_the_model_holds_for_greedy_decoding_too() -> None:
    assert completed({"repetition_penalty": 1.2}).repetition_penalty == 1.2


def test_null_in_the_settings_means_unset() -> None:
    assert completed({"do_sample": True, "temperature": None, "top_k": None}) == SamplingParams(seed=77)


def test_setting_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"generation_config\.json: top_p must be a number, not 'high'"):
        completed({"top_p": "high"})


def test_seed_0_is_a_seed() -> None:
    assert completed(seed=0).seed == 0


def test_penalties_bias_and_log_probabilities_are_passed_on() -> None:
    params = complete_sampling(
        generation.SamplingParams(presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={3: 2.0}),
        generation.LogprobOptions(num_logprobs=0, num_prompt_logprobs=2),
        generation_config={},
        draw_seed=lambda: 0,
    )
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.5, -0.5, {3: 2.0})
    assert (params.num_logprobs, params.num_prompt_logprobs) == (0, 2)
