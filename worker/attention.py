"""Attention of a step's packed tokens over the paged cache.

Covers causal attention with grouped heads, sliding windows and ALiBi. Keys and values are read in place: a tile of
queries is multiplied with each contiguous run of slots, and the scores meet in one softmax. Rotary embeddings and
projections belong to the block definitions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from worker.kv_cache import AttentionLayout, KVCache, SliceLayout

MAX_SCORES = 1 << 20  # per tile of queries: bounds the memory of scores and biases
RUN_TILE = 512  # slots multiplied at a time when keys must be upcast
EXACT_ROWS, EXACT_SLOTS = 16, 64  # exact products: a multiple of these rows by these slots


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: KVCache,
    block: int,
    layout: AttentionLayout,
    *,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    is_exact: bool = False,
) -> Tensor:
    """Store a step's keys and values, then attend; return `[num_tokens, num_heads, head_dim]`.

    `query` is `[num_heads, num_tokens, head_dim]`, `key` and `value` `[num_kv_heads, num_tokens, head_dim]`; `block`
    counts from the span's start. A token at position p sees positions `(p - window, p]`. ALiBi adds
    `slope * key position` to a head's scores. With `is_exact` a token's bits depend on its own sequence alone.
    """
    cache.write(block, layout.slots, key, value)
    out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
    attention = _exact_tile if is_exact else _tile
    for slice_ in layout.slices:
        for start, stop in _query_tiles(slice_, query.shape[0]):
            rows = slice(slice_.start_row + start, slice_.start_row + stop)
            first = slice_.start_position + start
            low = 0 if window is None else max(0, first - window + 1)
            mask = _Mask(range(first, first + stop - start), low, window, alibi_slopes)
            grouped = query[:, rows].view(key.shape[0], -1, stop - start, query.shape[2]) * scale
            out[rows] = attention(grouped, cache.keys[block], cache.values[block], slice_, mask).permute(1, 0, 2)
    return out


def _query_tiles(slice_: SliceLayout, num_heads: int) -> Iterator[tuple[int, int]]:
    """Cut a slice's rows so that a tile's scores stay below MAX_SCORES."""
    size = max(1, MAX_SCORES // (num_heads * slice_.context_length))
    for start in range(0, slice_.num_tokens, size):
        yield start, min(start + size, slice_.num_tokens)


class _Mask:
    """What a tile of queries at `positions` may see, of the keys from position `low` on."""

    def __init__(self, positions: range, low: int, window: int | None, slopes: Tensor | None) -> None:
        self.positions, self.low, self.window, self.slopes = positions, low, window, slopes

    def apply(self, scores: Tensor, low: int) -> Tensor:
        """Bias and mask scores `[num_kv_heads, group, num_queries, num_keys]` of keys at `low, …`, in place."""
        high = low + scores.shape[-1]
        queries = torch.arange(self.positions.start, self.positions.stop, device=scores.device)[:, None]
        keys = torch.arange(low, high, device=scores.device)
        if self.slopes is not None:
            distance = (keys - queries).to(scores.dtype)
            scores += self.slopes.to(scores).view(*scores.shape[:2], 1, 1) * distance
        if high - 1 > self.positions.start:
            scores.masked_fill_(keys > queries, -torch.inf)
        if self.window is not None and low <= self.positions.stop - 1 - self.window:
            scores.masked_fill_(keys <= queries - self.window, -torch.inf)
        return scores


def _tile(query: Tensor, keys: Tensor, values: Tensor, slice_: SliceLayout, mask: _Mask) -> Tensor:
    """Attend with `[num_kv_heads, group, num_queries, head_dim]`; return `[num_heads, num_queries, head_dim]`."""
    kv_heads, group, num_queries, head_dim = query.shape
    rows = query.reshape(kv_heads, group * num_queries, head_dim).float()
    is_upcast = keys.dtype != rows.dtype
    runs = [
        (start, min(start + RUN_TILE, stop) if is_upcast else stop)
        for first, stop in slice_.runs_between(mask.low, mask.positions.stop)
        for start in (range(first, stop, RUN_TILE) if is_upcast else (first,))
    ]
    scores = torch.cat([rows @ keys[:, a:b].to(rows.dtype).mT for a, b in runs], dim=-1)
    mask.apply(scores.view(kv_heads, group, num_queries, -1), mask.low)
    weights = torch.softmax(scores, dim=-1)
    parts = torch.split(weights, [b - a for a, b in runs], dim=-1)
    out = torch.zeros_like(rows)
    for (a, b), part in zip(runs, parts, strict=True):
        out.baddbmm_(part, values[:, a:b].to(rows.dtype))
    return out.view(kv_heads * group, num_queries, head_dim).to(query.dtype)


def _exact_tile(query: Tensor, keys: Tensor, values: Tensor, slice_: SliceLayout, mask: _Mask) -> Tensor:
    """As `_tile`, in products of one shape that meet in the order of positions.

    The greatest score does not depend on order; sums do, so each tile of slots is summed alone and the tiles are added
    one after another. Tiles that a query cannot see add exact zeros.
    """
    kv_heads, group, num_queries, head_dim = query.shape
    num_rows = group * num_queries
    rows = query.reshape(kv_heads, num_rows, head_dim).float()
    rows = functional.pad(rows, (0, 0, 0, -num_rows % EXACT_ROWS))
    starts = range(mask.low // EXACT_SLOTS * EXACT_SLOTS, mask.positions.stop, EXACT_SLOTS)
    scores = rows.new_empty(len(starts), *rows.shape[:2], EXACT_SLOTS)
    for index, start in enumerate(starts):
        torch.bmm(rows, _slot_tile(keys, slice_, start, mask.positions.stop).mT, out=scores[index])
        visible = scores[index, :, :num_rows].view(kv_heads, group, num_queries, EXACT_SLOTS)
        mask.apply(visible, start)
    weights = (scores - scores.amax(dim=(0, 3), keepdim=True)).exp_()
    out, total = torch.zeros_like(rows), torch.zeros_like(rows[..., :1])
    for index, start in enumerate(starts):
        out.baddbmm_(weights[index], _slot_tile(values, slice_, start, mask.positions.stop))
        total += weights[index].sum(dim=-1, keepdim=True)
    return (out / total)[:, :num_rows].reshape(kv_heads * group, num_queries, head_dim).to(query.dtype)


def _slot_tile(stored: Tensor, slice_: SliceLayout, start: int, stop: int) -> Tensor:
    """Return `[num_kv_heads, EXACT_SLOTS, head_dim]` of positions `start, …` in fp32, zeros from `stop` on.

    A view where one run holds the whole tile. What unwritten slots hold must not reach a product: 0 * NaN is NaN.
    """
    runs = list(slice_.runs_between(start, min(start + EXACT_SLOTS, stop)))
    if len(runs) == 1 and runs[0][1] - runs[0][0] == EXACT_SLOTS:
        return stored[:, runs[0][0] : runs[0][1]].float()
    parts = torch.cat([stored[:, first:last] for first, last in runs], dim=1).float()
    return functional.pad(parts, (0, 0, 0, EXACT_SLOTS - parts.shape[1]))
