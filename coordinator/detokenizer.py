"""A completion's text, token by token, never ending within a character.

Pieces concatenate to what the completion adds to the prompt's text when both are decoded at once; a character that the
prompt leaves incomplete belongs to the completion. Only a few tokens at the end are
decoded again and again, so the cost per token is constant. A token's text depends on what stands before it (a leading
space is dropped where a text begins), so decoding starts at tokens whose text is out already.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.tokenizer import Tokenizer

_MIN_CONTEXT_TOKENS, _MAX_CONTEXT_TOKENS = 4, 64
_MAX_HELD_TOKENS = 8
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an incomplete or invalid character decodes to


class Detokenizer:
    """The text of one completion."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = _last_words(tokenizer, prompt_token_ids)
        self._context_text = tokenizer.decode(self._context).rstrip(_REPLACEMENT)
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain after these tokens. A character is held back until it is complete."""
        return "".join(self._push_one(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """Return what is held back, once no more tokens come: an incomplete character becomes U+FFFD."""
        return self._release(len(self._held))

    def _push_one(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_token_ids:
            return ""
        self._held.append(token_id)
        if not self._text(len(self._held)).endswith(_REPLACEMENT):
            return self._release(len(self._held))
        return self._release(self._num_certain()) if len(self._held) > _MAX_HELD_TOKENS else ""

    def _num_certain(self) -> int:
        """Return how many held tokens can go although the text still ends in U+FFFD.

        A character has at most four bytes, so this many tokens hold bytes that are no character. Cutting is right where
        the parts decode to the same as the whole; the last three tokens stay, as they may yet become a character.
        """
        whole = self._text(len(self._held))
        after = self._tokenizer.decode(self._held)
        for count in range(len(self._held) - 3, 0, -1):
            front = self._tokenizer.decode(self._held[:count])
            if self._text(count) + after[len(front) :] == whole:
                return count
        return len(self._held)

    def _text(self, count: int) -> str:
        """Return the text of the first `count` held tokens."""
        return self._tokenizer.decode(self._context + self._held[:count])[len(self._context_text) :]

    def _release(self, count: int) -> str:
        if count == 0:
            return ""
        text = self._text(count)
        self._context = _last_words(self._tokenizer, self._context + self._held[:count])
        self._context_text = self._tokenizer.decode(self._context)
        self._held = self._held[count:]
        return text


def _last_words(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """Return the last tokens that are text, enough of them to hold at least one whole character."""
    tail = token_ids[-_MAX_CONTEXT_TOKENS:]
    words = [token_id for token_id in tail if token_id not in tokenizer.special_token_ids]
    for start in range(len(words) - _MIN_CONTEXT_TOKENS, 0, -1):
        if tokenizer.decode(words[start:]).strip(_REPLACEMENT):
            return words[start:]
    return words
