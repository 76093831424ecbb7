"""Gated multi-layer perceptrons: `down(activation(gate(x)) * up(x))`, activation and product in one pass over memory.

Covers those of every family whose layers are named as below; experts use `multiply_gated` by themselves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import SiLUActivation

from worker.native.rows import silu_multiply

LAYERS = ("gate_proj", "up_proj", "down_proj", "act_fn")
FUSED_LAYERS = ("gate_up_proj", "down_proj", "activation_fn")  # gate and up are halves of one layer's output


class GatedMlp(nn.Module):
    """Takes its layers, by their names, from a perceptron of transformers'."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (getattr(original, name) for name in LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., hidden_size]` to the same shape."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        out: Tensor = self.down_proj(multiply_gated(self.act_fn, gate, up))
        return out


class FusedGatedMlp(nn.Module):
    """As GatedMlp, with gate and up in one layer."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = (getattr(original, name) for name in FUSED_LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., hidden_size]` to the same shape."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(multiply_gated(self.activation_fn, gate, up))
        return out


def multiply_gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Return `activation(gate) * up`."""
    product = silu_multiply(gate, up) if is_silu(activation) else None
    return activation(gate) * up if product is None else product


def is_silu(activation: Any) -> bool:
    """Tell whether the function is SiLU, perhaps within another module that makes torch's version of it exact."""
    return isinstance(getattr(activation, "inner", activation), nn.SiLU | SiLUActivation)


def replace_gated_mlps(module: nn.Module) -> None:
    """Replace every gated perceptron of transformers' within `module`."""
    for name, child in module.named_children():
        if all(hasattr(child, layer) for layer in LAYERS):
            setattr(module, name, GatedMlp(child))
        elif all(hasattr(child, layer) for layer in FUSED_LAYERS):
            setattr(module, name, FusedGatedMlp(child))
        else:
            replace_gated_mlps(child)
