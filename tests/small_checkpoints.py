"""Checkpoint folders of a few kilobytes, in every layout: what matters is their files, not what the tensors compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cluster.load_order import LoadOrder, StoreOptions
from cluster.model_spec import ModelSpec, Precision
from cluster.span import Span
from worker.conversion import Conversion, conversion_order

CONFIG: Mapping[str, Any] = {
    "model_type": "bloom",
    "n_layer": 4,
    "hidden_size": 8,
    "vocab_size": 16,
    "seq_length": 64,
    "eos_token_id": 2,
}
Shards = Mapping[str, Mapping[str, torch.Tensor]]


def tensors_of_blocks(num_blocks: int = 4) -> dict[str, torch.Tensor]:
    """Return an embedding and two tensors per block, all different; their types and shapes vary."""
    generator = torch.Generator().manual_seed(7)
    tensors = {"wte": torch.randn(16, 8, generator=generator)}
    for block in range(num_blocks):
        tensors[f"h.{block}.weight"] = torch.randn(8, 8, generator=generator).to(torch.bfloat16)
        tensors[f"h.{block}.bias"] = torch.randn(5, generator=generator)
    return tensors


def shards_of_blocks(num_blocks: int = 4, suffix: str = "safetensors") -> dict[str, dict[str, torch.Tensor]]:
    """Return the same tensors, two blocks per shard, the embedding in the first."""
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors_of_blocks(num_blocks).items():
        number = int(name.split(".")[1]) // 2 if name.startswith("h.") else 0
        shards.setdefault(f"part-{number}.{suffix}", {})[name] = tensor
    return shards


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one weight file, in the format that its name says."""
    if path.suffix == ".safetensors":
        save_file(dict(tensors), path)
    else:
        torch.save(dict(tensors), path)


def write_single(folder: Path, name: str = "model.safetensors") -> Path:
    """Write a complete checkpoint with one weight file."""
    write_rest(folder)
    write_tensors(folder / name, tensors_of_blocks())
    return folder


def write_sharded(folder: Path, suffix: str = "safetensors") -> Path:
    """Write a complete checkpoint whose weights are in two shards, part-0 and part-1, with an index."""
    write_rest(folder)
    shards = shards_of_blocks(suffix=suffix)
    for name, tensors in shards.items():
        write_tensors(folder / name, tensors)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = "model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_rest(folder: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    """Write what a checkpoint has besides weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Set values of config.json; None removes a key."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def truncate(path: Path, num_bytes: int = 20) -> None:
    """Cut bytes off a file's end."""
    path.write_bytes(path.read_bytes()[:-num_bytes])


def order_for(spec: ModelSpec, *, checkpoint_service: str = "", token: str = "") -> LoadOrder:
    """Return the order to load the whole of a model."""
    whole = Span(0, spec.num_blocks)
    order = conversion_order(Conversion(spec, Precision.FP32, whole, StoreOptions(), token=token))
    return replace(order, checkpoint_service=checkpoint_service, num_pages=1, page_size=64, max_context=64)
