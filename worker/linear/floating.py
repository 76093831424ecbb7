"""Linear layers over 32-bit and 16-bit weights, resident or streamed.

On CPUs all products are oneDNN's, over weights packed for it where they are resident in the dtype of the product: at 4
to 16 rows on one thread that takes about half the time of `torch.nn.functional.linear`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from worker.linear.base import Linear, LinearNumerics, Scratch
from worker.numerics import DTYPES
from worker.stored_weight import Piece, StoredWeight, hold

MIN_ROWS = 4  # oneDNN takes longer for 1 to 3 rows than for 4, and only a single row gets other bits than among others
FIXED_ROWS = 64  # of exact products where a library's bits depend on the number of rows
PACKING_ROWS = 8  # the number of rows to pack for; packs for 8 to 512 take equally long at every number of rows
ROW_STEP = 16  # output rows; where weights are cut at other numbers, oneDNN's fp32 rounds otherwise than over the whole
SCRATCH_BYTES = 4 << 20  # of converted weights at a time; oneDNN's cost per call outweighs a better fitting cache


class PlainLinear(Linear):
    """torch's own product, for devices without oneDNN. Pieces of a streamed weight are on the device when they come, or
    are copied there."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics) -> None:
        super().__init__(weight.shape[0], bias)
        self.weight, self._numerics = weight, numerics
        self.held = None if weight.is_streamed else [self._convert(piece) for piece in weight.pieces()]

    def multiply(self, rows: Tensor) -> Tensor:
        pieces = self.held if self.held is not None else map(self._convert, self.weight.pieces())
        out = rows.new_empty(rows.shape[0], self.num_out)
        first = 0
        for piece in pieces:
            out[:, first : first + piece.shape[0]] = self.product(rows, piece)
            first += piece.shape[0]
        return out if self.bias is None else out.add_(self.bias)

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiply with some rows of the weight."""
        return functional.linear(rows, weight)

    def _convert(self, piece: Piece) -> Tensor:
        return piece.tensors["weight"].to(device=self._numerics.device, dtype=self._numerics.compute)


class FixedRowsLinear(PlainLinear):
    """torch's own product, always of FIXED_ROWS rows: a row's bits do not depend on how many others there are."""

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        padded = functional.pad(rows, (0, 0, 0, -rows.shape[0] % FIXED_ROWS))
        tiles = [functional.linear(tile, weight) for tile in torch.split(padded, FIXED_ROWS)]
        return torch.cat(tiles)[: rows.shape[0]]


class PackedLinear(Linear):
    """oneDNN's product over weights in oneDNN's own layout, which depends on this machine: never store it."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None) -> None:
        super().__init__(weight.shape[0], bias, MIN_ROWS)
        self._packed = [(_part(bias, piece.first_row, piece.num_rows), _pack(piece)) for piece in weight.pieces()]

    def multiply(self, rows: Tensor) -> Tensor:
        products = [onednn_linear(rows, packed, bias) for bias, packed in self._packed]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)


class PieceLinear(Linear):
    """oneDNN's product over weights as stored; those of another dtype than the product's are converted, a cache-sized
    tile of output rows at a time."""

    def __init__(
        self, weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics, scratch: Scratch, min_rows: int
    ) -> None:
        super().__init__(weight.shape[0], bias, min_rows)
        self.weight, self.scratch, self._compute = hold(weight), scratch, numerics.compute
        self._tile = max(1, SCRATCH_BYTES // (4 * weight.shape[1] * ROW_STEP)) * ROW_STEP

    def multiply(self, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], self.num_out)
        for piece in self.weight.pieces():
            for start, stop in _tiles(piece.num_rows, self._tile):
                weight = self._convert(piece.tensors["weight"][start:stop])
                first, count = piece.first_row + start, stop - start
                out[:, first : first + count] = onednn_linear(rows, weight, _part(self.bias, first, count))
        return out

    def _convert(self, stored: Tensor) -> Tensor:
        if stored.dtype == self._compute:
            return stored
        return self.scratch.take(stored.shape[0], stored.shape[1], self._compute).copy_(stored)


def choose_product_dtype(numerics: LinearNumerics) -> torch.dtype:
    """Return what to multiply in: the compute dtype, or fp32 where this CPU's oneDNN has no products of that."""
    if numerics.device.type != "cpu":
        return numerics.compute
    zeros = torch.zeros(ROW_STEP, ROW_STEP, dtype=numerics.compute)
    try:
        return onednn_linear(zeros, zeros, None).dtype
    except RuntimeError:
        return torch.float32


def build_floating(weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics, scratch: Scratch) -> Linear:
    """Return the layer that suits the device and the weight's dtype."""
    if numerics.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return (FixedRowsLinear if numerics.is_exact else PlainLinear)(weight, bias, numerics)
    is_stored_as_computed = DTYPES[weight.kind.value] == numerics.compute
    if is_stored_as_computed and not weight.is_streamed:
        return PackedLinear(weight, bias)
    min_rows = MIN_ROWS if numerics.is_exact or is_stored_as_computed else 1
    return PieceLinear(weight, bias, numerics, scratch, min_rows)


def _tiles(num_rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut rows into tiles of `size`, the last one with less than ROW_STEP rows more."""
    starts = range(0, max(1, num_rows - ROW_STEP + 1), size)
    return zip(starts, [*starts[1:], num_rows], strict=True)


def _part(bias: Tensor | None, first: int, count: int) -> Tensor | None:
    return None if bias is None else bias[first : first + count]


def _pack(piece: Piece) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(piece.tensors["weight"], PACKING_ROWS)
    return packed


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return oneDNN's product of tensors of one dtype, or torch's where it was built without oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return functional.linear(rows, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
