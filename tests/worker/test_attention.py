"""Attention over the paged cache against a naive reference, and its exactness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

from cluster.microbatch import Epoch, PageDelta, StepHeader, StepId
from cluster.request import SequenceId
from worker import attention
from worker.attention import attend
from worker.kv_cache import KVCache
from worker.native import attention as native
from worker.native.attention import is_compiled, kernels

PAGE_SIZE = 64
NUM_PAGES = 16
KERNEL, TORCH, EXACT = WAYS = ("kernel", "torch", "torch, exact")
EXACT_WAYS = (KERNEL, EXACT) if kernels() else (EXACT,)


@dataclass(frozen=True)
class Model:
    """Attention's shape and options."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    window: int | None = None
    is_alibi: bool = False

    @property
    def slopes(self) -> Tensor | None:
        return 2.0 ** -(torch.arange(1, self.num_heads + 1) / 2) if self.is_alibi else None


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a sequence, computed in one step."""

    sequence_id: int
    start: int
    length: int


@dataclass(frozen=True)
class Projections:
    """A sequence's queries, keys and values, `[num_heads, num_tokens, head_dim]`."""

    query: Tensor
    key: Tensor
    value: Tensor

    def cut(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        rows = slice(chunk.start, chunk.start + chunk.length)
        return self.query[:, rows], self.key[:, rows], self.value[:, rows]


def projections(model: Model, num_tokens: int, seed: int) -> Projections:
    generator = torch.Generator().manual_seed(seed)
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    return Projections(*(torch.randn(n, num_tokens, model.head_dim, generator=generator) for n in heads))


def step(chunks: Sequence[Chunk], deltas: Sequence[PageDelta] = ()) -> StepHeader:
    return StepHeader(
        epoch=Epoch(1, 1),
        step_id=StepId(0),
        deadline_ms=1000,
        sequence_ids=tuple(SequenceId(chunk.sequence_id) for chunk in chunks),
        start_positions=tuple(chunk.start for chunk in chunks),
        lengths=tuple(chunk.length for chunk in chunks),
        token_ids=(0,) * sum(chunk.length for chunk in chunks),
        logits_rows=(0,) * len(chunks),
        is_sampled=(False,) * len(chunks),
        page_deltas=tuple(deltas),
    )


def new_cache(model: Model, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache([model.num_kv_heads], [model.head_dim], NUM_PAGES, PAGE_SIZE, dtype, "cpu")
    for tensor in cache.keys + cache.values:
        tensor.fill_(torch.nan)  # whatever an unwritten slot holds must not matter
    return cache


def run(
    model: Model,
    cache: KVCache,
    sequences: dict[int, Projections],
    tables: dict[int, Sequence[int]],
    steps: Sequence[Sequence[Chunk]],
    *,
    way: str = KERNEL,
) -> dict[int, Tensor]:
    """Run the steps; return each sequence's outputs `[num_tokens, num_heads, head_dim]`, in order of computation."""
    cache.apply(step([], [PageDelta(SequenceId(i), 0, tuple(pages)) for i, pages in tables.items()]))
    outputs: dict[int, list[Tensor]] = {i: [] for i in sequences}
    for chunks in steps:
        cuts = [sequences[chunk.sequence_id].cut(chunk) for chunk in chunks]
        query, key, value = (torch.cat(parts, dim=1).transpose(0, 1) for parts in zip(*cuts, strict=True))
        layout = cache.layout(step(chunks))
        with patch.object(attention, "is_compiled", is_compiled if way == KERNEL else lambda *_: False):
            out = attend(
                query, key, value, cache, 0, layout,
                scale=model.head_dim**-0.5, window=model.window, alibi_slopes=model.slopes, is_exact=way == EXACT,
            )  # fmt: skip
        for chunk, part in zip(chunks, out.split([chunk.length for chunk in chunks]), strict=True):
            outputs[chunk.sequence_id].append(part)
    return {i: torch.cat(parts) for i, parts in outputs.items() if parts}


def reference(model: Model, sequence: Projections) -> Tensor:
    """Attention written down as its definition, in float64."""
    group = model.num_heads // model.num_kv_heads
    query = sequence.query.double()
    key, value = (t.double().repeat_interleave(group, dim=0) for t in (sequence.key, sequence.value))
    scores = query @ key.mT * model.head_dim**-0.5
    positions = torch.arange(query.shape[1])
    if model.slopes is not None:
        scores = scores + model.slopes.double()[:, None, None] * positions
    visible = positions <= positions[:, None]
    if model.window is not None:
        visible &= positions > positions[:, None] - model.window
    return (scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ value).transpose(0, 1).float()


def cut_into(lengths: Sequence[int], sequence_id: int = 0) -> list[list[Chunk]]:
    """One step per length."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [[Chunk(sequence_id, start, length)] for start, length in zip(starts, lengths, strict=True)]


@st.composite
def chunkings(draw: st.DrawFn, num_tokens: int) -> list[int]:
    cuts = draw(st.sets(st.integers(1, num_tokens - 1), max_size=6))
    borders = [0, *sorted(cuts), num_tokens]
    return [stop - start for start, stop in pairwise(borders)]


models = st.builds(
    lambda kv, group, head_dim, window, is_alibi: Model(kv * group, kv, head_dim, window, is_alibi),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 3, 5, 8]),
    st.sampled_from([8, 16, 64]),
    st.sampled_from([None, 1, 7, 64, 100]),
    st.booleans(),
)
page_orders = st.permutations(range(NUM_PAGES))


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@settings(max_examples=30, deadline=None)
@given(st.data(), models, st.integers(2, 300), page_orders, st.sampled_from(WAYS))
def test_any_chunking_and_placement_computes_the_definition(
    data: st.DataObject, model: Model, num_tokens: int, pages: list[int], way: str
) -> None:
    sequence = projections(model, num_tokens, seed=num_tokens)
    steps = cut_into(data.draw(chunkings(num_tokens)))
    out = run(model, new_cache(model), {0: sequence}, {0: pages}, steps, way=way)
    torch.testing.assert_close(out[0], reference(model, sequence), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.data(), models, st.integers(2, 600), page_orders, st.sampled_from([1, 2]), st.sampled_from(EXACT_WAYS))
def test_exact_attention_gives_the_same_bits_for_any_chunking_and_placement(
    data: st.DataObject, model: Model, num_tokens: int, pages: list[int], num_threads: int, way: str
) -> None:
    sequence = projections(model, num_tokens, seed=num_tokens)
    steps = cut_into(data.draw(chunkings(num_tokens)))
    with threads(num_threads):
        whole = run(model, new_cache(model), {0: sequence}, {0: range(10)}, cut_into([num_tokens]), way=way)
        cut = run(model, new_cache(model), {0: sequence}, {0: pages}, steps, way=way)
    assert torch.equal(whole[0], cut[0])


@pytest.mark.parametrize("way", EXACT_WAYS)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("model", [Model(8, 2, 64), Model(12, 12, 64, is_alibi=True), Model(8, 1, 32, window=70)])
def test_exact_decode_gives_the_bits_of_prefill_whatever_the_neighbours(
    model: Model, num_threads: int, way: str
) -> None:
    sequences = {i: projections(model, 200, seed=i) for i in range(4)}
    tables = {i: range(4 * i, 4 * i + 4) for i in range(4)}
    whole = [Chunk(0, 0, 150)]
    neighbours = [
        [Chunk(1, 0, 100), Chunk(0, 0, 120), Chunk(2, 0, 3)],
        *([Chunk(2, 3 + i, 1), Chunk(0, 120 + i, 1), Chunk(1, 100 + i, 1)] for i in range(12)),
        [Chunk(3, 0, 190), Chunk(0, 132, 18), Chunk(1, 112, 2)],
    ]
    with threads(num_threads):
        alone = run(model, new_cache(model), sequences, tables, [whole], way=way)
        among = run(model, new_cache(model), sequences, tables, neighbours, way=way)
    assert torch.equal(alone[0], among[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pages", [(0, 1, 2), (5, 2, 9)])
def test_a_16_bit_cache_rounds_keys_and_values_only(dtype: torch.dtype, way: str, pages: tuple[int, ...]) -> None:
    model = Model(6, 3, 16)
    sequence = projections(model, 150, seed=1)
    rounded = Projections(sequence.query, sequence.key.to(dtype).float(), sequence.value.to(dtype).float())
    cache = new_cache(model, dtype)
    out = run(model, cache, {0: sequence}, {0: pages}, cut_into([100, 1, 49]), way=way)
    torch.testing.assert_close(out[0], reference(model, rounded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_computes_in_16_bits_with_a_16_bit_cache(way: str) -> None:
    model = Model(6, 3, 16)
    exact = projections(model, 100, seed=1)
    sequence = Projections(exact.query.bfloat16(), exact.key.bfloat16(), exact.value.bfloat16())
    cache = new_cache(model, torch.bfloat16)
    out = run(model, cache, {0: sequence}, {0: (3, 1)}, cut_into([99, 1]), way=way)
    assert out[0].dtype == torch.bfloat16
    torch.testing.assert_close(out[0].float(), reference(model, exact), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pages", [range(5), (4, 2, 9, 1, 6)])
def test_decode_reads_no_tile_outside_the_window(way: str, pages: Sequence[int]) -> None:
    model = Model(4, 2, 16, window=40)
    sequence = projections(model, 300, seed=1)
    cache = new_cache(model)
    run(model, cache, {0: sequence}, {0: pages}, cut_into([299]), way=way)
    for page in list(pages)[:4]:  # position 299 sees 260 … 299, which lie in the fifth page
        cache.keys[0][:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = torch.nan
        cache.values[0][:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = torch.nan
    out = run(model, cache, {0: sequence}, {}, [[Chunk(0, 299, 1)]], way=way)
    torch.testing.assert_close(out[0], reference(model, sequence)[299:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pages", [range(5), (4, 2, 9, 1, 6)])
def test_long_chunks_are_computed_in_tiles_with_the_same_result(
    way: str, pages: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MAX_SCORES", 4 * 300 * 7)  # seven queries at a time
    model = Model(4, 2, 16, window=100)
    sequence = projections(model, 300, seed=1)
    out = run(model, new_cache(model), {0: sequence}, {0: pages}, cut_into([300]), way=way)
    torch.testing.assert_close(out[0], reference(model, sequence), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [Model(8, 1, 32), Model(6, 3, 16, window=270, is_alibi=True)])
def test_memory_for_long_prompts_is_bounded_without_a_trace(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = {0: projections(model, 700, seed=1), 1: projections(model, 300, seed=2)}
    tables, steps = {0: range(11), 1: range(11, 16)}, [[Chunk(0, 0, 700), Chunk(1, 0, 300)]]
    whole = run(model, new_cache(model), sequences, tables, steps)
    monkeypatch.setattr(native, "MAX_PARTIAL_BYTES", 50_000)
    cut = run(model, new_cache(model), sequences, tables, steps)
    for i, sequence in sequences.items():
        torch.testing.assert_close(whole[i], reference(model, sequence), rtol=1e-4, atol=1e-5)
        assert torch.equal(cut[i], whole[i])


def test_a_rewritten_position_replaces_what_was_there() -> None:
    model = Model()
    drafted, final = projections(model, 80, seed=1), projections(model, 80, seed=2)
    cache = new_cache(model)
    run(model, cache, {0: drafted}, {0: (1, 0)}, cut_into([80]))
    out = run(model, cache, {0: final}, {}, cut_into([50, 30]))
    torch.testing.assert_close(out[0], reference(model, final), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_slots", [64, 512, 4096])
def test_decode_of_one_run_takes_views_of_the_cache(num_slots: int) -> None:
    model = Model(4, 2, 16)
    cache = KVCache([2], [16], num_slots // PAGE_SIZE, PAGE_SIZE, torch.float32, "cpu")
    sequence = projections(model, num_slots, seed=1)
    tables = {0: range(num_slots // PAGE_SIZE)}
    run(model, cache, {0: sequence}, tables, [[Chunk(0, 0, num_slots - 1)]])
    with profile(profile_memory=True) as profiler:
        run(model, cache, {0: sequence}, {}, [[Chunk(0, num_slots - 1, 1)]])
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.key_averages())
    assert allocated < 64 * 1024 + 4 * 16 * num_slots  # scores per head and slot; keys are 16 times that
