"""Products of 8-bit weights and 8-bit inputs, exact in integers.

An input row is quantized by itself, symmetrically: its largest magnitude becomes 127. Inputs of at least the outlier
threshold are taken out first, as LLM.int8 does (https://arxiv.org/abs/2208.07339), but per row rather than per column
of all rows: neighbours never change a row. The outliers of a row become two more rows of 8-bit digits, which together
hold 16 bits relative to the largest one, and go through the same product.

Why a row has the same bits in any company, on every path here: its codes come from elementwise operations and a
maximum, neither of which depends on an order; sums of products of codes are integers below 2^31, added exactly; what
follows is elementwise again.

Covers how inputs are quantized and multiplied; weights are quantized by `worker.quantization.int8`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from worker.linear.base import LinearNumerics
from worker.stored_weight import StoredWeight

ZERO_POINT = 128  # oneDNN is fast with unsigned inputs only
MIN_ROWS = 4  # oneDNN takes longer for 1 and 2 rows than for 4
PACK_BYTES = 64 << 20  # of weights packed together: layers that share an input become one product
EXACT_COLUMNS = 1024  # sums of so many products of codes are exact in fp32: 128 * 127 * 1024 < 2^24
MAX_COLUMNS = 65536  # sums of so many are below 2^31 with the zero point: 255 * 127 * 65536
TINY = 1e-30  # instead of a row's largest magnitude, where that is 0


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows as the product takes them."""

    codes: Tensor  # uint8 [num_rows + 2 * num_outlier_rows, in], ZERO_POINT for 0
    scale: Tensor  # fp32 [num_rows, 1]
    outlier_rows: Tensor | None  # int64: rows whose high digits, and after those their low digits, are the last codes
    outlier_scale: Tensor | None  # fp32 [num_outlier_rows, 1], of the low digits


def quantize_rows(rows: Tensor, threshold: float) -> QuantizedRows:
    """Quantize `[num_rows, in]`. Rows that hold NaN or infinity get a scale that makes their results so."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    if threshold > 0 and rows.numel() and not float(largest.max()) < threshold:
        return _quantize_with_outliers(rows.float(), threshold)
    scale = largest.clamp_(min=TINY).div_(127)
    return QuantizedRows(_encode(rows, scale), scale, None, None)


def _quantize_with_outliers(rows: Tensor, threshold: float) -> QuantizedRows:
    ordinary = rows.masked_fill(rows.abs() >= threshold, 0)
    outliers = rows - ordinary
    largest = outliers.abs().amax(dim=1, keepdim=True)
    chosen = largest[:, 0].gt(0).nonzero()[:, 0]
    outlier_scale = largest[chosen].div_(127 * 256)
    high, low = _digits(outliers[chosen], outlier_scale)
    scale = ordinary.abs().amax(dim=1, keepdim=True).clamp_(min=TINY).div_(127)
    return QuantizedRows(torch.cat([_encode(ordinary, scale), high, low]), scale, chosen, outlier_scale)


def _encode(rows: Tensor, scale: Tensor) -> Tensor:
    return torch.div(rows, scale).add_(ZERO_POINT + 0.5).to(torch.uint8)


def _digits(outliers: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the digits of `outliers / scale`: 256 times the first and the second add up to it, rounded."""
    codes = torch.div(outliers, scale).round_().to(torch.int32).clamp_(-127 * 256, 127 * 256)
    low = (codes + 128).bitwise_and_(255)
    high = (codes + 128).bitwise_right_shift_(8).add_(ZERO_POINT)
    return high.to(torch.uint8), low.to(torch.uint8)


class Int8Group:
    """8-bit layers that share an input, which is quantized once."""

    def __init__(
        self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None], numerics: LinearNumerics
    ) -> None:
        self._sizes = [weight.shape[0] for weight in weights]
        self._biases, self._numerics = biases, numerics
        self._products = choose_products(weights)

    def multiply(self, x: Tensor) -> Sequence[Tensor]:
        """Map `[..., in]` to one `[..., out]` per layer, which may be views of one tensor."""
        rows = x.reshape(-1, x.shape[-1])
        quantized = quantize_rows(rows, self._numerics.outlier_threshold)
        out = _gather(self._products(quantized.codes), quantized.codes.shape[0], sum(self._sizes))
        scaled = _scale(out, quantized)
        parts = torch.split(scaled, self._sizes, dim=1) if len(self._sizes) > 1 else [scaled]
        return [_finish(part, bias, x, self._numerics.compute) for part, bias in zip(parts, self._biases, strict=True)]


def _gather(products: Iterable[Tensor], num_rows: int, num_out: int) -> Tensor:
    """Lay products of adjacent output rows side by side; a single one stays where it is."""
    out, first = None, 0
    for product in products:
        if product.shape[1] == num_out:
            return product
        out = product.new_empty(num_rows, num_out) if out is None else out
        out[:, first : first + product.shape[1]] = product
        first += product.shape[1]
    assert out is not None
    return out


def _scale(out: Tensor, quantized: QuantizedRows) -> Tensor:
    """Return `[num_rows, out]` from the product of all codes, in its memory."""
    num_rows = quantized.scale.shape[0]
    scaled = out[:num_rows].mul_(quantized.scale)
    if quantized.outlier_rows is not None and quantized.outlier_scale is not None:
        high, low = out[num_rows:].chunk(2)
        scaled[quantized.outlier_rows] += high.mul_(256).add_(low).mul_(quantized.outlier_scale)
    return scaled


def _finish(part: Tensor, bias: Tensor | None, x: Tensor, compute: torch.dtype) -> Tensor:
    if bias is not None:
        part += bias
    return part.to(compute).view(*x.shape[:-1], part.shape[1])


Products = Callable[[Tensor], Iterator[Tensor]]
"""Maps codes uint8 `[num_rows, in]` to products with adjacent output rows, fp32, times the weight's scale."""


def choose_products(weights: Sequence[StoredWeight]) -> Products:
    """Return the fastest way that this machine computes correctly."""
    is_short = weights[0].shape[1] <= MAX_COLUMNS
    if weights[0].is_streamed:
        multiply = multiply_views if is_short and has_correct_views() else multiply_floats
        return _over_pieces(weights, multiply)
    if is_short and has_correct_packs():
        return PackedProducts(weights)
    return _over_pieces(weights, multiply_floats)


class PackedProducts:
    """oneDNN's product over weights in its own layout, which depends on this machine: never store it."""

    def __init__(self, weights: Sequence[StoredWeight]) -> None:
        self._packed = [
            (_pack(codes), scale, torch.zeros(len(scale), dtype=torch.int32)) for codes, scale in _batches(weights)
        ]

    def __call__(self, codes: Tensor) -> Iterator[Tensor]:
        num_rows = codes.shape[0]
        padded = functional.pad(codes, (0, 0, 0, max(0, MIN_ROWS - num_rows)))
        for packed, scale, zero in self._packed:
            yield multiply_packed(padded, packed, scale, zero)[:num_rows]


def _batches(weights: Sequence[StoredWeight]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield codes and scales of all weights' rows in order, small pieces together."""
    codes: list[Tensor] = []
    scales: list[Tensor] = []
    for weight in weights:
        for piece in weight.pieces():
            stored = piece.tensors["weight"]
            if codes and sum(held.nbytes for held in codes) + stored.nbytes > PACK_BYTES:
                yield torch.cat(codes), torch.cat(scales)
                codes, scales = [], []
            codes.append(stored)
            scales.append(_part_of_scale(weight, piece.first_row, piece.num_rows))
    yield torch.cat(codes), torch.cat(scales)


def _over_pieces(weights: Sequence[StoredWeight], multiply: Callable[[Tensor, Tensor], Tensor]) -> Products:
    """Multiply with pieces as they come."""

    def products(codes: Tensor) -> Iterator[Tensor]:
        signed = codes.bitwise_xor(ZERO_POINT).view(torch.int8)
        for weight in weights:
            for piece in weight.pieces():
                scale = _part_of_scale(weight, piece.first_row, piece.num_rows)
                yield multiply(signed, piece.tensors["weight"]).mul_(scale)

    return products


def _part_of_scale(weight: StoredWeight, first: int, count: int) -> Tensor:
    return weight.small["scale"][first : first + count]


def _pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


def multiply_packed(codes: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the product of uint8 `codes` and a packed weight, times the weight's scale."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ZERO_POINT, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@cache
def has_correct_packs() -> bool:
    """Tell whether this machine multiplies packed weights exactly; without VNNI sums of two products may saturate."""
    try:
        return all(torch.equal(_multiply_by_packing(*case).double(), _reference(*case)) for case in _test_cases())
    except (AttributeError, RuntimeError):  # an operator that this build or CPU lacks
        return False


@cache
def has_correct_views() -> bool:
    """Tell whether this machine multiplies weights as stored exactly."""
    try:
        return all(torch.equal(multiply_views(*case).double(), _reference(*case)) for case in _test_cases())
    except (AttributeError, RuntimeError):
        return False


def _test_cases() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and weights whose sums are below 2^24, extremes included."""
    generator = torch.Generator().manual_seed(0)
    for num_rows, num_columns in [(1, 64), (4, 100), (5, 257), (33, 1024)]:
        signed = torch.empty(num_rows, num_columns, dtype=torch.int8)
        weight = torch.empty(48, num_columns, dtype=torch.int8)
        yield signed.random_(-127, 128, generator=generator), weight.random_(-127, 128, generator=generator)
        for left, right in [(127, 127), (127, -127), (-128, 127), (-128, -127)]:
            yield torch.full_like(signed, left), torch.full_like(weight, right)


def _reference(signed: Tensor, weight: Tensor) -> Tensor:
    return signed.double() @ weight.double().t()


def _multiply_by_packing(signed: Tensor, weight: Tensor) -> Tensor:
    codes = signed.view(torch.uint8).bitwise_xor(ZERO_POINT)
    ones, zeros = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0], dtype=torch.int32)
    return multiply_packed(codes, _pack(weight), ones, zeros)


def multiply_views(signed: Tensor, weight: Tensor) -> Tensor:
    """Return the product of int8 codes `[num_rows, in]` and a weight as stored, `[num_rows, out]` of fp32."""
    return torch._int_mm(signed, weight.t()).float()


def multiply_floats(signed: Tensor, weight: Tensor) -> Tensor:
    """The same by fp32 products, which any machine has; each is short enough to be exact."""
    total = torch.zeros(signed.shape[0], weight.shape[0], dtype=torch.int64)
    for start in range(0, weight.shape[1], EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        total += functional.linear(signed[:, columns].float(), weight[:, columns].float()).to(torch.int64)
    return total.float()
