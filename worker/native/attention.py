"""The compiled attention of a step's tokens, and the compiled way of queries, keys and values to it.

Covers the call of both kernels and what they are told of a step; `worker.attention` says when. They compute in fp32 on
the CPU, over a cache of any floating dtype. A token's bits depend on its own sequence up to itself alone: neither on
what else is computed, nor on how its sequence was cut into steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from worker.kv_cache import TILE, SliceLayout
from worker.native.library import Kernel, library

PART = 4 * TILE  # positions that the kernel sums together
ROWS = 8  # heads of adjacent tokens that the kernel computes together
MAX_PARTIAL_BYTES = 8 << 20  # of what several parts of tokens give, until they are put together
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
        Kernel("attention", "ppii" + "ppii" + "pi" + "pi" + "ppi" + "iiifpi"),
        Kernel("store_tokens", "p" + 3 * "pii" + "ppi" + "ppp" + 7 * "i"),
    )


def is_compiled(query: Tensor, stored: Tensor) -> bool:
    """Tell whether the kernel attends with queries `[..., head_dim]` to a cache's tensor `stored`."""
    fits = query.dtype in _ELEMENTS and stored.dtype in _ELEMENTS and query.shape[-1] <= MAX_HEAD_DIM
    return fits and query.device.type == "cpu" and kernels() is not None


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """Tokens as the kernel wants them described, in int64; see Tokens in src/attention.cpp."""

    tokens: Tensor  # [size, 7]: first row, count, first visible and own position, first tile, parts, first partial
    parts: Tensor  # [num_parts, 2]: of which tokens, and which of theirs, in an order that keeps keys in the cache
    tiles: Tensor  # [num_tiles]: first slots
    num_partials: int  # of tokens with several parts, one per part


class _Planner:
    """Collects the tokens of one call of the kernel."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, ...]] = []
        self.parts: list[tuple[int, int, int]] = []  # slice, part, tokens: sorted, in the order of computation
        self.tiles: list[int] = []
        self.num_partials = 0

    def add(self, slice_: SliceLayout, positions: range, first_visible: int, first_tile: int) -> None:
        """Add adjacent tokens of a slice, whose tiles begin at `first_tile` of the list."""
        num_parts = -(-(positions.stop - first_visible // TILE * TILE) // PART)
        self.parts += [(slice_.start_row, part, len(self.tokens)) for part in range(num_parts)]
        row = slice_.start_row + positions.start - slice_.start_position
        place = (first_visible, positions.start, first_tile, num_parts, self.num_partials)
        self.tokens.append((row, len(positions), *place))
        self.num_partials += num_parts * len(positions) if num_parts > 1 else 0

    def plan(self) -> TokenPlan:
        """Return what was collected."""
        parts = [(number, part) for _, part, number in sorted(self.parts)]
        tokens, tiles = torch.tensor(self.tokens), torch.tensor(self.tiles)
        return TokenPlan(tokens, torch.tensor(parts), tiles, self.num_partials)


def plan_tokens(
    slices: Sequence[SliceLayout], window: int | None, query: Tensor, num_kv_heads: int
) -> tuple[TokenPlan, ...]:
    """Describe the tokens of slices, to be attended with one plan after the other. `query` is
    `[num_tokens, num_heads, head_dim]`."""
    _, num_heads, head_dim = query.shape
    width = max(1, ROWS * num_kv_heads // num_heads)
    max_partials = MAX_PARTIAL_BYTES // (4 * num_heads * (head_dim + 2))
    planners = [_Planner()]
    for slice_ in slices:
        first_tile, base = None, 0
        for positions, first_visible in _together(slice_, window, width):
            if planners[-1].num_partials > max_partials:
                planners.append(_Planner())
                first_tile = None
            planner = planners[-1]
            if first_tile is None:
                first_tile, base = first_visible // TILE, len(planner.tiles)
                planner.tiles += _tiles(slice_, first_tile)
            planner.add(slice_, positions, first_visible, base + first_visible // TILE - first_tile)
    return tuple(planner.plan() for planner in planners if planner.tokens)


def _together(slice_: SliceLayout, window: int | None, width: int) -> Iterator[tuple[range, int]]:
    """Cut a slice's positions where the kernel must; yield each piece and the first position that it sees."""
    start, end = slice_.start_position, slice_.context_length
    whole = end if window is None else window  # positions below see all before them
    while start < end:
        first_visible = 0 if start < whole else start - (whole - 1)
        stop = min(end, whole, start + width, (start // PART + 1) * PART) if start < whole else start + 1
        yield range(start, stop), first_visible
        start = stop


def _tiles(slice_: SliceLayout, first: int) -> list[int]:
    """Return the first slots of a slice's tiles, from a given one on."""
    runs = slice_.runs_between(first * TILE, -(-slice_.context_length // TILE) * TILE)
    return [slot for start, stop in runs for slot in range(start, stop, TILE)]


def attend_tokens(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, plan: TokenPlan, scale: float, slopes: Tensor | None
) -> None:
    """Fill the rows of `out` that `plan` names. `query` and `out` are fp32 `[num_tokens, num_heads, head_dim]`, `out`
    contiguous; `keys` and `values` are a block's cache, `slopes` ALiBi's `[num_heads]` in fp32."""
    found = kernels()
    assert found is not None
    _, num_heads, head_dim = query.shape
    partials = query.new_empty(plan.num_partials * num_heads * (head_dim + 2)) if plan.num_partials else None
    found.attend(
        out, query, query.stride(0), query.stride(1), keys, values, _ELEMENTS[keys.dtype], keys.shape[1],
        plan.tokens, plan.tokens.shape[0], plan.parts, plan.parts.shape[0], plan.tiles, partials, plan.num_partials,
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
