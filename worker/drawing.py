"""From logits to a token: temperature, top-k, top-p, min-p, and the draw itself.

Probabilities are fixed-point integers ("masses"), relative to the best token. Integer sums are exact, whatever order a
device adds in, so a row's token cannot depend on the other rows of a batch. Filters apply in the order of
transformers: temperature, top-k, top-p, min-p. Each keeps every token at least as likely as the least likely one that
it must keep, ties included; so a filter is one number per row, and sorting the whole vocabulary is hardly ever needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.request import SamplingParams

_LOWEST_TEMPERATURE = 1e-30  # above 0 in float32; already there nothing but ties of the best token survive
_TILE_ELEMENTS = 2**20  # drawn from at a time
_NUCLEUS_WIDTH = 256  # best tokens among which a top-p border is looked for first
_NUCLEUS_GROWTH = 16


def fixed_point_bits(vocab_size: int) -> int:
    """Return how many bits a mass has, such that the masses of a whole vocabulary sum to less than 2**63."""
    return 62 - (vocab_size - 1).bit_length()


def masses(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Return integers `[num_rows, vocab_size]` proportional to `softmax(logits / temperatures[:, None])`.

    A row's best token has 2**fixed_point_bits; what is less likely than that by the same factor has 0.
    """
    scale = 2.0 ** fixed_point_bits(logits.shape[1])
    distances = logits - logits.amax(dim=1, keepdim=True)
    return distances.div_(temperatures[:, None]).exp_().mul_(scale).long()


def log_normalizers(logits: Tensor) -> Tensor:
    """Return float64 `[num_rows]`: the log probability of a token is its logit minus this."""
    plain = masses(logits, torch.ones(len(logits), device=logits.device))
    total = plain.sum(dim=1).double() / 2.0 ** fixed_point_bits(logits.shape[1])
    return logits.amax(dim=1).double() + total.log()


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    """Return one token id per row of `logits` `[num_rows, vocab_size]`: the inverse CDF, in vocabulary order, at
    `uniforms` `[num_rows]` in [0, 1). Every temperature is above 0."""
    num_rows = max(1, _TILE_ELEMENTS // logits.shape[1])
    tiles = [slice(first, first + num_rows) for first in range(0, len(params), num_rows)]
    return torch.cat([_draw_tile(logits[tile], params[tile], uniforms[tile]) for tile in tiles])


def _draw_tile(logits: Tensor, params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    temperatures = [max(p.temperature, _LOWEST_TEMPERATURE) for p in params]
    mass = masses(logits, torch.tensor(temperatures, device=logits.device))
    _apply_filters(mass, params)
    cumulative = mass.cumsum(dim=1)
    target = (uniforms * cumulative[:, -1].double()).long()  # below the total: uniforms are at most 1 - 2**-53
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _apply_filters(mass: Tensor, params: Sequence[SamplingParams]) -> None:
    """Set to 0, in place, what top-k, top-p and min-p remove, in this order."""
    vocab_size = mass.shape[1]
    for border, settings in (
        (_top_k_border, [p.top_k if p.top_k < vocab_size else 0 for p in params]),
        (_top_p_border, [p.top_p if p.top_p < 1.0 else 0 for p in params]),
        (_min_p_border, [p.min_p for p in params]),
    ):
        rows = [row for row, setting in enumerate(settings) if setting]
        if rows:
            chosen = mass[rows]
            of_rows = torch.tensor([settings[row] for row in rows], dtype=torch.float64, device=mass.device)
            lowest = border(chosen, of_rows)
            mass[rows] = chosen.masked_fill_(chosen < lowest[:, None], 0)


def _top_k_border(mass: Tensor, top_k: Tensor) -> Tensor:
    best = mass.topk(int(top_k.max()), dim=1).values
    return best.gather(1, top_k.long()[:, None] - 1)[:, 0]


def _top_p_border(mass: Tensor, top_p: Tensor) -> Tensor:
    """Return the last mass, from the best one on, before which less than `top_p` of the total lies."""
    limit = mass.sum(dim=1).double() * top_p
    width = _NUCLEUS_WIDTH
    while True:
        best = mass.topk(min(width, mass.shape[1]), dim=1).values
        is_kept = (best.cumsum(dim=1) - best).double() < limit[:, None]
        if width >= mass.shape[1] or not is_kept[:, -1].any():
            return best.gather(1, is_kept.sum(dim=1, keepdim=True) - 1)[:, 0]
        width *= _NUCLEUS_GROWTH


def _min_p_border(mass: Tensor, min_p: Tensor) -> Tensor:
    return (mass.amax(dim=1).double() * min_p).ceil().long()
