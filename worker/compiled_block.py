"""Blocks of resident 8-bit layers in few calls: norms, gates and residuals are computed on the way into and out of the
compiled products.

Covers the block that Llama made common: norm, attention with rotary embeddings, norm, gated perceptron. Kernels take
the same steps as the modules that it stands for, so results are the same bit for bit; other blocks stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worker.blocks import StepContext
from worker.gated import GatedMlp, is_silu
from worker.linear.int8_compiled import CompiledInt8Group
from worker.linear.shared_input import SharingLinear
from worker.rms_norm import RMSNorm
from worker.rotary_attention import RotaryAttention


class CompiledBlock(nn.Module):
    """Stands for a block, which it keeps: whoever looks for a layer finds it where it was."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        attention, self._norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
        self._number, self._scale, self._window = attention.block, attention.scale, attention.window
        self._head_dim = attention.head_dim
        self._qkv, self._out = _group(attention.q_proj), _group(attention.o_proj)
        self._gate_up, self._down = _group(block.mlp.gate_proj), _group(block.mlp.down_proj)
        self._heads = [size // attention.head_dim for size in self._qkv.sizes]

    def forward(self, hidden: Tensor, *, step: StepContext, **_: object) -> Tensor:
        """Map `[1, num_tokens, hidden_size]` to the same shape, by the signature of transformers' block."""
        hidden = hidden.contiguous()
        before_attention, before_mlp = self._norms
        joined = self._qkv.multiply_normed(hidden, before_attention.weight, before_attention.epsilon)
        heads = joined.view(hidden.shape[1], -1, self._head_dim)
        query, key, value = torch.split(heads, self._heads, dim=1)
        attended = step.attend(self._number, query, key, value, scale=self._scale, window=self._window)
        hidden = self._out.multiply_added(attended.view(1, hidden.shape[1], -1), hidden)
        both = self._gate_up.multiply_normed(hidden, before_mlp.weight, before_mlp.epsilon)
        return self._down.multiply_gated(both, hidden)


def compile_block(block: nn.Module) -> nn.Module:
    """Return a CompiledBlock for a block that is of its kind, and the block itself otherwise."""
    return CompiledBlock(block) if _is_fit(block) else block


def _is_fit(block: Any) -> bool:
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    norms = [getattr(block, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    if type(attention) is not RotaryAttention or attention.has_norms or type(mlp) is not GatedMlp:
        return False
    if not (is_silu(mlp.act_fn) and all(isinstance(norm, RMSNorm) for norm in norms)):
        return False
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    return all(map(_is_group, (qkv, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])))


def _is_group(layers: Sequence[Any]) -> bool:
    """Tell whether these are all layers of one compiled group, in this order."""
    if not all(isinstance(layer, SharingLinear) for layer in layers):
        return False
    group = layers[0].shared.group
    is_one = all(layer.shared.group is group for layer in layers)
    return is_one and isinstance(group, CompiledInt8Group) and len(group.sizes) == len(layers)


def _group(layer: Any) -> CompiledInt8Group:
    group: CompiledInt8Group = layer.shared.group
    return group
