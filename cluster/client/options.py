"""What a caller may ask for, and the GenerateRequest made of it. Values out of range are refused here by name when a
message cannot even carry them; everything else is the server's to judge, which knows the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from google.protobuf.message import Message

from cluster.client.values import ChatMessage, Progress
from cluster.errors import InvalidRequestError
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service

M = TypeVar("M", bound=Message)

Prompt = str | Sequence[int] | Sequence[ChatMessage | Mapping[str, str]]
"""Text, token ids, or a chat (whose template runs on the server)."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of every generating call. What is left out or None takes the model's own default."""

    max_tokens: int | None  # most tokens to write; server's default: 256
    temperature: float | None  # 0: greedy
    top_k: int | None  # keep the k likeliest tokens; 0: off
    top_p: float | None  # keep the likeliest tokens up to this probability; 1: off
    min_p: float | None  # keep tokens at least this fraction as likely as the best; 0: off
    repetition_penalty: float | None  # above 1 discourages tokens of prompt and output; 1: off
    presence_penalty: float | None  # subtracted once for tokens of the output; 0: off
    frequency_penalty: float | None  # subtracted per occurrence in the output; 0: off
    logit_bias: Mapping[int, float] | None  # token id → added to its logit; -inf forbids it
    seed: int | None  # same seed, same text; drawn by the server otherwise
    stop: str | Sequence[str] | None  # the text ends before the first of these
    stop_token_ids: Iterable[int] | None
    ignore_eos: bool | None  # go on after the model's end-of-sequence tokens
    logprobs: int | None  # log probabilities of the chosen tokens and of this many best ones
    prompt_logprobs: int | None  # the same for the prompt's tokens
    num_completions: int | None  # independent completions of the prompt
    echo: bool | None  # give the prompt back first
    model: str | None  # needed only where a server serves several
    request_id: str | None  # unique among your live requests; made for you otherwise
    silence_timeout: float | None  # seconds without any message, not in total; the client's own otherwise
    on_progress: Callable[[Progress], None] | None  # called while waiting for the first token


_OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens, which counts without the prompt",
    "do_sample": "temperature (0: greedy)",
    "num_return_sequences": "num_completions",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
}
"""What transformers calls some of them."""


def check_names(options: Mapping[str, object]) -> None:
    """Raise TypeError for an option that does not exist, as a function call would."""
    unknown = sorted(options.keys() - GenerateOptions.__annotations__.keys())
    if unknown:
        known = ", ".join(GenerateOptions.__annotations__)
        instead = _OTHER_NAMES.get(unknown[0])
        way_out = f"use {instead}" if instead else f"the options are {known}"
        raise TypeError(f"unknown option {unknown[0]!r}; {way_out}")


def generate_request(prompt: Prompt, options: GenerateOptions, *, request_id: str) -> service.GenerateRequest:
    """Return the message for a prompt; InvalidRequestError names the value that a message cannot carry."""
    check_names(options)
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    request = service.GenerateRequest(
        model=values.get("model", ""),
        request_id=request_id,
        sampling=_sampling(values),
        stop=_stop_rules(values),
        logprobs=_message(
            generation.LogprobOptions,
            num_logprobs=("logprobs", values.get("logprobs")),
            num_prompt_logprobs=("prompt_logprobs", values.get("prompt_logprobs")),
        ),
        echo=values.get("echo", False),
    )
    _set(request, "num_completions", "num_completions", values.get("num_completions", 1))
    _set_prompt(request, prompt)
    return request


def tokenize_request(prompt: Prompt, model: str) -> service.TokenizeRequest:
    """Return the message for text or a chat."""
    if isinstance(prompt, str):
        return service.TokenizeRequest(model=model, text=_text(prompt))
    return service.TokenizeRequest(model=model, chat=_chat(prompt))


def detokenize_request(token_ids: Iterable[int], model: str) -> service.DetokenizeRequest:
    """Return the message for token ids."""
    return service.DetokenizeRequest(model=model, token_ids=_token_ids("token_ids", token_ids))


_SAMPLING_NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
)


def _sampling(values: Mapping[str, object]) -> generation.SamplingParams:
    return _message(generation.SamplingParams, **{name: (name, values.get(name)) for name in _SAMPLING_NAMES})


def _stop_rules(values: Mapping[str, Any]) -> generation.StopRules:
    stop = values.get("stop", ())
    return _message(
        generation.StopRules,
        max_tokens=("max_tokens", values.get("max_tokens")),
        stop_strings=("stop", [stop] if isinstance(stop, str) else stop),
        stop_token_ids=("stop_token_ids", _token_ids("stop_token_ids", values.get("stop_token_ids", ()))),
        ignore_eos=("ignore_eos", values.get("ignore_eos", False)),
    )


def _message(message_class: type[M], **values: tuple[str, object]) -> M:
    """Return a message with those fields that have a value; the first of each pair is the option's name."""
    message = message_class()
    for field, (name, value) in values.items():
        if value is not None:
            _set(message, field, name, value)
    return message


def _set(message: Any, field: str, name: str, value: object) -> None:
    try:
        message.MergeFrom(type(message)(**{field: value}))
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name} cannot be {value!r}: {error}") from error


def _set_prompt(request: service.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = _text(prompt)
    elif _is_chat(prompt):
        request.chat.CopyFrom(_chat(prompt))
    else:
        request.token_ids.CopyFrom(generation.TokenIds(ids=_token_ids("prompt", prompt)))


def _text(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the prompt is not valid Unicode: {error.reason} at character {error.start}"
        ) from error
    return prompt


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], ChatMessage | Mapping)


def _chat(messages: Sequence[Any]) -> generation.ChatMessages:
    return generation.ChatMessages(messages=[_chat_message(message) for message in messages])


def _chat_message(message: object) -> generation.ChatMessage:
    if isinstance(message, ChatMessage):
        return generation.ChatMessage(role=message.role, content=message.content)
    if isinstance(message, Mapping) and message.keys() == {"role", "content"}:
        return _message(generation.ChatMessage, **{key: (f"{key} of a message", message[key]) for key in message})
    raise InvalidRequestError(f"a chat message needs a role and a content and nothing else, not {message!r}")


def _token_ids(name: str, token_ids: Iterable[Any]) -> list[int]:
    try:
        ids = [token_id.__index__() for token_id in token_ids]
    except (TypeError, AttributeError):
        raise InvalidRequestError(
            f"{name} must be whole numbers (token ids){' or text, or chat messages' if name == 'prompt' else ''}"
        ) from None
    for token_id in ids:
        if not 0 <= token_id < 2**32:
            raise InvalidRequestError(f"{name} names token id {token_id}; ids are between 0 and the vocabulary's size")
    return ids
