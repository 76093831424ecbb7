"""Tiny random checkpoints of every supported architecture, complete enough to be served.

Each has a byte-level tokenizer (one token per byte, then `<s>` and `</s>`), so any text is a prompt. Weights are random
but not small, so that greedy tokens differ from one position to the next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

BOS_ID, EOS_ID = 256, 257
VOCAB_SIZE = 258
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"

FileFormat = Literal["safetensors", "bin"]

_LLAMA_LIKE: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 6},  # a head count that is no power of two
    "gpt2": {"n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 512},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    },
    "llama": {**_LLAMA_LIKE, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_LLAMA_LIKE, "sliding_window": 7, "head_dim": 12},
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 5, "num_experts_per_tok": 2},
    "phi3": {**_LLAMA_LIKE, "sliding_window": 9, "partial_rotary_factor": 0.5},
    "qwen2": {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 12},
}
"""By architecture: the fields of config.json that are not the same for all."""


def make_checkpoint(
    folder: Path,
    architecture: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    file_format: FileFormat = "safetensors",
    num_shards: int = 1,
    dtype: torch.dtype = torch.float32,
    has_prefix: bool = True,
    seed: int = 0,
) -> Path:
    """Write a checkpoint and return `folder`. `has_prefix=False` leaves out the base model's name, as bloom's do."""
    special_ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": None}
    fields = {"vocab_size": VOCAB_SIZE, **special_ids, **CONFIGS[architecture], **(overrides or {})}
    config = CONFIG_MAPPING[architecture](**fields)
    model = AutoModelForCausalLM.from_config(config)
    _randomize(model, seed)
    model.to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if not has_prefix:
        tensors = {name.removeprefix(f"{model.base_model_prefix}."): value for name, value in tensors.items()}
    (folder / "model.safetensors").unlink()
    write_weights(folder, tensors, file_format=file_format, num_shards=num_shards)
    write_tokenizer(folder)
    return folder


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], *, file_format: FileFormat = "safetensors", num_shards: int = 1
) -> None:
    """Write tensors as one file, or as shards with an index, by the hub's naming rules."""
    stem = "model" if file_format == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    size = -(-len(names) // num_shards)
    weight_map = {}
    for shard in range(num_shards):
        part = f"-{shard + 1:05d}-of-{num_shards:05d}" if num_shards > 1 else ""
        file_name = f"{stem}{part}.{file_format}"
        chosen = {name: tensors[name].contiguous() for name in names[shard * size : (shard + 1) * size]}
        weight_map.update(dict.fromkeys(chosen, file_name))
        if file_format == "safetensors":
            save_file(chosen, folder / file_name, metadata={"format": "pt"})
        else:
            torch.save(chosen, folder / file_name)
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{file_format}.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, *, has_chat_template: bool = True) -> None:
    """Write a tokenizer of one token per byte, with a chat template."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    fields: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    if has_chat_template:
        fields["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def _byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter a spread that matters, norms and biases included; blocks outweigh a tied embedding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter += 0.2 * noise
            else:
                gain = 2.5 if "layers." in name or ".h." in name else 1.0
                parameter.copy_(noise * gain * parameter.shape[-1] ** -0.5)
