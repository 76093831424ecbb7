"""Random checkpoints in published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

import make_checkpoint


@pytest.mark.parametrize(
    ("shape", "num_parameters"),
    [("tinyllama-1.1b", 1_100_048_384), ("bloom-560m", 559_214_592), ("bloom-7b1", 7_069_016_064)],
)
def test_shape_has_the_published_number_of_parameters(shape: str, num_parameters: int) -> None:
    shapes = make_checkpoint.tensor_shapes(make_checkpoint.make_config(shape, None))
    assert sum(size.numel() for size in shapes.values()) == num_parameters


def test_shards_hold_every_tensor_once_and_stay_under_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 40)
    shapes = {name: torch.Size([5]) for name in "abcd"} | {"large": torch.Size([99])}
    assert list(make_checkpoint.shards(shapes, torch.float32)) == [["a", "b"], ["c", "d"], ["large"]]


def test_weights_and_index_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 64)
    shapes = {"a.weight": torch.Size([4, 4]), "a.bias": torch.Size([4]), "norm.weight": torch.Size([4])}
    make_checkpoint.write_weights(tmp_path, shapes, torch.bfloat16, seed=0)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 48
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as shard:
            assert shard.get_tensor(name).shape == shapes[name]


def test_tokenizer_reads_any_text_and_knows_every_id(tmp_path: Path) -> None:
    make_checkpoint.write_tokenizer(tmp_path, vocab_size=1000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界")) == "Grüße, 世界"
    assert len(tokenizer) == 1000
    assert tokenizer.decode([999]) == " w999"
