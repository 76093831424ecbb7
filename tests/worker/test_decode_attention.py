"""Which single tokens attend together where there is no kernel, and that it changes nothing."""

from __future__ import annotations

import pytest
import torch

from tests.worker.test_attention import TORCH, Chunk, Model, cut_into, new_cache, projections, reference, run, step
from worker import decode_attention
from worker.decode_attention import DecodePlan, DecodePlans
from worker.kv_cache import AttentionLayout, KVCache

LENGTHS = (150, 1, 64, 65, 97)
MODELS = [Model(), Model(8, 1, 32, window=70), Model(4, 4, 16, is_alibi=True), Model(window=33, is_alibi=True)]


def tables() -> dict[int, tuple[int, ...]]:
    """Scattered pages, three per sequence."""
    return {i: (i, 15 - i, 5 + i) for i in range(len(LENGTHS))}


def plan(model: Model, cache: KVCache, layout: AttentionLayout) -> DecodePlan:
    return DecodePlans().grouped(layout, cache.keys[0], model.window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", MODELS)
def test_tokens_of_unequal_sequences_attend_together(model: Model, dtype: torch.dtype) -> None:
    sequences = {i: projections(model, length, seed=i) for i, length in enumerate(LENGTHS)}
    cache = new_cache(model, dtype)
    prompts = [chunks for i, length in enumerate(LENGTHS) if length > 1 for chunks in cut_into([length - 1], i)]
    run(model, cache, sequences, tables(), prompts, way=TORCH)
    decodes = [Chunk(i, length - 1, 1) for i, length in enumerate(LENGTHS)]
    divided = plan(model, cache, cache.layout(step(decodes)))
    assert divided.groups
    assert divided.others == ()
    out = run(model, cache, sequences, {}, [decodes], way=TORCH)
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    for i, sequence in sequences.items():
        torch.testing.assert_close(out[i], reference(model, sequence)[-1:], rtol=tolerance, atol=tolerance)


def test_a_token_without_company_and_long_contexts_are_left_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    cache = new_cache(model)
    run(model, cache, {}, tables(), [])
    alone = cache.layout(step([Chunk(0, 99, 1), Chunk(1, 0, 50)]))
    assert plan(model, cache, alone).others == alone.slices
    monkeypatch.setattr(decode_attention, "MAX_SEQUENCE_BYTES", 64 * 2 * 2 * 16 * 4)
    mixed = cache.layout(step([Chunk(0, 64, 1), Chunk(1, 63, 1), Chunk(2, 5, 1)]))
    assert plan(model, cache, mixed).others == mixed.slices[:1]
