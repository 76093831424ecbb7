"""Layers of 8-bit weights: their inputs become 8-bit, are multiplied in integers, and scaled.

An input row is quantized by itself, symmetrically: its largest magnitude becomes 127. Inputs of at least the outlier
threshold are taken out first, as LLM.int8 does (https://arxiv.org/abs/2208.07339), but per row rather than per column
of all rows: neighbours never change a row. The outliers of a row become two more rows of 8-bit digits, which together
hold 16 bits relative to the largest one, and go through the same product.

Why a row has the same bits in any company: its codes come from elementwise operations and a maximum, neither of which
depends on an order; products of codes are summed exactly, in integers; what follows is elementwise again, one rounding
per operation, since a fused one may round otherwise where a vector loop ends.

Covers inputs and results; `worker.linear.int8_products` multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.linear.base import LinearNumerics
from worker.linear.int8_products import ZERO_POINT, choose_products
from worker.stored_weight import StoredWeight

LARGEST_CODE = 127
LARGEST_DIGITS = 127 * 256  # what the two digits of a row's largest outlier make
TINY = 1e-30  # instead of a row's largest magnitude, where that is 0


@dataclass(frozen=True, slots=True)
class Outliers:
    """Where digits belong: the codes behind those of all rows are high digits of these rows, then their low ones."""

    rows: Tensor  # int64 [num_outlier_rows]
    scale: Tensor  # fp32 [num_outlier_rows, 1], of the low digits


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows as a product takes them."""

    codes: Tensor  # uint8 [num_rows + 2 * num_outlier_rows, in], ZERO_POINT for 0; more rows of any content may follow
    scale: Tensor  # fp32 [num_rows, 1]
    outliers: Outliers | None


class RowQuantizer:
    """Quantizes rows, in as few operations as it takes: at one row each costs as much as its numbers."""

    def __init__(self, numerics: LinearNumerics, num_columns: int, min_rows: int) -> None:
        """`min_rows` is how many rows of codes there are to be at least."""
        self._threshold = numerics.outlier_threshold if numerics.outlier_threshold > 0 else torch.inf
        self._padded = torch.empty(min_rows, num_columns, dtype=torch.uint8, device=numerics.device)
        self._places = [self._padded[:num_rows] for num_rows in range(min_rows)]
        # tensors, since torch would make one of each number at each use
        self._largest_code = torch.tensor(float(LARGEST_CODE))
        self._offset = torch.tensor(ZERO_POINT + 0.5)

    def quantize(self, rows: Tensor) -> QuantizedRows:
        """Quantize `[num_rows, in]`; codes of few rows are valid until the next call.

        What NaN or infinity is multiplied with becomes such, in its own row only.
        """
        largest = rows.abs().amax(dim=1, keepdim=True).float()
        if not all(0 < magnitude < self._threshold for (magnitude,) in largest.tolist()):
            return self._take_outliers(rows.float())
        scale = torch.div(largest, self._largest_code)
        shifted = self._shift(rows, scale)
        if len(rows) >= len(self._places):
            return QuantizedRows(shifted.to(torch.uint8), scale, None)
        self._places[len(rows)].copy_(shifted)
        return QuantizedRows(self._padded, scale, None)

    def _shift(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Return floats that conversion to integers, which cuts off what follows the point, makes codes."""
        return torch.div(rows, scale).add_(self._offset)

    def _take_outliers(self, rows: Tensor) -> QuantizedRows:
        ordinary = rows.masked_fill(rows.abs() >= self._threshold, 0)
        scale = ordinary.abs().amax(dim=1, keepdim=True).clamp_(min=TINY).div_(self._largest_code)
        codes = self._shift(ordinary, scale).to(torch.uint8)
        others = rows - ordinary
        largest = others.abs().amax(dim=1, keepdim=True)
        chosen = (largest[:, 0] != 0).nonzero()[:, 0]
        if not len(chosen):
            return QuantizedRows(codes, scale, None)
        outliers = Outliers(chosen, largest[chosen].div_(LARGEST_DIGITS))
        return QuantizedRows(torch.cat([codes, *_digits(others[chosen], outliers.scale)]), scale, outliers)


def _digits(outliers: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of two digits: 256 times the first and the second add up to `outliers / scale`, rounded."""
    whole = torch.div(outliers, scale).round_().to(torch.int32).clamp_(-LARGEST_DIGITS, LARGEST_DIGITS).add_(128)
    return whole.bitwise_right_shift(8).add_(ZERO_POINT).to(torch.uint8), whole.bitwise_and(255).to(torch.uint8)


class Int8Group:
    """8-bit layers that share an input, which is quantized once."""

    def __init__(
        self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None], numerics: LinearNumerics
    ) -> None:
        self._sizes = [weight.shape[0] for weight in weights]
        self._bias = _join(biases, self._sizes)
        self._compute = numerics.compute
        self._products = choose_products(weights, numerics.device)
        self._quantizer = RowQuantizer(numerics, weights[0].shape[1], self._products.min_rows)

    def multiply(self, x: Tensor) -> Sequence[Tensor]:
        """Map `[..., in]` to one `[..., out]` per layer, which may be views of one tensor."""
        quantized = self._quantizer.quantize(x.reshape(-1, x.shape[-1]))
        out = _scale(_gather(self._products.multiply(quantized.codes), sum(self._sizes)), quantized)
        if self._bias is not None:
            out.add_(self._bias)
        if out.dtype is not self._compute:
            out = out.to(self._compute)
        out = out.view(*x.shape[:-1], out.shape[1])
        return torch.split(out, self._sizes, dim=-1) if len(self._sizes) > 1 else (out,)


def _join(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
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


def _scale(out: Tensor, quantized: QuantizedRows) -> Tensor:
    """Return `[num_rows, out]` from the product of all codes, in its memory."""
    num_rows, outliers = len(quantized.scale), quantized.outliers
    scaled = out[:num_rows] if len(out) > num_rows else out
    scaled.mul_(quantized.scale)
    if outliers is not None:
        high, low = torch.split(out[num_rows:], len(outliers.rows))
        scaled[outliers.rows] += high.mul_(256).add_(low).mul_(outliers.scale)
    return scaled
