"""Make a checkpoint with random weights in the shape of a published model, with a tokenizer: nothing is downloaded.

    python benchmarks/make_checkpoint.py tinyllama-1.1b /tmp/tinyllama --dtype bf16
    python benchmarks/make_checkpoint.py llama-3-8b /tmp/llama --blocks 4

Speed and memory depend on shapes, not on what the weights say, so such a checkpoint serves for measuring. Shards are
written one after the other; no more than one of them is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from command_line import Parser, run_script

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 1024**3
WEIGHT_STD = 0.02

LLAMA = {"tie_word_embeddings": False, "attention_bias": False}
SHAPES: dict[str, dict[str, Any]] = {
    "bloom-560m": {"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
    "bloom-1b1": {"model_type": "bloom", "hidden_size": 1536, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
    "bloom-7b1": {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    "bloom-176b": {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880},
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "tinyllama-1.1b": {
        **LLAMA,
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "llama-3-8b": {
        **LLAMA,
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama-3-70b": {
        **LLAMA,
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
}
"""Published shapes: the fields of config.json that decide them."""


def make_config(shape: str, num_blocks: int | None) -> PretrainedConfig:
    """Return the configuration of a published shape, cut to `num_blocks` blocks."""
    fields = dict(SHAPES[shape])
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    if num_blocks is not None:
        config.num_hidden_layers = num_blocks
    return config


def tensor_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor that the checkpoint holds; a tied head is left out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def shards(shapes: dict[str, torch.Size], dtype: torch.dtype) -> Iterator[list[str]]:
    """Yield the tensors of each shard, by name, in order."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + shape.numel() * dtype.itemsize > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += shape.numel() * dtype.itemsize
    yield names


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return what an untrained model would hold there: matrices are Gaussian, norms are ones, biases zeros."""
    if len(shape) > 1:
        return torch.empty(shape, dtype=dtype).normal_(0.0, WEIGHT_STD, generator=generator)
    return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)


def write_weights(folder: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, seed: int) -> None:
    """Write the shards and their index."""
    generator = torch.Generator().manual_seed(seed)
    plan = list(shards(shapes, dtype))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        file = f"model-{number:05}-of-{len(plan):05}.safetensors"
        tensors = {name: random_tensor(name, shapes[name], dtype, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        print(f"{file}: {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.0f} MB")
    size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer that knows every id of the vocabulary: special tokens, all bytes, then made-up words."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġw{number}" for number in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: token_id for token_id, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES), help="a published one")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of weights")
    parser.add_argument("--blocks", type=int, help="keep only so many blocks")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args()

    config = make_config(arguments.shape, arguments.blocks)
    config.dtype = DTYPES[arguments.dtype]
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(arguments.folder)
    write_tokenizer(arguments.folder, config.vocab_size)
    write_weights(arguments.folder, tensor_shapes(config), config.dtype, arguments.seed)


if __name__ == "__main__":
    run_script(main)
