"""Text to token ids and back, by the model's own tokenizer and chat template.

Covers tokenizers that come as (or convert to) a `tokenizer.json`; code from a checkpoint is never run. Text that grows
token by token is `coordinator.detokenizer`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from cluster.errors import ConfigurationError, InvalidRequestError

CHARACTERS_PER_TOKEN = 32
"""A text longer than this many characters per token of the context is refused unread."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


class Tokenizer:
    """The tokenizer of one model. Safe to use from several threads."""

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        """`folder` holds the tokenizer's files and config.json; `vocab_size` is the model's.

        Raises ConfigurationError when files are missing, damaged, or another model's.
        """
        self._folder, self._vocab_size = Path(folder), vocab_size
        self._tokenizer = _load(self._folder)
        self._backend = self._tokenizer.backend_tokenizer
        num_words = self._backend.get_vocab_size(with_added_tokens=False)
        if num_words > vocab_size:
            raise ConfigurationError(
                f"the tokenizer in {folder} has {num_words} tokens, but the model's vocabulary only {vocab_size}: "
                "they do not belong together"
            )
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        """Tokens that are no text, such as the end of a sequence."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the model knows how a chat is written down."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, max_tokens: int) -> list[int]:
        """Return token ids of a prompt, with the special tokens that the model's own tokenizer adds.

        Raises InvalidRequestError for a text that cannot fit `max_tokens`, quickly, whatever its size; for a shorter
        one it may still return more than `max_tokens`.
        """
        _check_length(len(text), max_tokens)
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[tuple[str, str]], *, max_tokens: int) -> tuple[list[int], str]:
        """Return the token ids and the text that the chat template makes of (role, content) messages.

        The text ends where the assistant's answer begins; special tokens are only those that the template writes.
        Raises InvalidRequestError when there is no template, or when it refuses the messages.
        """
        _check_length(sum(len(content) for _, content in messages), max_tokens)
        text = self._render(messages)
        return self._encode(text, add_special_tokens=False), text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens. Incomplete characters become U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        token_ids: list[int] = self._tokenizer(
            text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]
        for token_id in token_ids:
            if token_id >= self._vocab_size:
                raise InvalidRequestError(
                    f"the prompt holds {self._backend.id_to_token(token_id)!r}, token id {token_id}, which the model's "
                    f"vocabulary of {self._vocab_size} does not have"
                )
        return token_ids

    def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        if not messages:
            raise InvalidRequestError("a chat needs at least one message")
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template: it continues text rather than answers; use generate with a prompt, "
                "or serve a model made for chats (often named -instruct, -chat or -it)",
                reason="NO_CHAT_TEMPLATE",
            )
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}") from error
        return text


def _check_length(num_characters: int, max_tokens: int) -> None:
    if num_characters > CHARACTERS_PER_TOKEN * max_tokens:
        raise InvalidRequestError(
            f"the prompt has {num_characters} characters, too many for a context of {max_tokens} tokens: shorten it, "
            "or serve the model with a larger --max-context if it allows one"
        )


def _load(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigurationError(
            f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there; copy the model's tokenizer "
            "files into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise nearly anything on a damaged file
        raise ConfigurationError(f"cannot load the tokenizer in {folder}: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(
            f"the tokenizer in {folder} has no fast form ({type(tokenizer).__name__}): add its tokenizer.json"
        )
    return tokenizer
