"""What a client sees of its request: tokens become text, events become messages in a queue.

Covers one request's output side; the scheduler knows nothing of text, and this knows nothing of pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.errors import SpanwiseError
from cluster.request import FinishReason, TokenizedRequest, TokenLogprobs
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.wire.generation import finish_reason_to_proto, logprobs_to_proto, sampling_to_proto
from coordinator.detokenizer import Detokenizer
from coordinator.stop_strings import StopStrings
from coordinator.tokenizer import Tokenizer


class CompletionText:
    """Turns one completion's token ids into text, ending it at a stop string."""

    def __init__(self, tokenizer: Tokenizer, request: TokenizedRequest) -> None:
        self._detokenizer = Detokenizer(tokenizer, request.prompt_token_ids)
        self._stop_strings = StopStrings(request.stop.stop_strings)
        self.num_tokens = 0
        self.matched: str | None = None

    def push(self, token_ids: Sequence[int], *, is_last: bool) -> str:
        """Return the text that is certain now. Sets `matched` when a stop string was found; nothing follows it."""
        text = self._detokenizer.push(token_ids)
        if is_last:
            text += self._detokenizer.flush()
        text = self._stop_strings.push(text)
        self.matched = self._stop_strings.matched
        if is_last and self.matched is None:
            text += self._stop_strings.flush()
        return text


class RequestStream:
    """The queue of messages that a request's Generate call sends, Accepted first and Finished or an error last."""

    def __init__(self, request: TokenizedRequest, tokenizer: Tokenizer) -> None:
        self.request = request
        self.is_ended = False
        self.rejection: SpanwiseError | None = None
        self._tokenizer = tokenizer
        self._texts = [CompletionText(tokenizer, request) for _ in range(request.num_completions)]
        self._is_done = [False] * request.num_completions
        self._queue: asyncio.Queue[service.GenerateResponse | SpanwiseError] = asyncio.Queue()

    async def next(self) -> service.GenerateResponse:
        """Return the next message; raises the SpanwiseError that ended the request."""
        item = await self._queue.get()
        if isinstance(item, SpanwiseError):
            raise item
        return item

    @property
    def num_completion_tokens(self) -> int:
        """Tokens produced so far, over all completions."""
        return sum(text.num_tokens for text in self._texts)

    def accept(self) -> None:
        """Send what was accepted, and the prompt's echo if nothing about it must be computed first."""
        request = self.request
        accepted = generation.Accepted(
            request_id=request.request_id,
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=sampling_to_proto(request.sampling),
            max_tokens=request.stop.max_tokens,
        )
        self._put(accepted=accepted)
        if request.echo and request.sampling.num_prompt_logprobs is None:
            self.echo(())

    def echo(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Send the prompt, with log probabilities if they were asked for."""
        token_ids = self.request.prompt_token_ids
        text = self._tokenizer.decode(token_ids) if self.request.echo else ""
        self._put(
            prompt_echo=generation.PromptEcho(
                text=text, token_ids=token_ids, logprobs=[logprobs_to_proto(entry) for entry in logprobs]
            )
        )

    def progress(self, progress: generation.Progress) -> None:
        """Send a change of phase."""
        self._put(progress=progress)

    def push(
        self,
        completion: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        *,
        num_rendered: int,
        reason: FinishReason | None,
    ) -> bool:
        """Send tokens of a completion, of which the first `num_rendered` are text (a stop token is none).

        Returns whether a stop string was found, which finishes the completion here and now.
        """
        if self._is_done[completion]:
            return False
        text = self._texts[completion]
        piece_text = text.push(token_ids[:num_rendered], is_last=reason is not None)
        text.num_tokens += len(token_ids)
        if piece_text or token_ids:
            self._put(
                piece=generation.Piece(
                    completion_index=completion,
                    text=piece_text,
                    token_ids=token_ids,
                    logprobs=[logprobs_to_proto(entry) for entry in logprobs],
                )
            )
        if text.matched is not None:
            self.finish_completion(completion, FinishReason.STOP)
        elif reason is not None:
            self.finish_completion(completion, reason)
        return text.matched is not None

    def finish_completion(self, completion: int, reason: FinishReason) -> None:
        """Send why a completion ended; later calls for it do nothing."""
        if self._is_done[completion]:
            return
        self._is_done[completion] = True
        text = self._texts[completion]
        self._put(
            completion_finished=generation.CompletionFinished(
                completion_index=completion,
                reason=finish_reason_to_proto(reason),
                stop_string=text.matched or "",
                num_tokens=text.num_tokens,
            )
        )

    def finish(self, finished: generation.Finished) -> None:
        """Send the last message."""
        self.is_ended = True
        self._put(finished=finished)

    def reject(self, error: SpanwiseError) -> None:
        """Note that the scheduler did not take the request; the call that submitted it raises the error."""
        self.is_ended = True
        self.rejection = error

    def fail(self, error: SpanwiseError) -> None:
        """End the stream with an error."""
        self.is_ended = True
        self._queue.put_nowait(error)

    def _put(self, **event: object) -> None:
        self._queue.put_nowait(service.GenerateResponse(**event))  # type: ignore[arg-type]
