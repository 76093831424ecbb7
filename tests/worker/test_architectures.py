"""Which models are admitted, which are refused and in what words, and the parts that families do not share."""

from __future__ import annotations

from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

import worker.architectures
from cluster.errors import ConfigurationError
from cluster.model_spec import SUPPORTED_ARCHITECTURES
from tests.checkpoints import CONFIGS
from worker.architectures import open_architecture
from worker.architectures.bloom import alibi_slopes
from worker.architectures.mixtral import SparseExperts
from worker.blocks import ExactActivation


def config_of(architecture: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": architecture, **CONFIGS[architecture], **changes}


def test_the_allowlist_is_the_folder_of_adapters() -> None:
    modules = {module.name for module in iter_modules(worker.architectures.__path__)} - {"base"}
    assert modules == set(SUPPORTED_ARCHITECTURES)
    for architecture in SUPPORTED_ARCHITECTURES:
        assert open_architecture(config_of(architecture)).num_blocks == 3


@pytest.mark.parametrize("model_type", ["falcon", "deepseek_v3", "llama4"])
def test_other_models_are_refused_by_name_with_the_list(model_type: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_architecture({"model_type": model_type})
    assert model_type in str(caught.value)
    assert all(architecture in str(caught.value) for architecture in SUPPORTED_ARCHITECTURES)


def test_a_config_without_model_type_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"None.*llama"):
        open_architecture({})


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_quantized_checkpoints_are_refused_by_method_with_the_way_out(method: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"quantized \({method}\).*serve the original"):
        open_architecture(config_of("llama", quantization_config={"quant_method": method}))


@pytest.mark.parametrize(
    ("architecture", "scaling"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
        (
            "phi3",
            {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0], "rope_theta": 1e4},
        ),
    ],
)
def test_rotary_embeddings_that_depend_on_neighbours_are_refused(architecture: str, scaling: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=scaling["rope_type"]):
        open_architecture(config_of(architecture, rope_scaling=scaling))


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "many"), ("num_attention_heads", 5), ("num_attention_heads", 0), ("hidden_act", "no such")],
)
def test_a_config_that_cannot_be_right_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.json is not a valid llama config"):
        open_architecture(config_of("llama", **{field: value}))


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert open_architecture(config_of("llama", auto_map={"AutoConfig": "evil.Config"})).num_blocks == 3


def test_opening_a_config_leaves_it_as_it_was() -> None:
    config = config_of("qwen3", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    before = repr(config)
    open_architecture(config)
    assert repr(config) == before


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 16, 25, 112])
def test_alibi_slopes_are_transformers_own(num_heads: int) -> None:
    alibi = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(num_heads), alibi[:, 0, 1], rtol=1e-5, atol=0)


class CountingExpert(nn.Module):
    """Stands for an expert: counts the rows that each of its layers gets."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.num_rows = factor, 0

    def w1(self, rows: torch.Tensor) -> torch.Tensor:
        self.num_rows += len(rows)
        return rows

    def w2(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.factor

    def w3(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(rows)


def test_only_chosen_experts_compute_a_token() -> None:
    config = open_architecture(config_of("mixtral")).config
    experts = SparseExperts(config)
    experts.act_fn = nn.Identity()
    experts.experts = nn.ModuleList(CountingExpert(float(10**index)) for index in range(5))
    with torch.no_grad():
        experts.gate.weight.zero_()
        experts.gate.weight[3, 0], experts.gate.weight[1, 0] = 2.0, 1.0  # every token ranks 3, then 1
        hidden = torch.zeros(1, 4, 32)
        hidden[0, :, 0] = 5.0
        out = experts(hidden)
    assert [expert.num_rows for expert in experts.experts] == [0, 4, 0, 4, 0]
    share = torch.tensor([10.0, 5.0]).softmax(0)
    torch.testing.assert_close(out[0, :, 0], torch.full((4,), float(5 * (1000 * share[0] + 10 * share[1]))))


@pytest.mark.parametrize("function", [nn.SiLU(), nn.GELU(approximate="tanh"), nn.GELU(), nn.Tanh()])
def test_an_exact_activation_does_not_see_where_an_element_stands(function: nn.Module) -> None:
    exact = ExactActivation(function)
    values = torch.linspace(-6, 6, 33_333)
    whole = exact(values)
    torch.testing.assert_close(whole, function(values), rtol=1e-5, atol=1e-6)
    for start, stop in ((0, 1), (1, 34), (5_000, 5_099), (16_383, 33_333)):
        assert torch.equal(exact(values[start:stop]), whole[start:stop])
    assert exact(values.view(3, 11_111)).shape == (3, 11_111)
