"""The compiled attention of single tokens against its definition, and the writing of keys and values, in each build."""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.worker.test_attention import threads
from worker.attention import rotate
from worker.kv_cache import AttentionLayout, KVCache, SliceLayout
from worker.native import attention as native
from worker.native import library as native_library
from worker.native.attention import kernels as cached_kernels

PAGE_SIZE = 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def load(build: str) -> native.Kernels:
    """Load a build whatever this CPU's fastest is."""
    path = Path(native_library.__file__).with_name(f"_{build}{sysconfig.get_config_var('EXT_SUFFIX')}")
    if native_library.library() is None or build not in native_library._builds() or not path.exists():
        pytest.skip(f"the kernels for {build} are not here")
    with patch.object(native_library, "library", lambda: ctypes.CDLL(str(path))):
        return cached_kernels.__wrapped__()


@pytest.fixture(scope="module", params=["avx512", "avx2"])
def build(request: pytest.FixtureRequest) -> Iterator[None]:
    found = load(request.param)
    with patch.object(native, "kernels", lambda: found):
        yield


@dataclass(frozen=True)
class Work:
    """Single tokens of several sequences over one block's cache."""

    num_kv_heads: int
    group: int
    head_dim: int
    window: int | None
    is_alibi: bool
    dtype: torch.dtype
    contexts: tuple[int, ...]
    seed: int

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def slopes(self) -> Tensor | None:
        return 2.0 ** -(torch.arange(1, self.num_heads + 1) / 2) if self.is_alibi else None

    def sequences(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each one's query `[num_heads, head_dim]`, keys and values `[num_kv_heads, context, head_dim]`."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            (
                torch.randn(self.num_heads, self.head_dim, generator=generator),
                torch.randn(self.num_kv_heads, context, self.head_dim, generator=generator).to(self.dtype),
                torch.randn(self.num_kv_heads, context, self.head_dim, generator=generator).to(self.dtype),
            )
            for context in self.contexts
        ]

    def attend(self, numbers: Sequence[int]) -> Tensor:
        """Attend with some of the sequences, whose pages are scattered; return `[len(numbers), num_heads, head_dim]`.

        Whatever no sequence has written is not a number."""
        sequences = [self.sequences()[number] for number in numbers]
        counts = [-(-self.contexts[number] // PAGE_SIZE) for number in numbers]
        pages = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(self.seed)).tolist()
        shape = (self.num_kv_heads, sum(counts) * PAGE_SIZE, self.head_dim)
        keys, values = (torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(2))
        query = torch.empty(len(numbers), self.num_heads, 3 * self.head_dim)[..., : self.head_dim]
        slices = []
        for row, (own_query, own_keys, own_values) in enumerate(sequences):
            own, pages = pages[: counts[row]], pages[counts[row] :]
            slots = torch.tensor([page * PAGE_SIZE + i for page in own for i in range(PAGE_SIZE)])
            context = own_keys.shape[1]
            keys[:, slots[:context]], values[:, slots[:context]], query[row] = own_keys, own_values, own_query
            runs = tuple((page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in own)
            slices.append(SliceLayout(row, row + 1, context - 1, runs))
        out = torch.empty(query.shape)
        for plan in native.plan_tokens(slices, self.window, query, self.num_kv_heads):
            native.attend_tokens(out, query, keys, values, plan, self.head_dim**-0.5, self.slopes)
        return out

    def reference(self) -> Tensor:
        """Return what `attend` does for all sequences, by attention's definition in float64."""
        return torch.stack([self._attend_one(*sequence) for sequence in self.sequences()]).float()

    def _attend_one(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = (t.double().repeat_interleave(self.group, dim=0) for t in (keys, values))
        scores = (keys @ query.double().unsqueeze(2)).squeeze(2) * self.head_dim**-0.5
        if self.slopes is not None:
            scores += self.slopes.double().unsqueeze(1) * torch.arange(1 - scores.shape[1], 1)
        if self.window is not None:
            scores[:, : -self.window] = -torch.inf
        return (scores.softmax(dim=1).unsqueeze(1) @ values).squeeze(1)


works = st.builds(
    Work,
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 7, 8, 19]),
    head_dim=st.sampled_from([8, 20, 64, 80, 96, 128, 512]),
    window=st.sampled_from([None, 1, 33, 64, 300]),
    is_alibi=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    contexts=st.lists(st.integers(1, 130) | st.integers(250, 800), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None)
@given(works)
@pytest.mark.usefixtures("build")
def test_tokens_attend_by_the_definition(work: Work) -> None:
    out = work.attend(range(len(work.contexts)))
    torch.testing.assert_close(out, work.reference(), rtol=1e-5, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(works)
@pytest.mark.usefixtures("build")
def test_a_tokens_bits_depend_neither_on_its_neighbours_nor_on_threads(work: Work) -> None:
    numbers = range(len(work.contexts))
    with threads(2):
        together = work.attend(numbers)
    with threads(1):
        assert torch.equal(together, torch.cat([work.attend([number]) for number in numbers]))
        assert torch.equal(together.flip(0), work.attend(numbers[::-1]))


@settings(max_examples=20, deadline=None)
@given(works)
def test_builds_give_the_same_bits(work: Work) -> None:
    outs = []
    for found in [load("avx512"), load("avx2")]:
        with patch.object(native, "kernels", lambda found=found: found):
            outs.append(work.attend(range(len(work.contexts))))
    assert torch.equal(*outs)


@pytest.mark.usefixtures("build")
def test_a_long_context_is_attended_by_the_definition() -> None:
    work = Work(1, 4, 64, None, False, torch.float32, (30_000, 5), seed=1)
    torch.testing.assert_close(work.attend([0, 1]), work.reference(), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("build")
def test_a_score_that_is_not_a_number_reaches_the_result_of_its_head_alone() -> None:
    work = Work(2, 2, 64, None, False, torch.float32, (100,), seed=1)
    clean = work.attend([0])
    query, keys, values = work.sequences()[0]
    query[1, 3] = torch.nan
    with patch.object(Work, "sequences", lambda _: [(query, keys, values)]):
        out = work.attend([0])
    assert bool(out[0, 1].isnan().all())
    assert torch.equal(out[0, [0, 2, 3]], clean[0, [0, 2, 3]])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.sampled_from([(1, 1), (4, 2), (7, 1), (12, 12)]),
    st.sampled_from([(8, 8), (20, 20), (64, 64), (80, 20), (96, 96), (128, 64), (64, None)]),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2]),
)
@pytest.mark.usefixtures("build")
def test_rotation_and_storing_give_the_bits_of_torch(
    num_tokens: int, heads: tuple[int, int], dims: tuple[int, int | None], dtype: torch.dtype, num_threads: int
) -> None:
    (num_heads, num_kv_heads), (head_dim, rotary_dim) = heads, dims
    generator = torch.Generator().manual_seed(num_tokens)
    joined = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator)
    joined[0, :, 0] *= 1e30  # to infinity in 16 bits of fp16's kind
    query, key, value = joined.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = torch.randn(1, num_tokens, rotary_dim or 0, generator=generator)
    rotary = (angles.cos(), angles.sin()) if rotary_dim else None
    slots = torch.randperm(128, generator=generator)[:num_tokens]
    caches = [KVCache([num_kv_heads], [head_dim], 2, PAGE_SIZE, dtype, "cpu") for _ in range(2)]
    with threads(num_threads):
        rotated = native.store_tokens(query, key, value, rotary, slots, caches[0].keys[0], caches[0].values[0])
    turned = (rotate(query, rotary), rotate(key, rotary)) if rotary else (query, key)
    caches[1].write(0, AttentionLayout(slots, (), ()), turned[1], value)
    assert torch.equal(rotated, turned[0])
    assert torch.equal(caches[0].keys[0], caches[1].keys[0])
    assert torch.equal(caches[0].values[0], caches[1].values[0])
