"""The compiled attention of single tokens, and the compiled way of queries, keys and values to it.

Covers the call of both kernels and what they are told of a step; `worker.attention` says when. They compute in fp32 on
the CPU, over a cache of any floating dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from worker.kv_cache import TILE, SliceLayout
from worker.native.library import Kernel, library

PART = 4 * TILE  # positions that the kernel sums together
MAX_HEAD_DIM = 512
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each `[1, num_tokens, rotary_dim]`."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions of src/attention.cpp and src/rotary.cpp."""

    attend: Kernel
    store: Kernel


@cache
def kernels() -> Kernels | None:
    """Return the kernels; None where they were not built."""
    if library() is None:
        return None
    return Kernels(
        Kernel("decode_attention", "ppii" + "ppii" + "pi" + "pi" + "pp" + "iiifpi"),
        Kernel("store_tokens", "p" + 3 * "pii" + "ppi" + "ppp" + 7 * "i"),
    )


def is_compiled(query: Tensor, stored: Tensor) -> bool:
    """Tell whether the kernels take queries `[..., head_dim]` and a cache's tensor `stored`."""
    fits = query.dtype is torch.float32 and stored.dtype in _ELEMENTS and query.shape[-1] <= MAX_HEAD_DIM
    return fits and query.device.type == "cpu" and kernels() is not None


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """Single tokens as the kernel wants them described, in int64; see Token in src/attention.cpp."""

    tokens: Tensor  # [size, 6]: row, first visible position, own position, first tile, first part, number of parts
    parts: Tensor  # [num_parts]: whose; each is of PART positions, the first of a token from a whole tile on
    tiles: Tensor  # [num_tiles]: first slots

    @property
    def has_partials(self) -> bool:
        """Tell whether a token has several parts."""
        return self.parts.shape[0] > self.tokens.shape[0]


def plan_tokens(slices: Sequence[SliceLayout], window: int | None) -> TokenPlan:
    """Describe slices of one token each."""
    tokens: list[tuple[int, ...]] = []
    parts: list[int] = []
    tiles: list[int] = []
    for number, slice_ in enumerate(slices):
        first = 0 if window is None else max(0, slice_.context_length - window)
        runs = slice_.runs_between(first // TILE * TILE, -(-slice_.context_length // TILE) * TILE)
        own = [slot for start, stop in runs for slot in range(start, stop, TILE)]
        num_parts = -(-len(own) * TILE // PART)
        tokens.append((slice_.start_row, first, slice_.start_position, len(tiles), len(parts), num_parts))
        parts += [number] * num_parts
        tiles += own
    return TokenPlan(torch.tensor(tokens), torch.tensor(parts), torch.tensor(tiles))


def attend_tokens(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, plan: TokenPlan, scale: float, slopes: Tensor | None
) -> None:
    """Fill the rows of `out` that `plan` names. `query` and `out` are `[num_tokens, num_heads, head_dim]`, `out`
    contiguous; `keys` and `values` are a block's cache, `slopes` ALiBi's `[num_heads]` in fp32."""
    found = kernels()
    assert found is not None
    _, num_heads, head_dim = query.shape
    num_parts = plan.parts.shape[0]
    partials = query.new_empty(num_parts * num_heads * (head_dim + 2)) if plan.has_partials else None
    found.attend(
        out, query, query.stride(0), query.stride(1), keys, values, _ELEMENTS[keys.dtype], keys.shape[1],
        plan.tokens, plan.tokens.shape[0], plan.parts, num_parts, plan.tiles, partials,
        num_heads, keys.shape[0], head_dim, scale, slopes, torch.get_num_threads(),
    )  # fmt: skip


def store_tokens(
    query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Write keys and values to a block's cache; with `rotary`, rotated keys. Return the queries, rotated as well.

    All are `[num_tokens, heads, head_dim]` in fp32 with adjacent elements; `slots` says where each token goes.
    """
    found = kernels()
    assert found is not None
    num_tokens, num_heads, head_dim = query.shape
    rotated = query.new_empty(query.shape) if rotary else None
    cos, sin = rotary or (None, None)
    found.store(
        rotated, query, query.stride(0), query.stride(1), key, key.stride(0), key.stride(1),
        value, value.stride(0), value.stride(1), cos, sin, 0 if cos is None else cos.shape[-1],
        slots, keys, values, _ELEMENTS[keys.dtype], keys.shape[1], num_tokens, num_heads, keys.shape[0], head_dim,
        torch.get_num_threads(),
    )  # fmt: skip
    return query if rotated is None else rotated
