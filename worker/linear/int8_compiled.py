"""Layers of 8-bit weights in one call of a compiled kernel: the bits of `worker.linear.int8` on CPUs, sooner.

Covers resident weights and fp32; streamed ones, other dtypes and other machines are `Int8Group`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from worker.linear.base import LinearNumerics
from worker.linear.int8 import Int8Group, join_biases
from worker.linear.int8_products import MAX_COLUMNS, ZERO_POINT
from worker.native.library import Kernel, library
from worker.quantization import int8
from worker.stored_weight import StoredWeight

PANEL, QUAD = 16, 4  # outputs and inputs that are stored together
_NONE, _RMS_NORM, _GATE = range(3)  # what the kernel does to rows first


class CompiledInt8Group:
    """Resident 8-bit layers that share an input, packed for the kernel."""

    def __init__(
        self, weights: Sequence[StoredWeight], biases: Sequence[Tensor | None], numerics: LinearNumerics
    ) -> None:
        self._sizes = [weight.shape[0] for weight in weights]
        self._num_out, self._num_columns = sum(self._sizes), weights[0].shape[1]
        self._threshold = numerics.outlier_threshold if numerics.outlier_threshold > 0 else torch.inf
        self._scale = torch.cat([weight.small["scale"] for weight in weights])
        self._bias = join_biases(biases, self._sizes)
        self._packed = self._pack(weights)
        self._linear = Kernel("int8_linear", "pii" + "ipf" + "pppi" + "pp" + "fi")

    @property
    def sizes(self) -> Sequence[int]:
        """The number of outputs of each layer."""
        return self._sizes

    def multiply(self, x: Tensor) -> Sequence[Tensor]:
        """Map `[..., in]` to one `[..., out]` per layer, views of one tensor."""
        out = self._compute(x.contiguous(), _NONE)
        return torch.split(out, self._sizes, dim=-1) if len(self._sizes) > 1 else (out,)

    def multiply_normed(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Map the RMS norm of `[..., in]`, contiguous, to the outputs of all layers side by side."""
        return self._compute(x, _RMS_NORM, weight, epsilon)

    def multiply_added(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map `[..., in]`, contiguous, to `residual` `[..., out]` and what the layers make of it."""
        return self._compute(x, _NONE, residual=residual)

    def multiply_gated(self, both: Tensor, residual: Tensor) -> Tensor:
        """As `multiply_added` for `silu(gate) * up`, given `[..., 2 * in]`: gate and up side by side."""
        return self._compute(both, _GATE, residual=residual)

    def _compute(
        self,
        x: Tensor,
        prologue: int,
        norm_weight: Tensor | None = None,
        epsilon: float = 0.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self._num_out)
        self._linear(
            x, out.numel() // self._num_out, self._num_columns, prologue, norm_weight, epsilon,
            self._packed, self._scale, self._bias, self._num_out, residual, out,
            self._threshold, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _pack(self, weights: Sequence[StoredWeight]) -> Tensor:
        pack = Kernel("int8_pack", "piiipi")
        num_panels, num_quads = -(-self._num_out // PANEL), -(-self._num_columns // QUAD)
        packed = torch.full((num_panels, num_quads, PANEL, QUAD), ZERO_POINT, dtype=torch.uint8)
        first = 0
        for weight in weights:
            for piece in weight.pieces():
                codes = piece.tensors["weight"].contiguous()
                pack(codes, first, len(codes), self._num_columns, packed, torch.get_num_threads())
                first += len(codes)
        return packed


def is_compiled(weight: StoredWeight, numerics: LinearNumerics) -> bool:
    """Tell whether a group of such weights is the kernel's. Machines with AMX are faster with oneDNN."""
    is_plain = numerics.device.type == "cpu" and numerics.compute is torch.float32 and not weight.is_streamed
    is_fit = weight.shape[1] <= MAX_COLUMNS and not torch.cpu._is_amx_tile_supported()
    return is_plain and is_fit and has_correct_kernel()


@cache
def has_correct_kernel() -> bool:
    """Tell whether the kernel is here and gives what torch's operators give, bit for bit."""
    if library() is None:
        return False
    numerics = LinearNumerics(torch.float32, torch.device("cpu"), is_exact=False)
    weight = int8.encode("self-test", torch.linspace(-9, 9, 41 * 203).sin().view(41, 203))
    rows = torch.linspace(-99, 99, 29 * 203).cos().view(29, 203) * torch.linspace(1, 7, 203)
    groups = (group([weight], [torch.arange(41.0)], numerics) for group in (CompiledInt8Group, Int8Group))
    return all(torch.equal(mine, theirs) for mine, theirs in zip(*(g.multiply(rows) for g in groups), strict=True))
