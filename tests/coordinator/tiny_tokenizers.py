"""Tokenizers small enough to build inside a test, one per family that checkpoints use."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "  deux espaces, élève à l'école, garçon",
    "日本語のテキストと絵文字 🎉🎊 👩‍👩‍👧 смешанный текст",
) * 3
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def save(tokenizer: Tokenizer, folder: Path, *, chat_template: str | None = None) -> Path:
    """Write a tokenizer as a checkpoint folder holds it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat_template:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_level() -> Tokenizer:
    """As GPT-2, BLOOM, Llama 3 and Qwen: tokens are bytes and merges of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    _prepend_bos(tokenizer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral and Phi 3: tokens are characters and merges of them; others fall back to bytes."""
    tokenizer = Tokenizer(_fallback_model())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_specials(tokenizer)
    return tokenizer


def metaspace() -> Tokenizer:
    """As newer SentencePiece conversions: the same vocabulary behind a Metaspace pre-tokenizer and decoder."""
    tokenizer = Tokenizer(_fallback_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)]
    )
    _add_specials(tokenizer)
    return tokenizer


def _fallback_model() -> models.BPE:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for text in CORPUS[:2] for letter in text.replace(" ", "▁")})
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("o", "w"), ("▁", "l")]
    words += [*letters, *(left + right for left, right in merges)]
    vocab = {word: token_id for token_id, word in enumerate(dict.fromkeys(words))}
    return models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")


def _add_specials(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ("<unk>", "<s>", "</s>")])
    _prepend_bos(tokenizer)


def _prepend_bos(tokenizer: Tokenizer) -> None:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
