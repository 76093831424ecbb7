"""4-bit weights in bitsandbytes' NF4 with double quantization, bit for bit as its CPU backend gives them on one thread.

A weight is cut into blocks of 64 parameters along its flattened rows. Each has the largest magnitude, its absmax, and
codes of 4 bits for what remains. The absmaxes minus their mean are quantized again, to 8 bits in blocks of 256
(https://arxiv.org/abs/2305.14314). Written out here rather than called there, since the library's own bits depend on
threads and compiled parts, and parts of a block store must be equal on every machine; and it takes a sixth of the time.

Covers weights; `worker.linear.nf4` multiplies with them, `worker.quantization.bitsandbytes` reads checkpoints that come
quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from cluster.model_spec import Precision
from worker.store.layout import NF4_BLOCK, NF4_NESTED_BLOCK
from worker.stored_weight import MemoryWeight, Piece, StoredWeight

BLOCK = NF4_BLOCK
NESTED_BLOCK = NF4_NESTED_BLOCK
TILE_ELEMENTS = 1 << 18  # encoded at a time: temporaries of a few MiB

VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the sixteen codes mean, as parts of the absmax."""

_SMALLEST_DIVISOR = 1e-38  # so that a block of zeros divides by something
_GRID = 32767.5  # the nested codes are found on a grid of 65536 steps over [-1, 1]
_UNDECIDED = 255
_LANES, _CHAINS, _LEVELS = 8, 4, 4  # of torch's sum on a CPU


def encode(name: str, weight: Tensor) -> MemoryWeight:
    """Return `weight` `[out, in]`, of any float dtype, as one piece of 4-bit codes with doubly quantized absmaxes."""
    num_rows, num_columns = weight.shape
    codes = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-weight.numel() // BLOCK))
    encoder = _TileEncoder()
    step = rows_per_tile(num_columns, TILE_ELEMENTS)
    for start in range(0, num_rows, step):
        tile = weight[start : start + step].float().reshape(-1)
        first = start * num_columns
        packed, largest = encoder.encode(tile)
        codes[first // 2 : first // 2 + packed.numel()] = packed
        absmax[first // BLOCK : first // BLOCK + largest.numel()] = largest
    tensors, small = _encode_absmax(absmax)
    piece = Piece(0, num_rows, {"weight": codes, **tensors})
    return MemoryWeight(name, Precision.NF4, (num_rows, num_columns), small, (piece,))


def decode(weight: StoredWeight) -> Tensor:
    """Return the weight in fp32, `[out, in]`: what bitsandbytes' dequantize_4bit gives."""
    return torch.cat([_decode_piece(weight, piece) for piece in weight.pieces()])


def tiles(weight: StoredWeight, num_elements: int) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Yield `(rows, codes, fp32 absmaxes)` of tiles of about `num_elements`, in order of rows.

    A streamed weight's codes are valid until the next tile is asked for.
    """
    num_columns = weight.shape[1]
    step = rows_per_tile(num_columns, num_elements)
    for piece in weight.pieces():
        first_block = piece.first_row * num_columns // BLOCK
        for start in range(0, piece.num_rows, step):
            stop = min(start + step, piece.num_rows)
            elements = range(start * num_columns, stop * num_columns)
            blocks = range(elements.start // BLOCK, -(-elements.stop // BLOCK))
            codes = piece.tensors["weight"][elements.start // 2 : -(-elements.stop // 2)]
            absmax = decode_absmax(piece.tensors, weight.small, blocks, first_block)
            yield range(piece.first_row + start, piece.first_row + stop), codes, absmax


def decode_absmax(
    tensors: Mapping[str, Tensor], small: Mapping[str, Tensor], blocks: range, first_block: int
) -> Tensor:
    """Return the absmaxes of a piece's `blocks` in fp32; `first_block` is the piece's first one within the weight.

    All on one device: each step rounds once, so the bits are the same on any.
    """
    stored = tensors["absmax"][blocks.start : blocks.stop]
    if stored.dtype is torch.float32:  # of a checkpoint whose absmaxes were quantized only once
        return stored
    start, stop = first_block + blocks.start, first_block + blocks.stop
    nested = small["nested_absmax"][start // NESTED_BLOCK : -(-stop // NESTED_BLOCK)]
    skipped = start % NESTED_BLOCK
    factors = nested[:, None].expand(-1, NESTED_BLOCK).reshape(-1)[skipped : skipped + len(blocks)]
    return _map_on(stored.device).index_select(0, stored.int()).mul_(factors).add_(small["nested_offset"])


def rows_per_tile(num_columns: int, num_elements: int) -> int:
    """Return how many rows make a tile of about `num_elements` that consists of whole blocks and whole bytes."""
    unit = BLOCK // math.gcd(BLOCK, num_columns)
    return max(1, num_elements // (num_columns * unit)) * unit


def dynamic_map() -> Tensor:
    """Return what the 256 codes of an absmax mean: seven decades with ever more steps, both signs, 0 and 1."""
    return _DYNAMIC_MAP


@cache
def _map_on(device: torch.device) -> Tensor:
    return _DYNAMIC_MAP.to(device)


def _make_dynamic_map() -> Tensor:
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        values += [10.0 ** (decade - 6) * means, -(10.0 ** (decade - 6)) * means]
    return torch.cat(values).sort().values


_DYNAMIC_MAP = _make_dynamic_map()


class _TileEncoder:
    """Finds the code of the nearest value.

    The upper 16 bits of a float decide its code, except in the few cells of floats that a midpoint divides: a table
    says which, and only what lies in those is compared with midpoints.
    """

    def __init__(self) -> None:
        values = torch.tensor(VALUES)
        self._midpoints = (values[:-1] + values[1:]) / 2
        lowest = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
        ends = [torch.bucketize(end.view(torch.float32), self._midpoints) for end in (lowest, lowest | 0xFFFF)]
        self._table = torch.where(ends[0] == ends[1], ends[0], _UNDECIDED).to(torch.uint8)

    def encode(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return packed codes and absmaxes of parameters that begin with a block."""
        whole = flat.numel() - flat.numel() % BLOCK
        blocks, rest = flat[:whole].view(-1, BLOCK), flat[whole:]
        absmax = blocks.abs().amax(dim=1)
        scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_DIVISOR))[:, None]).clamp_(-1, 1).view(-1)
        if rest.numel():  # the last block, if it is incomplete, is divided instead
            last = rest.abs().amax().clamp(min=_SMALLEST_DIVISOR)
            absmax = torch.cat([absmax, last[None]])
            scaled = torch.cat([scaled, (rest / last).clamp_(-1, 1), scaled.new_zeros(rest.numel() % 2)])
        pairs = self._nearest(scaled).view(-1, 2)
        return (pairs[:, 0] << 4) | pairs[:, 1], absmax

    def _nearest(self, scaled: Tensor) -> Tensor:
        cells = (scaled.view(torch.int32) >> 16).add_(1 << 15)
        codes = self._table.index_select(0, cells)
        undecided = (codes == _UNDECIDED).nonzero().squeeze(1)
        codes[undecided] = torch.bucketize(scaled[undecided], self._midpoints).to(torch.uint8)
        return codes


def _encode_absmax(absmax: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a piece holds and what is small, by role."""
    offset = _sum(absmax) / absmax.numel()
    midpoints = (dynamic_map()[:-1] + dynamic_map()[1:]) * 0.5
    codes, nested = torch.empty(absmax.numel(), dtype=torch.uint8), []
    for start in range(0, absmax.numel(), TILE_ELEMENTS):
        tile = absmax[start : start + TILE_ELEMENTS] - offset
        padded = torch.nn.functional.pad(tile, (0, -tile.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        largest = padded.abs().amax(dim=1)
        nested.append(largest)
        on_grid = _round_to_grid(padded, largest).view(-1)[: tile.numel()]
        codes[start : start + tile.numel()] = torch.bucketize(on_grid, midpoints)
    return {"absmax": codes}, {"nested_absmax": torch.cat(nested), "nested_offset": offset}


def _round_to_grid(blocks: Tensor, largest: Tensor) -> Tensor:
    """Scale blocks to [-1, 1] and round to the grid on which bitsandbytes' CPU backend looks nested codes up."""
    scaled = (blocks * (1.0 / largest)[:, None]).nan_to_num_(nan=-1.0).clamp_(-1, 1)  # it takes 0 / 0 for the lowest
    steps = ((scaled + 1.0) * _GRID + 0.5).floor_()
    return (2.0 * steps) / 65535 - 1.0


def _sum(values: Tensor) -> Tensor:
    """Sum fp32 in the order in which torch does on one thread of a CPU with AVX2, whatever this machine's order is.

    torch keeps _CHAINS sums of _LANES each, and cascades runs of them through _LEVELS levels.
    """
    lanes = _LANES if values.numel() >= _LANES else 1
    vectors = values[: values.numel() // lanes * lanes].view(-1, lanes)
    num_chained = vectors.shape[0] // _CHAINS
    level = vectors[: num_chained * _CHAINS].reshape(num_chained, _CHAINS * lanes)
    run = 1 << max(4, max(1, num_chained - 1).bit_length() // _LEVELS)
    total = torch.zeros(_CHAINS * lanes)
    for depth in range(_LEVELS):
        whole = level.shape[0] // run * run if depth < _LEVELS - 1 else 0
        total = total + _add_in_order(level[whole:].unbind(0), total)
        level = _add_in_order(level[:whole].view(-1, run, _CHAINS * lanes).unbind(1), level[: whole // run])
    chains = list(total.view(_CHAINS, lanes))
    chains[0] = _add_in_order((chains[0], *vectors[num_chained * _CHAINS :], *chains[1:]), chains[0])
    return _add_in_order((*values[vectors.numel() :], *chains[0]), values.new_zeros(()))


def _add_in_order(terms: tuple[Tensor, ...], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for term in terms:
        total += term
    return total


def _decode_piece(weight: StoredWeight, piece: Piece) -> Tensor:
    num_columns = weight.shape[1]
    num_elements = piece.num_rows * num_columns
    absmax = decode_absmax(
        piece.tensors, weight.small, range(-(-num_elements // BLOCK)), piece.first_row * num_columns // BLOCK
    )
    packed = piece.tensors["weight"]
    codes = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)[:num_elements]
    values = torch.tensor(VALUES).index_select(0, codes.int())
    return (values * absmax.repeat_interleave(BLOCK)[:num_elements]).view(piece.num_rows, num_columns)
