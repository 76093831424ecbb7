"""Layers of 8-bit weights: their inputs become 8-bit, are multiplied in integers, and scaled.

An input row is quantized by itself, symmetrically: its largest magnitude becomes 127. Outliers are taken out first,
as LLM.int8 does (https://arxiv.org/abs/2208.07339), but per row rather than per column of all rows: neighbours never
change a row. They are the inputs of at least the outlier threshold, and those that stand out of their row by
MEAN_FACTOR: without them small models, whose inputs seldom reach the threshold, would lose most
(benchmarks/quality.py). The outliers of a row become two rows of 8-bit digits, which together hold 16 bits relative
to the largest one. These go through the same product as two more rows; or, where many rows have outliers in few
columns, unit rows go through it instead, which bring those columns of the weight, and the digits are multiplied with
them in fp32: sums below 2^24, so exact and the same.

Why a row has the same bits in any company: its codes come from elementwise operations, a maximum and a sum of
integers, none of which depends on an order; products of codes are summed exactly, in integers; what follows is
elementwise again, one rounding per operation, since a fused one may round otherwise where a vector loop ends.

Covers inputs and results; `worker.linear.int8_products` multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.linear.base import LinearNumerics
from worker.linear.int8_products import EXACT_COLUMNS, ZERO_POINT, choose_products
from worker.stored_weight import StoredWeight

LARGEST_CODE = 127
UNIT_COST = 8  # what using unit rows costs besides, in rows
LARGEST_DIGITS = 127 * 256  # what the two digits of a row's largest outlier make
MEAN_FACTOR = 10  # times the mean magnitude of a row: what is at least as large stands out
MEAN_STEPS = 32767  # of a row's largest magnitude: in these its mean is measured, so that sums are those of integers
TINY = 1e-30  # instead of a row's largest magnitude, where that is 0


@dataclass(frozen=True, slots=True)
class Outliers:
    """What the product of the codes behind those of all rows means."""

    rows: Tensor  # int64 [num_outlier_rows]
    scale: Tensor  # fp32 [num_outlier_rows, 1], of the low digits
    digits: Tensor | None  # fp32 [2 * num_outlier_rows, num_columns] if those codes are unit rows; None: the digits


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows as a product takes them. Codes are those of the rows, then of outliers; others may follow."""

    codes: Tensor  # uint8 [at least num_rows, in], ZERO_POINT for 0
    scale: Tensor  # fp32 [num_rows, 1]
    outliers: Outliers | None


class RowQuantizer:
    """Quantizes rows, in as few operations as it takes: at one row each costs as much as its numbers."""

    def __init__(self, numerics: LinearNumerics, num_columns: int, min_rows: int, *, can_divide: bool) -> None:
        """`min_rows` is how many rows of codes there are to be at least. If `can_divide`, a product of a unit row
        divided by the weights' scales gives a column of the weight."""
        self._can_divide = can_divide
        self._has_outliers = 0 < numerics.outlier_threshold < torch.inf
        self._threshold = torch.tensor(numerics.outlier_threshold, dtype=torch.float32, device=numerics.device)
        self._mean_factor = torch.tensor(MEAN_FACTOR / (MEAN_STEPS * num_columns), dtype=torch.float32)
        self._padded = torch.empty(min_rows, num_columns, dtype=torch.uint8, device=numerics.device)
        self._places = [self._padded[:num_rows] for num_rows in range(min_rows)]
        # tensors, since torch would make one of each number at each use
        self._largest_code = torch.tensor(float(LARGEST_CODE))
        self._offset = torch.tensor(ZERO_POINT + 0.5)

    def quantize(self, rows: Tensor) -> QuantizedRows:
        """Quantize `[num_rows, in]`; codes of few rows are valid until the next call.

        What NaN or infinity is multiplied with becomes such, in its own row only.
        """
        largest, limit = self._measure(rows)
        is_plain = (largest < limit) & (largest >= TINY)
        if not bool(is_plain.all()):
            return self._take_outliers(rows.float(), largest, limit)
        scale = torch.div(largest, self._largest_code)
        shifted = self._shift(rows, scale)
        if len(rows) >= len(self._places):
            return QuantizedRows(shifted.to(torch.uint8), scale, None)
        self._places[len(rows)].copy_(shifted)
        return QuantizedRows(self._padded, scale, None)

    def _measure(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows' largest magnitudes, and from what magnitude on inputs are outliers; both `[num_rows, 1]`."""
        magnitudes = rows.float().abs()
        largest = magnitudes.amax(dim=1, keepdim=True)
        if not self._has_outliers:
            return largest, torch.full_like(largest, torch.inf)
        steps = torch.div(MEAN_STEPS, largest.clamp(min=TINY))
        total = magnitudes.mul_(steps).to(torch.int32).sum(dim=1, keepdim=True)
        limit = torch.minimum(total.float() * self._mean_factor * largest, self._threshold)
        return largest, torch.where((largest >= TINY) & largest.isfinite(), limit, self._threshold)

    def _shift(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Return floats that conversion to integers, which cuts off what follows the point, makes codes."""
        return torch.div(rows, scale).add_(self._offset)

    def _take_outliers(self, rows: Tensor, largest: Tensor, limit: Tensor) -> QuantizedRows:
        """Quantize rows whose largest magnitudes are `largest`, at least the limit in some, or not a number."""
        chosen = (largest < limit).logical_not_()[:, 0].nonzero()[:, 0]
        others = torch.where(rows.abs() >= limit, rows, 0.0)
        ordinary = rows - others
        scale = ordinary.abs().amax(dim=1, keepdim=True).clamp_(min=TINY).div_(self._largest_code)
        codes = self._shift(ordinary, scale).to(torch.uint8)
        if not len(chosen):
            return QuantizedRows(codes, scale, None)
        outlier_scale = largest[chosen].div_(LARGEST_DIGITS)
        more, digits = self._choose_rows(_digits(others[chosen], outlier_scale))
        return QuantizedRows(torch.cat([codes, more]), scale, Outliers(chosen, outlier_scale, digits))

    def _choose_rows(self, digits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the fewest rows of codes that give the product of `digits`, and the digits if those are unit rows."""
        max_columns = min(len(digits) - UNIT_COST, EXACT_COLUMNS)
        if max_columns <= 0 or not self._can_divide:
            return digits, None
        columns = (digits != ZERO_POINT).any(dim=0).nonzero()
        if len(columns) > max_columns:
            return digits, None
        units = torch.full_like(digits[: len(columns)], ZERO_POINT).scatter_(1, columns, ZERO_POINT + 1)
        return units, digits[:, columns[:, 0]].float().sub_(ZERO_POINT)


def _digits(outliers: Tensor, scale: Tensor) -> Tensor:
    """Return codes, all high digits and then all low ones: 256 * high + low is `outliers / scale`, rounded."""
    whole = torch.div(outliers, scale).add_(257 * ZERO_POINT + 0.5).to(torch.int32)
    return torch.cat([whole.bitwise_right_shift(8), whole]).to(torch.uint8)  # which keeps the lowest 8 bits


class Int8Group:
    """8-bit layers that share an input, which is quantized once."""

    def __init__(
        self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None], numerics: LinearNumerics
    ) -> None:
        self._sizes = [weight.shape[0] for weight in weights]
        self._bias = join_biases(biases, self._sizes)
        self._compute = numerics.compute
        self.products = choose_products(weights, numerics.device)
        can_divide = bool(self.products.scale.min() > TINY)
        self._quantizer = RowQuantizer(numerics, weights[0].shape[1], self.products.min_rows, can_divide=can_divide)

    def multiply(self, x: Tensor) -> Sequence[Tensor]:
        """Map `[..., in]` to one `[..., out]` per layer, which may be views of one tensor."""
        quantized = self._quantizer.quantize(x.reshape(-1, x.shape[-1]))
        products = _gather(self.products.multiply(quantized.codes), sum(self._sizes))
        num_rows = len(quantized.scale)
        out = (products[:num_rows] if len(products) > num_rows else products).mul_(quantized.scale)
        if quantized.outliers is not None:
            self._add_outliers(out, products[num_rows:], quantized.outliers)
        if self._bias is not None:
            out.add_(self._bias)
        if out.dtype is not self._compute:
            out = out.to(self._compute)
        out = out.view(*x.shape[:-1], out.shape[1])
        return torch.split(out, self._sizes, dim=-1) if len(self._sizes) > 1 else (out,)

    def _add_outliers(self, out: Tensor, products: Tensor, outliers: Outliers) -> None:
        """Add what outliers make to `out`, given the products of the codes behind those of its rows."""
        if outliers.digits is not None:
            columns = products.div_(self.products.scale).round_()
            products = (outliers.digits @ columns).mul_(self.products.scale)
        high, low = torch.split(products, len(outliers.rows))
        out.index_add_(0, outliers.rows, high.mul_(256).add_(low).mul_(outliers.scale))


def join_biases(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Return one bias for all layers, zeros where a layer has none."""
    if all(bias is None for bias in biases):
        return None
    parts = [torch.zeros(size) if bias is None else bias for bias, size in zip(biases, sizes, strict=True)]
    device = next(bias.device for bias in biases if bias is not None)
    return torch.cat([part.to(device, torch.float32) for part in parts])


def _gather(products: Iterable[Tensor], num_out: int) -> Tensor:
    """Lay products of adjacent output rows side by side; a single one stays where it is."""
    out, first = torch.empty(0), 0
    for product in products:
        if product.shape[1] == num_out:
            return product
        if not first:
            out = product.new_empty(len(product), num_out)
        out[:, first : first + product.shape[1]] = product
        first += product.shape[1]
    return out
