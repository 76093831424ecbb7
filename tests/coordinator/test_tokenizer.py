"""The model's tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

import cluster.models
from cluster.errors import ConfigurationError, InvalidRequestError
from coordinator.tokenizer import CHARACTERS_PER_TOKEN, Tokenizer
from tests.coordinator import tiny_tokenizers

BLOOM_TINY = Path(cluster.models.__path__[0]) / "bloom-tiny"


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> Tokenizer:
    chat_template = tiny_tokenizers.CHAT_TEMPLATE
    return Tokenizer(tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path, chat_template=chat_template), 400)


def test_token_ids_are_those_of_transformers() -> None:
    reference = transformers.AutoTokenizer.from_pretrained(BLOOM_TINY)
    tokenizer = Tokenizer(BLOOM_TINY, 4096)
    for text in ("The state of the Union", "", " élève 🎉\n日本語"):
        token_ids = tokenizer.encode(text, max_tokens=100)
        assert token_ids == reference(text)["input_ids"]
        assert tokenizer.decode(token_ids) == text


def test_prompt_gets_the_special_tokens_of_the_model(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path), 400)
    assert tokenizer.encode("the fox", max_tokens=10)[0] == 0
    assert tokenizer.decode(tokenizer.encode("the fox", max_tokens=10)) == "the fox"


def test_chat_is_rendered_with_one_bos_and_an_opening_for_the_answer(chat_tokenizer: Tokenizer) -> None:
    token_ids, text = chat_tokenizer.encode_chat([("user", "the fox")], max_tokens=100)
    assert text == "<s>[user]the fox[assistant]"
    assert token_ids.count(0) == 1
    assert chat_tokenizer.decode(token_ids) == text.removeprefix("<s>")


def test_chat_ids_are_those_of_transformers(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "élève"}, {"role": "assistant", "content": "🎉"}]
    expected = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    messages = [(message["role"], message["content"]) for message in chat]
    assert chat_tokenizer.encode_chat(messages, max_tokens=100)[0] == expected


def test_model_without_chat_template_says_what_to_do_instead() -> None:
    tokenizer = Tokenizer(BLOOM_TINY, 4096)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match=r"no chat template.*use generate"):
        tokenizer.encode_chat([("user", "hello")], max_tokens=100)


def test_chat_that_the_template_refuses_is_an_invalid_request(chat_tokenizer: Tokenizer) -> None:
    assert chat_tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no tools here"):
        chat_tokenizer.encode_chat([("tool", "hello")], max_tokens=100)


def test_chat_without_messages_is_an_invalid_request(chat_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="at least one message"):
        chat_tokenizer.encode_chat([], max_tokens=100)


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    chat_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_tokenizer, "_tokenizer", None)
    text = "a" * (CHARACTERS_PER_TOKEN * 10 + 1)
    with pytest.raises(InvalidRequestError, match="321 characters"):
        chat_tokenizer.encode(text, max_tokens=10)
    with pytest.raises(InvalidRequestError, match="321 characters"):
        chat_tokenizer.encode_chat([("user", text)], max_tokens=10)


def test_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    shutil.copy(BLOOM_TINY / "config.json", tmp_path)
    with pytest.raises(ConfigurationError, match=rf"{tmp_path} has no tokenizer: none of tokenizer.json"):
        Tokenizer(tmp_path, 4096)


def test_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((BLOOM_TINY / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(ConfigurationError, match=rf"cannot load the tokenizer in {tmp_path}"):
        Tokenizer(tmp_path, 4096)


def test_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="4096 tokens, but the model's vocabulary only 4000"):
        Tokenizer(BLOOM_TINY, 4000)


def test_added_token_beyond_the_vocabulary_is_refused_where_it_is_used(tmp_path: Path) -> None:
    backend = tiny_tokenizers.byte_level()
    backend.add_tokens(["<extra>"])
    tokenizer = Tokenizer(tiny_tokenizers.save(backend, tmp_path), backend.get_vocab_size(with_added_tokens=False))
    assert tokenizer.encode("the fox", max_tokens=10)
    with pytest.raises(InvalidRequestError, match="'<extra>'"):
        tokenizer.encode("the <extra>", max_tokens=10)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    trap = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match="cannot load the tokenizer"):
        Tokenizer(tmp_path, 400)
    assert not trap.exists()
