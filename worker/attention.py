"""Attention of a step's packed tokens over the paged cache.

Covers causal attention with grouped heads, sliding windows, rotary embeddings and ALiBi; keys and values are read in
place. Projections belong to the block definitions.

On a CPU a compiled kernel takes all tokens, see `worker.native.attention`. Elsewhere there are three ways to the same
numbers. Single tokens of several sequences go together, see `worker.decode_attention`. torch's fused attention takes
one contiguous run of slots. The paged way takes any runs, and gives a token the same bits whatever is computed with it
and however its sequence was cut, as the kernel does: a greatest score does not depend on order, and everything that
does is summed per TILE of positions, tile after tile in the order of positions. A tile that a token cannot see adds an
exact zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache as memoize

import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import ConfigurationError
from worker.decode_attention import DecodePlan, DecodePlans, attend_group
from worker.kv_cache import TILE, AttentionLayout, KVCache, SliceLayout, SlotRun
from worker.native.attention import Rotary, attend_tokens, is_compiled, store_tokens

MAX_SCORES = 1 << 20  # per tile of queries: bounds the memory of scores and masks
UPCAST_SLOTS = 512  # keys upcast at a time
SERIAL_ELEMENTS = 16384  # below what torch splits among threads, whose shares end in differently rounding scalar code


@dataclass(frozen=True, slots=True)
class _Rules:
    """How one block attends."""

    scale: float
    window: int | None
    alibi_slopes: Tensor | None
    is_exact: bool

    def first_visible(self, position: int) -> int:
        """Return the first position that a token at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def is_plain_decode(self, num_queries: int) -> bool:
        """Tell whether there is one token, which sees all of its keys alike."""
        return num_queries == 1 and self.alibi_slopes is None

    def bias(self, queries: range, keys: range, num_kv_heads: int, like: Tensor) -> Tensor:
        """Return what is added to scores: `[num_kv_heads or 1, group or 1, num_queries, num_keys]`."""
        distance = torch.arange(keys.start, keys.stop, device=like.device) - torch.arange(
            queries.start, queries.stop, device=like.device
        ).unsqueeze(1)
        hidden = distance > 0
        if self.window is not None:
            hidden |= distance <= -self.window
        slopes = like.new_zeros(1, 1, 1, 1)
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes.to(like).view(num_kv_heads, -1, 1, 1)
        return (slopes * distance).masked_fill_(hidden, -torch.inf)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: KVCache,
    block: int,
    layout: AttentionLayout,
    *,
    scale: float,
    rotary: Rotary | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    is_exact: bool = False,
    plans: DecodePlans | None = None,
) -> Tensor:
    """Store a step's keys and values, then attend; return `[num_tokens, num_heads, head_dim]`.

    `query` is `[num_tokens, num_heads, head_dim]`, `key` and `value` `[num_tokens, num_kv_heads, head_dim]`; `block`
    counts from the span's start. With `rotary` queries and keys are rotated first. A token at position p sees positions
    `(p - window, p]`. ALiBi adds `slope * (key position - p)` to a head's scores. With `is_exact`, or where the kernel
    is, a token's bits depend on its own sequence alone. The blocks of a step share `plans`.
    """
    query = _store(query, key, value, rotary, cache, block, layout)
    keys, values = cache.keys[block], cache.values[block]
    plans = plans or DecodePlans()
    if is_compiled(query, keys):
        rows, out = query.float(), torch.empty(query.shape)
        for tokens in plans.compiled(layout, query, keys, window):
            attend_tokens(out, rows, keys, values, tokens, scale, alibi_slopes)
        return out.to(query.dtype)
    plan = DecodePlan(others=layout.slices) if is_exact else plans.grouped(layout, keys, window)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for group in plan.groups:
        part = attend_group(query, keys, values, group, scale=scale, alibi_slopes=alibi_slopes)
        out.index_copy_(0, group.rows, part)
    rules = _Rules(scale, window, alibi_slopes, is_exact)
    for slice_ in plan.others:
        _attend_slice(out, query, cache, block, slice_, rules)
    return out


def _store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    cache: KVCache,
    block: int,
    layout: AttentionLayout,
) -> Tensor:
    """Write keys and values to the cache; return the queries. With `rotary` queries and keys are rotated."""
    if not is_compiled(query, cache.keys[block]):
        cache.clear_tails(block, layout)
    elif query.dtype is torch.float32:
        return store_tokens(query, key, value, rotary, layout.slots, cache.keys[block], cache.values[block])
    if rotary:
        query, key = rotate(query, rotary), rotate(key, rotary)
    cache.write(block, layout, key, value)
    return query


def rotate(rows: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first elements of heads `[num_tokens, num_heads, head_dim]`, by halves as transformers does."""
    cos, sin = (table[0].unsqueeze(1) for table in rotary)
    turning, rest = rows[..., : cos.shape[2]], rows[..., cos.shape[2] :]
    first, second = turning.chunk(2, dim=2)
    turned = turning * cos + torch.cat((-second, first), dim=2) * sin
    return torch.cat((turned, rest), dim=2) if rest.shape[2] else turned


def _attend_slice(out: Tensor, query: Tensor, cache: KVCache, block: int, slice_: SliceLayout, rules: _Rules) -> None:
    """Fill the slice's rows of `out`."""
    num_heads, num_kv_heads = query.shape[1], cache.keys[block].shape[0]
    first = rules.first_visible(slice_.start_position)
    is_one_run = len(tuple(slice_.runs_between(first, slice_.context_length))) == 1
    is_paged = rules.is_exact or not is_one_run or cache.dtype != query.dtype
    num_masks = num_heads if is_paged or rules.alibi_slopes is not None else num_heads // num_kv_heads
    for queries in _query_tiles(slice_, num_masks):
        start = slice_.start_row + queries.start - slice_.start_position
        rows = slice(start, start + len(queries))
        grouped = query[rows].view(len(queries), num_kv_heads, -1, query.shape[2]).permute(1, 2, 0, 3)
        part = (_paged if is_paged else _fused)(grouped, cache, block, slice_, queries, rules)
        out[rows] = part.reshape(num_heads, len(queries), -1).transpose(0, 1)


def _query_tiles(slice_: SliceLayout, num_masks: int) -> Iterator[range]:
    """Cut a slice's positions so that a tile's scores, or the masks of it, stay below MAX_SCORES."""
    size = max(1, MAX_SCORES // (num_masks * slice_.context_length))
    for start in range(slice_.start_position, slice_.context_length, size):
        yield range(start, min(start + size, slice_.context_length))


def _fused(query: Tensor, cache: KVCache, block: int, slice_: SliceLayout, queries: range, rules: _Rules) -> Tensor:
    """Attend with `[num_kv_heads, group, num_queries, head_dim]` to slots that are one run."""
    kv_heads, group, num_queries, head_dim = query.shape
    positions = range(rules.first_visible(queries.start), queries.stop)
    (run,) = slice_.runs_between(positions.start, positions.stop)
    mask = None
    if not rules.is_plain_decode(num_queries):
        bias = rules.bias(queries, positions, kv_heads, query)
        mask = bias.expand(-1, group, -1, -1).reshape(1, bias.shape[0], group * num_queries, -1)
    rows = query.reshape(1, kv_heads, group * num_queries, head_dim)
    keys, values = cache.keys[block][None, :, slice(*run)], cache.values[block][None, :, slice(*run)]
    return functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=rules.scale)


def _paged(query: Tensor, cache: KVCache, block: int, slice_: SliceLayout, queries: range, rules: _Rules) -> Tensor:
    """Attend with `[num_kv_heads, group, num_queries, head_dim]` to any runs, in whole tiles of positions.

    The order of sums does not depend on `is_exact`, the products' own rounding does: exact ones are of padded rows.
    """
    kv_heads, group, num_queries, head_dim = query.shape
    num_rows = group * num_queries
    rows = query.reshape(kv_heads, num_rows, head_dim).float() * rules.scale
    if rules.is_exact:
        multiple = row_multiple(kv_heads, head_dim, query.device, torch.get_num_threads())
        rows = functional.pad(rows, (0, 0, 0, -num_rows % multiple))
    first = rules.first_visible(queries.start) // TILE * TILE
    runs = tuple(slice_.runs_between(first, -(-queries.stop // TILE) * TILE))
    scores = _scores(rows, cache.keys[block], runs)
    if rules.is_plain_decode(num_queries):
        scores[..., : rules.first_visible(queries.start) - first].fill_(-torch.inf)
        scores[..., queries.stop - first :].fill_(-torch.inf)
    else:
        visible = scores[:, :num_rows].view(kv_heads, group, num_queries, -1)
        visible += rules.bias(queries, range(first, first + scores.shape[2]), kv_heads, scores)
    weights, total = _weights(scores)
    out = torch.zeros_like(rows)
    slots = [slot for run in runs for slot in range(run[0], run[1], TILE)]
    for slot, part in zip(slots, torch.split(weights, TILE, dim=2), strict=True):
        out.baddbmm_(part, cache.values[block][:, slot : slot + TILE].float())
    return (out / total)[:, :num_rows].to(query.dtype)


def _scores(rows: Tensor, keys: Tensor, runs: Iterable[SlotRun]) -> Tensor:
    """Return `[num_kv_heads, num_rows, num_slots]`, from keys as they lie or upcast some at a time."""
    step = keys.shape[1] if keys.dtype == rows.dtype else UPCAST_SLOTS
    pieces = [(slot, min(slot + step, run[1])) for run in runs for slot in range(run[0], run[1], step)]
    parts = [torch.bmm(rows, keys[:, first:stop].float().mT) for first, stop in pieces]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Replace scores by their exponentials; return these and each row's sum, in the order of positions."""
    scores -= scores.amax(dim=2, keepdim=True)
    for piece in torch.split(scores.view(-1), SERIAL_ELEMENTS):
        piece.exp_()
    sums = scores.view(*scores.shape[:2], -1, TILE).sum(dim=3)
    return scores, sums.cumsum(dim=2)[..., -1:]


@memoize
def row_multiple(num_kv_heads: int, head_dim: int, device: torch.device, num_threads: int) -> int:
    """Return the least multiple of rows at which this machine's products give a row the same bits in any company.

    Raises ConfigurationError where 16 rows are not enough. `num_threads` is torch's present number of threads.
    """
    for multiple in (4, 8, 16):
        if _is_even(multiple, num_kv_heads, head_dim, device):
            return multiple
    raise ConfigurationError(
        f"products of {num_kv_heads} heads of {head_dim} on {device} ({num_threads} threads) round a row differently "
        "when others are computed with it, so exact results are not possible here: serve without --exact"
    )


def _is_even(multiple: int, num_kv_heads: int, head_dim: int, device: torch.device) -> bool:
    """Compare products of few and of many rows, and of one tile and of several, as `_paged` makes them."""
    query = out = _waves(device, num_kv_heads, 128, head_dim)
    keys = _waves(device, num_kv_heads, 8 * TILE, head_dim)
    weights = _waves(device, num_kv_heads, 128, TILE)
    scores = query @ keys.mT
    sums = out.baddbmm(weights, keys[:, :TILE])
    for stop in (multiple, 2 * multiple, 3 * multiple, 64):
        few, part = query[:, :stop].clone(), weights[:, :stop].clone()
        if not torch.equal(few @ keys[:, TILE : 2 * TILE].mT, scores[:, :stop, TILE : 2 * TILE]):
            return False
        if not torch.equal(out[:, :stop].clone().baddbmm_(part, keys[:, :TILE]), sums[:, :stop]):
            return False
    return True


def _waves(device: torch.device, *shape: int) -> Tensor:
    """Return numbers without a pattern that rounding could hide behind."""
    return torch.arange(math.prod(shape), dtype=torch.float64).square().sin().float().view(shape).to(device)
