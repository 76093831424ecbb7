"""Linear layers are asked for in order of use, those that share an input together."""

from __future__ import annotations

import pytest

from cluster.model_spec import SUPPORTED_ARCHITECTURES
from tests.checkpoints import CONFIGS
from worker.architectures import open_architecture
from worker.blocks import linear_groups, linear_shape, small_shapes

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = [QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
EXPERTS = [group for number in range(5) for group in (("w1", "w3", number), ("w2", number))]
ORDERS = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "mixtral": [
        QKV,
        ("self_attn.o_proj",),
        ("mlp.gate",),
        *(tuple(f"mlp.experts.{names[-1]}.{name}" for name in names[:-1]) for names in EXPERTS),
    ],
}


@pytest.mark.parametrize("architecture", ORDERS)
def test_layers_come_in_order_of_use(architecture: str) -> None:
    part = open_architecture({"model_type": architecture, **CONFIGS[architecture]}).build_part("block-0001")
    groups = linear_groups(part.module, part.use)
    assert [tuple(layer.name for layer in group) for group in groups] == ORDERS[architecture]


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
@pytest.mark.parametrize("name", ["embedding", "block-0000", "head"])
def test_every_parameter_is_a_layers_weight_or_small(architecture: str, name: str) -> None:
    part = open_architecture({"model_type": architecture, **CONFIGS[architecture]}).build_part(name)
    layers = [layer for group in linear_groups(part.module, part.use) for layer in group]
    found = {f"{layer.name}.weight" for layer in layers} | set(small_shapes(part.module))
    assert found == {name for name, _ in part.module.named_parameters()}
    for layer in layers:
        assert linear_shape(part.module.get_submodule(layer.name)) == layer.shape
