"""Linear layers over 4-bit weights.

Two products on CPUs. Where bitsandbytes multiplies 4-bit codes directly (avx512_bf16), inputs are bf16 and codes are
laid out for it, once for a resident weight and tile by tile at every call for a streamed one: the same bits for both,
and for a row in any company. Elsewhere cache-sized tiles are turned into floats by bitsandbytes' compiled kernel and
multiplied by oneDNN. On CUDA bitsandbytes does it all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.linear.base import Linear, LinearNumerics
from worker.quantization.nf4 import BLOCK, VALUES, decode, decode_absmax, encode, tiles
from worker.stored_weight import Piece, StoredWeight, hold

MIN_ROWS = 4  # below that oneDNN gives a row other bits than among others
FLOAT_TILE_BYTES = 4 << 20  # of weights turned into floats; oneDNN's cost per call outweighs a better fitting cache
PACKED_TILE_BYTES = 2 << 20  # of codes laid out and multiplied at a time
GROUP = 32  # rows whose codes bitsandbytes' product wants side by side


class TiledNf4Linear(Linear):
    """Turns a tile into floats, multiplies with it, and takes the next."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics) -> None:
        super().__init__(weight.shape[0], bias, MIN_ROWS if numerics.is_exact else 1)
        self.weight = hold(weight)
        _library()  # defines the kernel

    def multiply(self, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], self.num_out)
        for span, codes, absmax in tiles(self.weight, FLOAT_TILE_BYTES // rows.itemsize):
            floats = self._to_floats(codes, absmax, len(span), rows.dtype)
            bias = None if self.bias is None else self.bias[span.start : span.stop]
            out[:, span.start : span.stop] = _product(rows, floats, bias)
        return out

    def _to_floats(self, codes: Tensor, absmax: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
        missing = absmax.numel() * BLOCK // 2 - codes.numel()
        whole = functional.pad(codes, (0, missing)) if missing else codes
        shape = (absmax.numel(), BLOCK)
        blocks: Tensor = torch.ops.bitsandbytes.dequantize_4bit(whole, absmax, BLOCK, "nf4", shape, dtype)
        num_columns = self.weight.shape[1]
        return blocks.view(-1)[: num_rows * num_columns].view(num_rows, num_columns)


@dataclass(frozen=True, slots=True)
class PackedTile:
    """Some rows in the layout of bitsandbytes' product."""

    rows: range
    codes: Tensor  # uint8 [rows, in / 2], rows filled up to a multiple of GROUP
    absmax: Tensor  # bf16 [in / 64, rows]


class PackedNf4Linear(Linear):
    """bitsandbytes' product of bf16 rows and codes as they are. The number of inputs is a multiple of 64."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None) -> None:
        super().__init__(weight.shape[0], bias)
        self._num_columns, self._values = weight.shape[1], torch.tensor(VALUES)
        _library()  # defines the kernel
        self._streamed = weight if weight.is_streamed else None
        self._held = [] if weight.is_streamed else list(_packed_tiles(weight))

    def multiply(self, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], self.num_out)
        held: Iterable[PackedTile] = self._held if self._streamed is None else _packed_tiles(self._streamed)
        for tile in held:
            shape = (tile.codes.shape[0], self._num_columns)
            product = torch.ops.bitsandbytes.gemv_4bit(rows, tile.codes, shape, tile.absmax, self._values, BLOCK)
            out[:, tile.rows.start : tile.rows.stop] = product[:, : len(tile.rows)]
        return out if self.bias is None else out.add_(self.bias)


class CudaNf4Linear(Linear):
    """bitsandbytes' product on CUDA; codes of a streamed weight are copied to the device piece by piece."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics) -> None:
        super().__init__(weight.shape[0], bias)
        self.weight, self._numerics = weight, numerics
        self._held = None if weight.is_streamed else [self._move(piece) for piece in weight.pieces()]

    def multiply(self, rows: Tensor) -> Tensor:
        pieces = self._held if self._held is not None else map(self._move, self.weight.pieces())
        products = [_library().matmul_4bit(rows, codes, state) for codes, state in pieces]
        out = torch.cat(products, dim=1)
        return out if self.bias is None else out.add_(self.bias)

    def _move(self, piece: Piece) -> tuple[Tensor, Any]:
        num_rows, num_columns, device = piece.num_rows, self.weight.shape[1], self._numerics.device
        blocks = range(-(-num_rows * num_columns // BLOCK))
        absmax = decode_absmax(piece.tensors, self.weight.small, blocks, piece.first_row * num_columns // BLOCK)
        state = _library().functional.QuantState(
            absmax=absmax.to(device),
            shape=torch.Size((num_rows, num_columns)),
            code=torch.tensor(VALUES, device=device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self._numerics.compute,
        )
        return piece.tensors["weight"].to(device)[:, None], state


def build_nf4(weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics) -> Linear:
    """Return the layer that suits device, compute dtype and shape."""
    if numerics.device.type != "cpu":
        return CudaNf4Linear(weight, bias, numerics)
    if numerics.compute is torch.bfloat16 and weight.shape[1] % BLOCK == 0 and has_packed_product():
        return PackedNf4Linear(weight, bias)
    return TiledNf4Linear(weight, bias, numerics)


@cache
def has_packed_product() -> bool:
    """Tell whether bitsandbytes multiplies codes directly on this CPU, and takes the layout that is made here."""
    if not _library().functional.has_avx512bf16():
        return False
    weight = encode("self-test", torch.linspace(-9, 9, 48 * 128).sin().view(48, 128))
    rows = torch.linspace(-5, 5, 3 * 128).cos().view(3, 128).bfloat16()
    expected = rows.float() @ decode(weight).T
    error = PackedNf4Linear(weight, None)(rows).float() - expected
    return bool(error.norm() < 0.01 * expected.norm())


def _packed_tiles(weight: StoredWeight) -> Iterator[PackedTile]:
    for span, codes, absmax in tiles(weight, 2 * PACKED_TILE_BYTES):
        by_row = _fill_group(codes.view(len(span), -1))
        scales = _fill_group(absmax.bfloat16().view(len(span), -1)).t().contiguous()
        yield PackedTile(span, _interleave(by_row), scales)


def _fill_group(rows: Tensor) -> Tensor:
    missing = -rows.shape[0] % GROUP
    return functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _interleave(codes: Tensor) -> Tensor:
    """Lay out codes `[rows, in / 2]`: of each GROUP rows, byte column by byte column, each of the first half's rows
    beside its partner in the second half, one nibble each."""
    num_rows, num_bytes = codes.shape
    halves = codes.view(num_rows // GROUP, 2, GROUP // 2, num_bytes)
    first, second = halves[:, 0].to(torch.int16), halves[:, 1].to(torch.int16)
    words = (second & 0xF0) | (first >> 4) | (second << 12) | ((first & 0xF) << 8)  # two bytes, the lower one first
    return words.transpose(1, 2).contiguous().view(torch.uint8).view(num_rows, num_bytes)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return functional.linear(rows, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


@cache
def _library() -> Any:
    """Import bitsandbytes, which takes seconds, without its warning about a package that makes no difference here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes
