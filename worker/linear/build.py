"""Which layer multiplies with which weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

from cluster.errors import ConfigurationError
from cluster.model_spec import Precision
from worker.linear.base import Linear, LinearNumerics, Scratch
from worker.linear.floating import build_floating, choose_product_dtype
from worker.linear.int8 import Int8Group
from worker.linear.int8_compiled import CompiledInt8Group, is_compiled
from worker.linear.nf4 import build_nf4
from worker.linear.shared_input import SharedInput, SharingLinear
from worker.stored_weight import StoredWeight


def build_linears(
    weights: Sequence[StoredWeight], biases: Sequence[Tensor | None], numerics: LinearNumerics, scratch: Scratch
) -> list[nn.Module]:
    """Return one module per weight, each mapping `[..., in]` to `[..., out]` in the compute dtype.

    All of them will be called with the same input, in this order; a list of one is a layer by itself. Layers of one
    stage share a `scratch`. Resident weights are held or packed here, streamed ones asked for their pieces at every
    call. With `is_exact` a row's bits do not depend on the others; with `is_checked`, too, raises
    ConfigurationError where this machine cannot do that.
    """
    biases = [None if bias is None else bias.to(numerics.device) for bias in biases]
    built: list[nn.Module] = []
    for (kind, _), pairs in groupby(
        zip(weights, biases, strict=True), lambda pair: (pair[0].kind, pair[0].is_streamed)
    ):
        group = list(pairs)
        if kind is Precision.INT8:
            built += _build_int8(group, numerics)
        else:
            built += [_build_one(weight, bias, numerics, scratch) for weight, bias in group]
    return built


def _build_int8(group: list[tuple[StoredWeight, Tensor | None]], numerics: LinearNumerics) -> list[nn.Module]:
    build = CompiledInt8Group if is_compiled(group[0][0], numerics) else Int8Group
    computed = build([weight for weight, _ in group], [bias for _, bias in group], numerics)
    shared = SharedInput(computed)
    return [SharingLinear(shared, index) for index in range(len(group))]


def _build_one(weight: StoredWeight, bias: Tensor | None, numerics: LinearNumerics, scratch: Scratch) -> nn.Module:
    product = replace(numerics, compute=choose_product_dtype(numerics))
    bias = None if bias is None else bias.to(product.compute)
    if weight.kind is Precision.NF4:
        linear = build_nf4(weight, bias, product)
    else:
        linear = build_floating(weight, bias, product, scratch)
    if numerics.is_exact and numerics.is_checked and not weight.is_streamed:
        check_rows(linear, torch.zeros(1, weight.shape[1], dtype=product.compute, device=product.device))
    return linear if product == numerics else WidenedLinear(linear)


class WidenedLinear(nn.Module):
    """Multiplies in fp32 what comes and goes in a dtype that this CPU cannot multiply in."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        widened: Tensor = self.linear(x.float())
        return widened.to(x.dtype)


def check_rows(linear: Linear, zeros: Tensor) -> None:
    """Raise ConfigurationError unless a row `[1, in]` alone and among others has the same bits on this machine."""
    row = torch.linspace(-8, 8, zeros.shape[1]).sin().to(zeros)
    alone, among = linear(zeros + row), linear(zeros.expand(37, -1) + row)
    if not torch.equal(alone.expand_as(among), among):
        raise ConfigurationError(
            "this machine's matrix products round a row differently when others are computed with it, so exact "
            "results are not possible here: serve without --exact"
        )
