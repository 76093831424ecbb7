"""Attention of a step's single tokens, those of many sequences at once.

Covers which sequences go together and the arithmetic, where there is no compiled kernel; `worker.attention` takes
everything else: longer slices and exact results. torch's products take single tokens in groups, but for contexts so
long that a call per sequence costs nothing beside reading them.

A group's keys are gathered into one tensor, as many positions per sequence as its longest one has. Sequences are
grouped by length, so that little is gathered in vain; what a shorter one lacks is a repetition of its own first slots,
which its token does not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from worker.kv_cache import AttentionLayout, SliceLayout
from worker.native.attention import TokenPlan, plan_tokens

UNIT = 32  # slots gathered at a time: a whole tile would be more in vain
MAX_GROUP_BYTES = 8 << 20  # of one group's keys and values
MAX_SEQUENCE_BYTES = 512 << 10  # of keys and values; gathering longer ones costs more than it saves
MIN_GROUP = 2  # sequences


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences that are computed together."""

    rows: Tensor  # [size]: where their tokens stand in the step
    units: Tensor  # [size * units per sequence]: their slots, by UNIT, in the order of positions
    distance: Tensor  # [size, num_positions]: key position - token's position, -inf where the token must not see
    mask: Tensor  # [num_kv_heads * size, 1, num_positions]: 0, or -inf where the token must not see

    @property
    def size(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How a step is divided between this module's products and the attention of single slices."""

    groups: tuple[DecodeGroup, ...] = ()
    others: tuple[SliceLayout, ...] = ()


class DecodePlans:
    """The plans of one step: blocks whose heads, caches and windows are alike share one."""

    def __init__(self) -> None:
        self._grouped: dict[tuple[torch.Size, int | None], DecodePlan] = {}
        self._compiled: dict[tuple[int, torch.Size, int | None], tuple[TokenPlan, ...]] = {}

    def compiled(
        self, layout: AttentionLayout, query: Tensor, keys: Tensor, window: int | None
    ) -> tuple[TokenPlan, ...]:
        """Describe a step's tokens to the kernel, for a block with these queries and this cache of keys."""
        key = (query.shape[1], keys.shape, window)
        if key not in self._compiled:
            self._compiled[key] = plan_tokens(layout.slices, window, query, keys.shape[0])
        return self._compiled[key]

    def grouped(self, layout: AttentionLayout, keys: Tensor, window: int | None) -> DecodePlan:
        """Divide a step's slices, for a block with this cache of keys."""
        key = (keys.shape, window)
        if key not in self._grouped:
            self._grouped[key] = _plan_groups(layout.slices, keys, window)
        return self._grouped[key]


def _plan_groups(slices: Sequence[SliceLayout], keys: Tensor, window: int | None) -> DecodePlan:
    num_kv_heads, _, head_dim = keys.shape
    unit_bytes = 2 * UNIT * num_kv_heads * head_dim * keys.element_size()
    longest = MAX_SEQUENCE_BYTES // unit_bytes
    singles = [one for one in slices if one.num_tokens == 1 and _num_units(one, window) <= longest]
    singles.sort(key=lambda one: _num_units(one, window))
    groups = list(_groups(singles, MAX_GROUP_BYTES // unit_bytes, window))
    taken = {slice_.start_row for group in groups for slice_ in group}
    return DecodePlan(
        groups=tuple(_describe(group, window, num_kv_heads, keys.device) for group in groups),
        others=tuple(slice_ for slice_ in slices if slice_.start_row not in taken),
    )


def _groups(slices: Sequence[SliceLayout], max_units: int, window: int | None) -> Iterator[list[SliceLayout]]:
    """Cut slices, the shortest first, into groups of at most `max_units` units, and leave out those too small."""
    group: list[SliceLayout] = []
    for slice_ in slices:
        if (len(group) + 1) * _num_units(slice_, window) > max_units:
            if len(group) >= MIN_GROUP:
                yield group
            group = []
        group.append(slice_)
    if len(group) >= MIN_GROUP:
        yield group


def _first_visible(slice_: SliceLayout, window: int | None) -> int:
    """Return the first position that a single token sees, down to a whole unit."""
    first = 0 if window is None else max(0, slice_.context_length - window)
    return first // UNIT * UNIT


def _num_units(slice_: SliceLayout, window: int | None) -> int:
    return -(-(slice_.context_length - _first_visible(slice_, window)) // UNIT)


def _describe(group: Sequence[SliceLayout], window: int | None, num_kv_heads: int, device: torch.device) -> DecodeGroup:
    num_units = max(_num_units(slice_, window) for slice_ in group)
    firsts = torch.tensor([_first_visible(slice_, window) for slice_ in group], device=device)
    own = torch.tensor([slice_.start_position for slice_ in group], device=device)
    distance = (firsts - own).unsqueeze(1) + torch.arange(num_units * UNIT, device=device)
    hidden = distance > 0
    if window is not None:
        hidden |= distance <= -window
    mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
    return DecodeGroup(
        rows=torch.tensor([slice_.start_row for slice_ in group], device=device),
        units=torch.tensor([u for slice_ in group for u in _units(slice_, window, num_units)], device=device),
        distance=distance.float().masked_fill_(hidden, -torch.inf),
        mask=mask.unsqueeze(1).repeat(num_kv_heads, 1, 1),
    )


def _units(slice_: SliceLayout, window: int | None, num_units: int) -> list[int]:
    first = _first_visible(slice_, window)
    runs = slice_.runs_between(first, first + _num_units(slice_, window) * UNIT)
    units = [slot // UNIT for start, stop in runs for slot in range(start, stop, UNIT)]
    return units + units[:1] * (num_units - len(units))


def attend_group(
    query: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, *, scale: float, alibi_slopes: Tensor | None
) -> Tensor:
    """Return `[size, num_heads, head_dim]` of a group's tokens; `query` `[num_tokens, num_heads, head_dim]` has all,
    `keys` and `values` are a block's cache."""
    num_kv_heads, head_dim, size = keys.shape[0], query.shape[2], group.size
    rows = query.index_select(0, group.rows).view(size, num_kv_heads, -1, head_dim).transpose(0, 1)
    rows = rows.reshape(num_kv_heads * size, -1, head_dim)
    gathered = (_gather(stored, group.units, query.dtype) for stored in (keys, values))
    keys, values = (t.view(rows.shape[0], -1, head_dim) for t in gathered)
    bias = _bias(group, num_kv_heads, alibi_slopes, query.dtype)
    scores = torch.baddbmm(bias, rows, keys.mT, alpha=scale)
    out = torch.bmm(functional.softmax(scores, dim=2), values)
    return out.view(num_kv_heads, size, -1, head_dim).transpose(0, 1).reshape(size, -1, head_dim)


def _gather(stored: Tensor, units: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `[num_kv_heads, num_units, UNIT * head_dim]`."""
    return stored.view(stored.shape[0], -1, UNIT * stored.shape[2]).index_select(1, units).to(dtype)


def _bias(group: DecodeGroup, num_kv_heads: int, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores, `[num_kv_heads * size, 1 or heads per KV head, num_positions]`."""
    if slopes is None:
        return group.mask.to(dtype)
    by_head = slopes.to(group.distance).view(num_kv_heads, 1, -1, 1) * group.distance.unsqueeze(1)
    return by_head.flatten(0, 1).to(dtype)
