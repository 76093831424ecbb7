"""Attention modules with rotary embeddings compute what transformers' own do, with the kernels and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partly

from cluster.microbatch import PageDelta
from cluster.request import SequenceId
from tests.checkpoints import CONFIGS
from tests.worker.test_attention import Chunk, step
from worker.architectures import open_architecture
from worker.attention import rotate
from worker.blocks import StepContext
from worker.kv_cache import KVCache
from worker.native import attention as native

FAMILIES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "gpt_neox"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_gives_the_bits_of_transformers(dtype: torch.dtype) -> None:
    query, key = torch.randn(5, 4, 16, dtype=dtype), torch.randn(5, 2, 16, dtype=dtype)
    angles = torch.randn(1, 5, 16)
    for apply, dim in ((apply_rotary_pos_emb, 16), (apply_partly, 8)):
        rotary = (angles[..., :dim].cos().to(dtype), angles[..., :dim].sin().to(dtype))
        expected = apply(query.transpose(0, 1)[None], key.transpose(0, 1)[None], *rotary)
        for rows, turned in zip((query, key), expected, strict=True):
            assert torch.equal(rotate(rows, rotary), turned[0].transpose(0, 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_kernels", [True, False])
def test_attention_is_that_of_transformers(family: str, has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_kernels:
        monkeypatch.setattr(native, "kernels", lambda: None)
    config = {"model_type": family, **CONFIGS[family]}
    architecture = open_architecture(config)
    torch.manual_seed(0)
    original = _attention(architecture.block_class(architecture.config, 1))
    block: Any = nn.Module()
    setattr(block, "attention" if family == "gpt_neox" else "self_attn", original)
    if family == "mixtral":
        block.mlp = None
    architecture.adapt_block(block)
    replaced = _attention(block)
    assert replaced is not original
    assert [*replaced.state_dict()] == [*original.state_dict()]
    hidden = torch.randn(1, 20, architecture.hidden_size)
    table = architecture.rotary_table(20, torch.float32, "cpu")
    assert table is not None
    with torch.no_grad():
        expected = _eager(original, hidden, table, replaced.window)
        out = _in_steps(replaced, hidden, table, [13, 1, 5, 1])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def _attention(block: Any) -> Any:
    return block.attention if hasattr(block, "attention") else block.self_attn


def _eager(original: Any, hidden: Tensor, table: tuple[Tensor, Tensor], window: int | None) -> Tensor:
    """Compute with transformers' module and an explicit mask."""
    original.config = CONFIG_MAPPING[original.config.model_type].from_dict(original.config.to_dict())
    original.config._attn_implementation = "eager"
    distance = torch.arange(20).unsqueeze(1) - torch.arange(20)
    hidden_pairs = (distance < 0) | (distance >= (window or 20))
    mask = torch.zeros(1, 1, 20, 20).masked_fill(hidden_pairs, -torch.inf)
    rotary = (table[0][None], table[1][None])
    out: Tensor = original.eval()(hidden, position_embeddings=rotary, attention_mask=mask)[0]
    return out


def _in_steps(module: Any, hidden: Tensor, table: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
    """Compute a sequence in steps, over a cache."""
    cache = KVCache([module.project(hidden)[1].shape[1]], [module.head_dim], 2, 64, torch.float32, "cpu")
    cache.apply(step([], [PageDelta(SequenceId(0), 0, (1,))]))
    outs, start = [], 0
    for length in lengths:
        stop = start + length
        rotary = (table[0][None, start:stop], table[1][None, start:stop])
        context = StepContext(cache, cache.layout(step([Chunk(0, start, length)])), module.block, rotary, False)
        outs.append(module(hidden[:, start:stop], position_embeddings=rotary, attention_mask=None, step=context)[0])
        start = stop
    return torch.cat(outs, dim=1)
