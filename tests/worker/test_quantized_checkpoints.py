"""Checkpoints that come quantized load as they are, and compute what their weights mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.errors import ConfigurationError
from cluster.hub.resolve import resolve
from cluster.load_order import StoreOptions
from cluster.model_spec import Precision
from tests.checkpoints import VOCAB_SIZE, make_checkpoint, write_weights
from tests.quantized_checkpoints import SCHEMES, SIZES, Scheme, make_quantized
from tests.worker.pipeline_driver import load_pipeline, make_order, recorded_logits
from worker.loading import TorchSpanLoader

PROMPT = [1, 250, 33, 7, 7, 90]
NUM_TABLE = VOCAB_SIZE * 64


def precision_of(scheme: Scheme) -> Precision:
    return Precision.INT8 if scheme == "int8" else Precision.NF4


def generate(folder: Path, precision: Precision, **changes: Any) -> tuple[list[int], Tensor]:
    store = StoreOptions(store_folder=str(folder / "store"))
    pipeline = load_pipeline(folder, 2, precision=precision, store=store, **changes)
    with recorded_logits() as logits:
        return pipeline.generate(PROMPT, 6), torch.cat(logits)


def meaning(folder: Path, values: dict[str, Tensor]) -> Path:
    """Write the unquantized checkpoint that holds the quantized one's values."""
    make_checkpoint(folder, "llama", SIZES)
    write_weights(folder, values)
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("skipped", [None, ["q_proj", "model.layers.1", "lm_head"]])
def test_a_checkpoint_that_comes_quantized_generates_what_its_weights_mean(
    tmp_path: Path, scheme: Scheme, skipped: list[str] | None
) -> None:
    folder = tmp_path / "quantized"
    values = make_quantized(folder, scheme, skipped)
    # without outliers and roundings of inputs the same arithmetic remains
    tokens, logits = generate(folder, precision_of(scheme), compute_dtype="fp32", outlier_threshold=1e-6)
    expected_tokens, expected = generate(meaning(tmp_path / "meaning", values), Precision.FP32)
    torch.testing.assert_close(logits, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())
    assert tokens == expected_tokens


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resolving_tells_what_a_checkpoint_comes_in(tmp_path: Path, scheme: Scheme) -> None:
    make_quantized(tmp_path, scheme)
    assert resolve(str(tmp_path)).stored_precision is precision_of(scheme)


def test_layers_left_in_16_bits_are_counted_as_such(tmp_path: Path) -> None:
    make_quantized(tmp_path, "nf4")
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = TorchSpanLoader(torch.device("cpu")).measure(config)
    assert (sizes.head.num_kept, sizes.head.num_linear) == (NUM_TABLE, 0)
    assert sizes.blocks[0].num_kept == 0
    config["quantization_config"]["llm_int8_skip_modules"] = ["o_proj"]
    sizes = TorchSpanLoader(torch.device("cpu")).measure(config)
    assert (sizes.head.num_kept, sizes.head.num_linear) == (0, NUM_TABLE)
    assert sizes.blocks[0].num_kept == 64 * 64


def test_absmaxes_quantized_once_are_counted(tmp_path: Path) -> None:
    counts = {}
    for scheme in ("nf4", "nf4 quantized once"):
        make_quantized(tmp_path / scheme, scheme)
        config = json.loads((tmp_path / scheme / "config.json").read_text())
        counts[scheme] = TorchSpanLoader(torch.device("cpu")).measure(config).blocks[0]
    more = counts["nf4 quantized once"].resident_bytes(Precision.NF4) - counts["nf4"].resident_bytes(Precision.NF4)
    assert more >= 3 * counts["nf4"].num_linear // 64


def damage(folder: Path, name: str, value: Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    write_weights(folder, tensors)


LAYER = "model.layers.0.self_attn.q_proj."
STATE = LAYER + "weight.quant_state.bitsandbytes__nf4"


FIELDS = {"quant_type": "nf4", "blocksize": 64, "shape": [64, 64], "nested_blocksize": 256, "nested_offset": 0.1}


def state_of(fields: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def state_with(**changes: Any) -> Tensor:
    return state_of(FIELDS | changes)


def state_without(name: str) -> Tensor:
    return state_of({field: value for field, value in FIELDS.items() if field != name})


@pytest.mark.parametrize(
    ("scheme", "name", "value", "message"),
    [
        ("nf4", LAYER + "weight.absmax", None, r"lacks tensor .*q_proj.weight.absmax"),
        ("nf4", LAYER + "weight.absmax", torch.zeros(3, dtype=torch.uint8), "absmax holds 3 numbers of uint8"),
        ("nf4", LAYER + "weight.quant_map", torch.linspace(-1, 1, 16), "codes of its own .*quant_map"),
        ("nf4", LAYER + "weight.nested_quant_map", torch.zeros(256), "codes of its own .*nested_quant_map"),
        ("nf4", LAYER + "weight", torch.zeros(7, dtype=torch.uint8), "has 7 bytes of codes"),
        ("nf4", STATE, torch.tensor([123, 7], dtype=torch.uint8), "quant_state that cannot be read"),
        ("nf4", STATE, state_with(nested_offset=None), "quant_state that cannot be read .*NoneType"),
        ("nf4", STATE, state_without("nested_offset"), "quant_state that cannot be read .*nested_offset"),
        ("nf4", STATE, state_with(blocksize=128), "nf4 in blocks of 128 and 256"),
        ("nf4", STATE, state_with(shape=[32, 128]), r"with shape \[32, 128\]"),
        ("int8", LAYER + "SCB", torch.zeros(5), "SCB holds 5 numbers"),
        ("int8", LAYER + "weight", torch.zeros(64, 32, dtype=torch.int8), r"int8 \[64, 64\] belongs"),
        ("int8", LAYER + "weight_format", torch.tensor(2, dtype=torch.uint8), "one kind of GPU"),
    ],
)
def test_a_damaged_quantized_weight_is_refused_by_name(
    tmp_path: Path, scheme: Scheme, name: str, value: Tensor | None, message: str
) -> None:
    make_quantized(tmp_path, scheme)
    damage(tmp_path, name, value)
    order = make_order(
        tmp_path, precision=precision_of(scheme), store=StoreOptions(store_folder=str(tmp_path / "store"))
    )
    with pytest.raises(ConfigurationError, match=message):
        TorchSpanLoader(torch.device("cpu")).load(order, lambda _: None)
