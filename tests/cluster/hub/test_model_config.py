"""Which checkpoints that come quantized are read, and how the others are refused."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ConfigurationError
from cluster.hub.model_config import check_supported, quantized_precision
from cluster.model_spec import Precision


def config(**quantization: Any) -> dict[str, Any]:
    return {"model_type": "llama", "quantization_config": quantization}


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "llama", "quantization_config": None}, None),
        (config(quant_method="bitsandbytes", load_in_8bit=True), Precision.INT8),
        (config(load_in_8bit=True, load_in_4bit=False), Precision.INT8),
        (config(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), Precision.NF4),
    ],
)
def test_bitsandbytes_checkpoints_are_stored_in_what_they_come_in(
    described: dict[str, Any], expected: Precision | None
) -> None:
    assert check_supported(described, "a/b") == "llama"
    assert quantized_precision(described, "a/b") is expected


@pytest.mark.parametrize(
    ("described", "named"),
    [
        (config(quant_method="gptq", bits=4), "gptq"),
        (config(quant_method="awq"), "awq"),
        (config(quant_method="fp8"), "fp8"),
        (config(quant_method="compressed-tensors"), "compressed-tensors"),
        (config(quant_method="mxfp4"), "mxfp4"),
        (config(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="fp4"), "bitsandbytes fp4"),
        (config(load_in_4bit=True), "bitsandbytes fp4"),
        (config(bits=4), "in an unknown way"),
        ({"model_type": "llama", "quantization_config": "awq"}, "awq"),
        ({"model_type": "llama", "compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_other_schemes_are_refused_by_name_with_the_way_out(described: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"\({named}\).*original 16-bit checkpoint with --precision int8"):
        check_supported(described, "a/b-AWQ")


def test_the_checkpoint_that_a_quantized_one_was_made_from_is_named_where_the_config_tells() -> None:
    described = {**config(quant_method="awq"), "_name_or_path": "meta/llama-7b"}
    with pytest.raises(ConfigurationError, match="made from, meta/llama-7b, with --precision"):
        check_supported(described, "someone/llama-7b-AWQ")
