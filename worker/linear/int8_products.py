"""Products of 8-bit codes, exact in integers, whichever way this machine computes them fastest.

Covers CPUs, by oneDNN over packed weights where they are resident and over weights as stored where they are streamed,
and, never tried for want of one, CUDA devices; where a machine computes either wrongly, fp32 products that are short
enough to be exact. All ways give the same bits: an integer below 2^31, rounded to fp32, times the weight's scale.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from worker.stored_weight import Piece, StoredWeight

ZERO_POINT = 128  # oneDNN is fast with unsigned inputs only
MIN_ROWS = 4  # oneDNN takes longer for 1 and 2 rows than for 4
TRANSPOSED_ROWS = 16  # from so many on, the product of a weight as stored is faster transposed
PACK_BYTES = 64 << 20  # of weights packed together: layers that share an input become one product
EXACT_COLUMNS = 1024  # sums of so many products of codes are exact in fp32: 128 * 127 * 1024 < 2^24
MAX_COLUMNS = 65536  # sums of so many are below 2^31 with the zero point: 255 * 127 * 65536
GPU_ROWS, GPU_STEP = 32, 8  # what numbers of rows and of columns of a GPU's product are multiples of

_log = logging.getLogger(__name__)

Multiply = Callable[[Tensor, Tensor], Tensor]
"""Maps int8 codes `[num_rows, in]` and an int8 weight `[out, in]` to their product, fp32 `[num_rows, out]`."""


class Products(Protocol):
    """The weights of some layers that share an input."""

    @property
    def min_rows(self) -> int:
        """The number of rows below which more rows cost less."""
        ...

    @property
    def scale(self) -> Tensor:
        """The weights' scales, fp32 `[out of all layers]`."""
        ...

    def multiply(self, codes: Tensor) -> Iterator[Tensor]:
        """Map uint8 codes `[num_rows, in]` to fp32 products with adjacent output rows, times the weights' scales."""
        ...


def choose_products(weights: Sequence[StoredWeight], device: torch.device) -> Products:
    """Return the fastest way that this machine computes correctly."""
    is_fit = 1 < weights[0].shape[1] <= MAX_COLUMNS  # with one column `torch._int_mm` returns garbage
    if device.type != "cpu":
        return StoredProducts(weights, device, multiply_on_gpu if is_fit else multiply_floats)
    if is_fit and weights[0].is_streamed and has_correct_views():
        return StoredProducts(weights, device, multiply_views)
    if is_fit and not weights[0].is_streamed and has_correct_packs():
        return PackedProducts(weights)
    return StoredProducts(weights, device, multiply_floats)


class PackedProducts:
    """oneDNN's product over weights in its own layout, which depends on this machine: never store it."""

    min_rows = MIN_ROWS

    def __init__(self, weights: Sequence[StoredWeight]) -> None:
        self.scale = _join_scales(weights)
        self._packed = list(map(_pack_counted, _batches(weights)))  # a loop would hold a batch too long
        self._zero = torch.zeros(max(num_out for num_out, _ in self._packed), dtype=torch.int32)

    def multiply(self, codes: Tensor) -> Iterator[Tensor]:
        """See Products."""
        first = 0
        for num_out, packed in self._packed:
            yield multiply_packed(codes, packed, self.scale[first : first + num_out], self._zero[:num_out])
            first += num_out


class StoredProducts:
    """Products with pieces as they are stored, each in turn."""

    min_rows = 1

    def __init__(self, weights: Sequence[StoredWeight], device: torch.device, multiply: Multiply) -> None:
        self._device, self._multiply = device, multiply
        self.scale = _join_scales(weights).to(device)
        self._weights = [(weight, self._hold(weight)) for weight in weights]

    def multiply(self, codes: Tensor) -> Iterator[Tensor]:
        """See Products."""
        signed = codes.bitwise_xor(ZERO_POINT).view(torch.int8)
        first = 0
        for weight, held in self._weights:
            for stored in held if held is not None else map(self._move, weight.pieces()):
                yield self._multiply(signed, stored).mul_(self.scale[first : first + len(stored)])
                first += len(stored)

    def _hold(self, weight: StoredWeight) -> list[Tensor] | None:
        return None if weight.is_streamed else [self._move(piece) for piece in weight.pieces()]

    def _move(self, piece: Piece) -> Tensor:
        return piece.tensors["weight"].to(self._device)


def _join_scales(weights: Sequence[StoredWeight]) -> Tensor:
    return torch.cat([weight.small["scale"] for weight in weights])


def _batches(weights: Sequence[StoredWeight]) -> Iterator[Tensor]:
    """Yield the rows of all weights in order, small pieces together."""
    codes: list[Tensor] = []
    for piece in chain.from_iterable(weight.pieces() for weight in weights):
        stored = piece.tensors["weight"]
        if codes and sum(held.nbytes for held in codes) + stored.nbytes > PACK_BYTES:
            yield _take_all(codes)
        codes.append(stored)
    yield _take_all(codes)


def _take_all(codes: list[Tensor]) -> Tensor:
    """Join what is in the list, and empty it: each copy of a batch counts while it is packed."""
    joined = torch.cat(codes) if len(codes) > 1 else codes[0]
    codes.clear()
    return joined


def _pack_counted(codes: Tensor) -> tuple[int, Tensor]:
    return len(codes), pack(codes)


def pack(weight: Tensor) -> Tensor:
    """Return an int8 weight `[out, in]` in oneDNN's layout."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def multiply_packed(codes: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the product of uint8 `codes` and a packed weight, times the weight's scale; `zero` is int32 zeros."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ZERO_POINT, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def multiply_views(signed: Tensor, weight: Tensor) -> Tensor:
    """See Multiply; the fastest way on CPUs that takes weights as they are stored."""
    if len(signed) < TRANSPOSED_ROWS:
        return torch._int_mm(signed, weight.t()).float()
    product = torch._int_mm(weight, signed.t())
    return product.t().to(torch.float32, memory_format=torch.contiguous_format)


def multiply_on_gpu(signed: Tensor, weight: Tensor) -> Tensor:
    """See Multiply."""
    if weight.shape[0] % GPU_STEP or weight.shape[1] % GPU_STEP:
        return multiply_floats(signed, weight)
    padded = functional.pad(signed, (0, 0, 0, -len(signed) % GPU_ROWS))
    return torch._int_mm(padded, weight.t())[: len(signed)].float()


def multiply_floats(signed: Tensor, weight: Tensor) -> Tensor:
    """See Multiply; by fp32 products, which any machine has, each short enough to be exact."""
    total = torch.zeros(len(signed), len(weight), dtype=torch.int64, device=signed.device)
    for start in range(0, weight.shape[1], EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        total += functional.linear(signed[:, columns].float(), weight[:, columns].float()).to(torch.int64)
    return total.float()


@cache
def has_correct_packs() -> bool:
    """Tell whether this CPU multiplies packed weights exactly."""
    return _is_correct(_multiply_by_packing, "oneDNN's packed 8-bit products")


@cache
def has_correct_views() -> bool:
    """Tell whether this CPU multiplies weights as stored exactly."""
    return _is_correct(multiply_views, "8-bit products with streamed weights")


def _is_correct(multiply: Multiply, what: str) -> bool:
    """Multiply extremes and random codes; without VNNI sums of two products may saturate."""
    try:
        is_correct = all(torch.equal(multiply(*case), multiply_floats(*case)) for case in _test_cases())
    except (AttributeError, RuntimeError):  # an operator that this build of torch or this CPU lacks
        is_correct = False
    _log.info("%s are %s on this machine", what, "exact" if is_correct else "wrong, so slower fp32 products are taken")
    return is_correct


def _test_cases() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for num_rows, num_columns in [(1, 64), (4, 100), (5, 257), (33, 1024), (64, 4100)]:
        signed = torch.empty(num_rows, num_columns, dtype=torch.int8)
        weight = torch.empty(48, num_columns, dtype=torch.int8)
        yield signed.random_(-127, 128, generator=generator), weight.random_(-127, 128, generator=generator)
        for left, right in [(127, 127), (127, -127), (-128, 127), (-128, -127)]:
            yield torch.full_like(signed, left), torch.full_like(weight, right)


def _multiply_by_packing(signed: Tensor, weight: Tensor) -> Tensor:
    codes = signed.view(torch.uint8).bitwise_xor(ZERO_POINT)
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
    return multiply_packed(codes, pack(weight), ones, zeros)
