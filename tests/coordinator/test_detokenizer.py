"""Text that grows token by token equals the text decoded at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster.models
from coordinator.detokenizer import Detokenizer
from coordinator.tokenizer import Tokenizer
from tests.coordinator import tiny_tokenizers

BLOOM_TINY = Path(cluster.models.__path__[0]) / "bloom-tiny"
FAMILIES = ("bloom-tiny", "byte_level", "byte_fallback", "metaspace")
TEXT = st.text(st.sampled_from("the low  élç🎉👩‍👧日本語\n"), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    built = {"bloom-tiny": Tokenizer(BLOOM_TINY, 4096)}
    for family in FAMILIES[1:]:
        backend = getattr(tiny_tokenizers, family)()
        folder = tiny_tokenizers.save(backend, tmp_path_factory.mktemp(family))
        built[family] = Tokenizer(folder, backend.get_vocab_size())
    return built


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push([token_id]) for token_id in token_ids] + [detokenizer.flush()]


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of `text` as they follow a prompt: no special tokens before them."""
    return [token_id for token_id in tokenizer.encode(text, max_tokens=1000) if token_id > 3]


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None)
@given(text=TEXT, data=st.data())
def test_pieces_of_a_text_concatenate_to_it(
    tokenizers: dict[str, Tokenizer], family: str, text: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[family]
    token_ids = tokenizer.encode("x" + text, max_tokens=1000)
    cut = data.draw(st.integers(1, len(token_ids)))
    prompt_text = tokenizer.decode(token_ids[:cut]).rstrip("�")
    assert prompt_text + "".join(pieces(tokenizer, token_ids[:cut], token_ids[cut:])) == "x" + text


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None)
@given(text=TEXT)
def test_no_piece_ends_within_a_character(tokenizers: dict[str, Tokenizer], family: str, text: str) -> None:
    tokenizer = tokenizers[family]
    parts = pieces(tokenizer, [1], continuation(tokenizer, text))
    assert not any("�" in part for part in parts)
    assert parts[-1] == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_replacement_character_that_the_model_writes_is_text(tokenizers: dict[str, Tokenizer], family: str) -> None:
    tokenizer = tokenizers[family]
    prompt, text = tokenizer.encode("x", max_tokens=10), "�é��" + "�" * 9 + "日�"
    assert (
        "".join(pieces(tokenizer, prompt, continuation(tokenizer, "x" + text)[len(continuation(tokenizer, "x")) :]))
        == text
    )


@pytest.mark.parametrize("family", ["bloom-tiny", "byte_level"])
@settings(deadline=None, max_examples=300)
@given(seeds=st.lists(st.integers(0, 10**6), max_size=60), data=st.data())
def test_any_tokens_give_the_text_decoded_at_once(
    tokenizers: dict[str, Tokenizer], family: str, seeds: list[int], data: st.DataObject
) -> None:
    tokenizer = tokenizers[family]
    vocab_size = data.draw(st.sampled_from([270, 4096 if family == "bloom-tiny" else 400]))
    token_ids = [seed % vocab_size for seed in seeds]
    prompt = tokenizer.encode("x", max_tokens=10)
    expected = tokenizer.decode([*prompt, *token_ids]).removeprefix("x")
    assert "".join(pieces(tokenizer, prompt, token_ids)) == expected


@pytest.mark.parametrize("family", ["byte_fallback", "metaspace"])
def test_leading_space_stays_after_a_prompt_and_goes_where_a_text_begins(
    tokenizers: dict[str, Tokenizer], family: str
) -> None:
    tokenizer = tokenizers[family]
    bos, *words = tokenizer.encode("the", max_tokens=10)
    assert "".join(pieces(tokenizer, [bos, *words], words)) == " the"
    assert "".join(pieces(tokenizer, [bos], words)) == "the"


@pytest.mark.parametrize("family", FAMILIES)
def test_character_that_the_prompt_begins_belongs_to_the_completion(
    tokenizers: dict[str, Tokenizer], family: str
) -> None:
    tokenizer = tokenizers[family]
    token_ids = tokenizer.encode("the 日🎊", max_tokens=100)
    assert tokenizer.decode(token_ids[:-1]).endswith("�")
    assert "".join(pieces(tokenizer, token_ids[:-1], token_ids[-1:])).endswith("🎊")


def test_special_tokens_are_no_text_and_do_not_part_a_character(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    first, *rest = continuation(tokenizer, "ß")
    assert rest
    assert pieces(tokenizer, [0], [first, 1, *rest]) == ["", "", "ß", ""]


def test_incomplete_character_comes_out_at_the_end(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    assert pieces(tokenizer, [0], continuation(tokenizer, "ß")[:1]) == ["", "�"]


@pytest.mark.parametrize("family", FAMILIES)
def test_endless_invalid_bytes_are_let_go(tokenizers: dict[str, Tokenizer], family: str) -> None:
    tokenizer = tokenizers[family]
    last_byte = continuation(tokenizer, "ß")[-1]
    detokenizer = Detokenizer(tokenizer, [0])
    texts = [detokenizer.push([last_byte]) for _ in range(100)]
    assert len("".join(texts)) > 85
    assert max(map(len, texts)) <= 9


def test_work_per_token_does_not_grow_with_the_text(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["bloom-tiny"]
    token_ids = tokenizer.encode("The state of the Union is strong. 日本語 " * 50, max_tokens=10_000)
    detokenizer = Detokenizer(tokenizer, token_ids)
    longest = 0

    class Counting:
        special_token_ids = tokenizer.special_token_ids

        def decode(self, ids: Sequence[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids)

    monkeypatch.setattr(detokenizer, "_tokenizer", Counting())
    detokenizer.push(token_ids)
    assert longest < 25
