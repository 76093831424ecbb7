"""Gated perceptrons and row kernels against torch's operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from worker.blocks import ExactActivation
from worker.gated import GatedMlp, is_silu, multiply_gated, replace_gated_mlps
from worker.native import rows
from worker.native.library import library
from worker.native.rows import rms_norm, silu_multiply

is_built = pytest.mark.skipif(library() is None, reason="the kernels are not built here")
SHAPES = (st.integers(1, 40), st.integers(1, 300), st.sampled_from([1e-3, 1.0, 30.0]), st.integers(0, 2**31))


class Perceptron(nn.Module):
    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


@is_built
@given(*SHAPES)
@settings(max_examples=60, deadline=None)
def test_an_rms_norm_is_torchs_up_to_rounding(num_rows: int, size: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, num_rows, size, generator=generator) * scale
    weight = torch.randn(size, generator=generator)
    normed = rms_norm(x, weight, 1e-5)
    assert normed is not None
    expected = functional.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(normed[:, -1:], rms_norm(x[:, -1:], weight, 1e-5))


@is_built
@given(*SHAPES)
@settings(max_examples=60, deadline=None)
def test_a_gated_activation_is_torchs_up_to_rounding(num_rows: int, size: int, scale: float, seed: int) -> None:
    both = torch.randn(1, num_rows, 2 * size, generator=torch.Generator().manual_seed(seed)) * scale
    gate, up = both.chunk(2, dim=-1)
    product = silu_multiply(gate, up)
    assert product is not None
    torch.testing.assert_close(product.double(), functional.silu(gate.double()) * up.double(), rtol=1e-6, atol=1e-30)
    assert torch.equal(product[:, -1:], multiply_gated(nn.SiLU(), gate[:, -1:], up[:, -1:]))


@is_built
def test_activations_at_the_ends_of_the_range_are_finite_and_those_of_no_numbers_are_none() -> None:
    gate = torch.tensor([[-torch.inf, -3e38, -110.0, -89.0, -87.0, 0.0, 88.0, 110.0, 3e38, torch.nan]])
    product = silu_multiply(gate, torch.ones_like(gate))
    assert product is not None
    assert product[0, 1:5].abs().max() < 1e-30
    assert torch.equal(product[0, 5:9], gate[0, 5:9])
    assert product[0, 9].isnan()


def test_other_dtypes_and_strides_are_left_to_torch() -> None:
    assert silu_multiply(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)) is None
    assert silu_multiply(torch.ones(3, 2).t(), torch.ones(3, 2).t()) is None
    assert rms_norm(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3), 1e-5) is None


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU()])
def test_a_replaced_perceptron_computes_the_same(
    has_kernels: bool, activation: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr(rows, "library", lambda: None)
    module = nn.ModuleDict({"mlp": Perceptron(activation)})
    x = torch.randn(1, 5, 8)
    expected = module["mlp"](x)
    replace_gated_mlps(module)
    assert isinstance(module["mlp"], GatedMlp)
    torch.testing.assert_close(module["mlp"](x), expected)


def test_llamas_activation_is_known_alone_and_made_exact() -> None:
    activation = ACT2FN["silu"]
    assert is_silu(activation)
    assert is_silu(ExactActivation(activation))
    assert not is_silu(ACT2FN["gelu"])
