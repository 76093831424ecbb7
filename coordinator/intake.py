"""From a client's protobuf request to a TokenizedRequest: prompt, defaults, checks that need no pool or queue.

Runs in a thread: tokenizing a long prompt takes a while. What depends on load is the scheduler's.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable

from cluster.errors import InvalidRequestError, NotFoundError
from cluster.model_spec import ModelSpec
from cluster.request import RequestId, SamplingParams, StopRules, TokenizedRequest
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service
from coordinator.defaults import complete_sampling
from coordinator.stop_strings import validate_stop_strings
from coordinator.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256
MAX_REQUEST_ID_LENGTH = 128
MAX_COMPLETIONS = 128


class Intake:
    """Reads requests for one model."""

    def __init__(
        self, spec: ModelSpec, tokenizer: Tokenizer, *, max_context: int, draw_seed: Callable[[], int]
    ) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self.max_context = max_context  # lowered where memory turns out to allow less
        self._draw_seed = draw_seed

    def read(self, request: service.GenerateRequest) -> TokenizedRequest:
        """Return the request with token ids and all defaults filled in. Raises InvalidRequestError, NotFoundError."""
        self._check_model(request.model)
        if request.resume_offset:
            raise InvalidRequestError("resume_offset is reserved and must be 0: this server cannot resume a stream")
        if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
            raise InvalidRequestError(f"request_id is longer than {MAX_REQUEST_ID_LENGTH} characters")
        if request.num_completions > MAX_COMPLETIONS:
            raise InvalidRequestError(
                f"num_completions must be at most {MAX_COMPLETIONS}, not {request.num_completions}"
            )
        prompt = self._prompt(request)
        return TokenizedRequest(
            request_id=RequestId(request.request_id or uuid.uuid4().hex),
            prompt_token_ids=prompt,
            sampling=self._sampling(request),
            stop=self._stop(request.stop, len(prompt)),
            num_completions=max(1, request.num_completions),
            echo=request.echo,
        )

    def tokenize(self, request: service.TokenizeRequest) -> tuple[tuple[int, ...], str]:
        """Return token ids and the text that they stand for (a chat's is the rendered template)."""
        self._check_model(request.model)
        if request.WhichOneof("prompt") == "chat":
            return self._chat(request.chat)
        return self._text(request.text), request.text

    def detokenize(self, request: service.DetokenizeRequest) -> str:
        """Return the text of token ids."""
        self._check_model(request.model)
        self._check_token_ids(request.token_ids)
        return self._tokenizer.decode(request.token_ids)

    def _check_model(self, name: str) -> None:
        if name and name != self._spec.name:
            raise NotFoundError(f"there is no model {name!r} here; this server serves {self._spec.name!r}")

    def _prompt(self, request: service.GenerateRequest) -> tuple[int, ...]:
        kind = request.WhichOneof("prompt")
        if kind == "token_ids":
            self._check_token_ids(request.token_ids.ids)
            return tuple(request.token_ids.ids)
        if kind == "chat":
            return self._chat(request.chat)[0]
        if kind == "text":
            return self._text(request.text)
        raise InvalidRequestError("the request has no prompt: set text, token_ids or chat")

    def _text(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, max_tokens=self.max_context))

    def _chat(self, chat: generation.ChatMessages) -> tuple[tuple[int, ...], str]:
        messages = [(message.role, message.content) for message in chat.messages]
        token_ids, text = self._tokenizer.encode_chat(messages, max_tokens=self.max_context)
        return tuple(token_ids), text

    def _check_token_ids(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if token_id >= self._spec.vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary, which has {self._spec.vocab_size} entries"
                )

    def _sampling(self, request: service.GenerateRequest) -> SamplingParams:
        params = complete_sampling(
            request.sampling,
            request.logprobs,
            generation_config=self._spec.generation_config,
            draw_seed=self._draw_seed,
        )
        params.validate(self._spec.vocab_size)
        return params

    def _stop(self, stop: generation.StopRules, prompt_length: int) -> StopRules:
        room = max(1, self.max_context - prompt_length)
        max_tokens = stop.max_tokens if stop.HasField("max_tokens") else min(DEFAULT_MAX_TOKENS, room)
        validate_stop_strings(stop.stop_strings)
        return StopRules(max_tokens, tuple(stop.stop_strings), frozenset(stop.stop_token_ids), stop.ignore_eos)
