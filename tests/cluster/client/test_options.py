import math

import pytest

from cluster.client import ChatMessage, GenerateOptions
from cluster.client.options import check_names, generate_request, tokenize_request
from cluster.errors import InvalidRequestError


def request_of(prompt="x", **options):
    return generate_request(prompt, options, request_id="r")


def test_what_is_not_asked_for_stays_unset():
    request = request_of(temperature=None, logprobs=None)
    assert not request.sampling.ListFields()
    assert not request.stop.ListFields()
    assert not request.logprobs.ListFields()
    assert (request.num_completions, request.echo, request.resume_offset) == (1, False, 0)


def test_every_option_reaches_its_field():
    request = request_of(
        max_tokens=7,
        temperature=0,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={5: -math.inf, 6: 1.5},
        seed=2**64 - 1,
        stop=["\n", "END"],
        stop_token_ids={9},
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=2,
        num_completions=4,
        echo=True,
        model="m",
    )
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0
    assert (request.sampling.top_k, request.sampling.top_p, request.sampling.min_p) == (3, 0.5, 0.1)
    assert (request.sampling.repetition_penalty, request.sampling.presence_penalty) == (1.1, -1)
    assert request.sampling.frequency_penalty == 2
    assert dict(request.sampling.logit_bias) == {5: -math.inf, 6: 1.5}
    assert request.sampling.seed == 2**64 - 1
    assert (request.stop.max_tokens, request.stop.ignore_eos) == (7, True)
    assert list(request.stop.stop_strings) == ["\n", "END"]
    assert list(request.stop.stop_token_ids) == [9]
    assert request.logprobs.HasField("num_logprobs")
    assert request.logprobs.num_prompt_logprobs == 2
    assert (request.num_completions, request.echo, request.model, request.request_id) == (4, True, "m", "r")


def test_one_stop_string_is_not_taken_for_its_characters():
    assert list(request_of(stop="END").stop.stop_strings) == ["END"]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("text", "text"),
        ("", "text"),
        ([1, 2], "token_ids"),
        ((), "token_ids"),
        ([ChatMessage("user", "x")], "chat"),
        ([{"role": "user", "content": "x"}], "chat"),
    ],
)
def test_prompt_kinds(prompt, kind):
    assert request_of(prompt).WhichOneof("prompt") == kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens cannot be -1"),
        ({"max_tokens": 1.5}, r"max_tokens cannot be 1\.5"),
        ({"temperature": "hot"}, "temperature cannot be 'hot'"),
        ({"seed": -1}, "seed cannot be -1"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias cannot be"),
        ({"num_completions": -1}, "num_completions cannot be -1"),
        ({"logprobs": -1}, "logprobs cannot be -1"),
        ({"stop_token_ids": [-5]}, "stop_token_ids names token id -5"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be whole numbers"),
        ({"stop": [3]}, "stop cannot be"),
    ],
)
def test_value_that_no_message_can_carry_is_refused_by_name(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        request_of(**options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, -2], "prompt names token id -2"),
        ([1, "b"], "prompt must be whole numbers"),
        (5, "prompt must be"),
        ([{"role": "user"}], "needs a role and a content"),
        ([{"role": "user", "content": "x", "name": "me"}], "needs a role and a content"),
        ([ChatMessage("user", "x"), "y"], "needs a role and a content"),
        ([{"role": "user", "content": 3}], "content of a message cannot be 3"),
    ],
)
def test_prompt_that_is_none_is_refused(prompt, message):
    with pytest.raises(InvalidRequestError, match=message):
        request_of(prompt)


def test_unknown_option_is_a_type_error_that_lists_the_options():
    with pytest.raises(TypeError, match=r"'max_token'.*max_tokens, temperature"):
        request_of(max_token=3)


def test_tokenize_takes_text_or_a_chat():
    assert tokenize_request("x", "").text == "x"
    assert tokenize_request([ChatMessage("user", "x")], "m").chat.messages[0].content == "x"


def test_options_are_those_of_the_documentation():
    assert set(GenerateOptions.__annotations__) == {
        *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs"),
        *("prompt_logprobs", "num_completions", "echo", "model", "request_id", "silence_timeout", "on_progress"),
    }


def test_a_lone_surrogate_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        generate_request("so \ud800 far", {}, request_id="id")


def test_none_is_an_option_left_out():
    names = GenerateOptions.__annotations__
    assert generate_request("x", dict.fromkeys(names), request_id="r") == generate_request("x", {}, request_id="r")


def test_the_option_that_transformers_calls_otherwise_is_named():
    with pytest.raises(TypeError, match="unknown option 'max_new_tokens'; use max_tokens"):
        check_names({"max_new_tokens": 3})
    with pytest.raises(TypeError, match=r"use temperature \(0: greedy\)"):
        check_names({"do_sample": False})


def test_stop_that_is_no_text_is_named():
    with pytest.raises(InvalidRequestError, match="stop cannot be 5"):
        generate_request("x", {"stop": 5}, request_id="r")
