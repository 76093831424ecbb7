"""A span loads its own tensors, checked, in the precision asked for; a model is measured without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.errors import ConfigurationError
from cluster.load_order import LoadProgress
from cluster.model_spec import SUPPORTED_ARCHITECTURES, Precision
from cluster.span import Span
from tests.checkpoints import CONFIGS, VOCAB_SIZE, make_checkpoint, write_weights
from tests.worker.pipeline_driver import NUM_PAGES, PAGE_SIZE, load_pipeline, load_span, make_order
from worker.loading import TorchSpanLoader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama")


def measure(config: dict[str, Any]) -> Any:
    return TorchSpanLoader(torch.device("cpu")).measure(config)


def rewrite(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace a tensor in a checkpoint of one file, or drop it."""
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    write_weights(folder, tensors)


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_measured_sizes_add_up_to_the_model(tmp_path: Path, architecture: str) -> None:
    folder = make_checkpoint(tmp_path, architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sizes = measure(json.loads((folder / "config.json").read_text()))
    tied = VOCAB_SIZE * sizes.hidden_size if model.config.tie_word_embeddings else 0
    total = sum(count.num_parameters for count in (*sizes.blocks, sizes.head)) + sizes.embedding_num_parameters
    assert total - tied == model.num_parameters()
    assert len(sizes.blocks) == len(sizes.kv_elements_per_token) == 3
    assert (sizes.num_experts > 0) == (sizes.experts[0].num_linear > 0) == (architecture == "mixtral")
    assert 0 < sizes.num_output_elements <= sizes.blocks[0].num_rows


def test_measured_cache_size_counts_grouped_heads() -> None:
    sizes = measure({"model_type": "qwen3", **CONFIGS["qwen3"]})
    assert sizes.kv_elements_per_token == (2 * 2 * 12,) * 3


def test_bloom_176b_is_measured_without_memory() -> None:
    config = {"model_type": "bloom", "n_layer": 70, "num_attention_heads": 112, "n_embed": 14336, "vocab_size": 250880}
    sizes = measure(config)
    total = sum(count.num_parameters for count in (*sizes.blocks, sizes.head)) + sizes.embedding_num_parameters
    assert total - 250880 * 14336 == 176_247_271_424  # as published
    assert sizes.kv_elements_per_token[0] == 2 * 14336


@pytest.mark.parametrize(("precision", "item_bytes"), [(Precision.FP32, 4), (Precision.BF16, 2), (Precision.FP16, 2)])
def test_weights_take_the_bytes_of_their_precision(
    folder: Path, precision: Precision, item_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.loading.has_native_bf16", lambda: False)
    loaded = load_span(make_order(folder, 1, 3, precision=precision, max_context=64))
    num_parameters = measure(json.loads((folder / "config.json").read_text())).blocks[1].num_parameters
    rotary_bytes = 2 * 64 * 8 * 4
    assert 0 <= loaded.weight_bytes - rotary_bytes - num_parameters * item_bytes < 4 * 32 * 32  # norms, biases in fp32
    assert loaded.compute_dtype == "fp32"


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_loading_leaves_little_more_memory_taken_than_the_weights(tmp_path: Path, precision: Precision) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5, "num_key_value_heads": 4}
    folder = make_checkpoint(tmp_path, "llama", sizes)
    before = anonymous_bytes()
    loaded = load_span(make_order(folder, precision=precision))
    assert loaded.weight_bytes > 35_000_000
    assert anonymous_bytes() - before < 1.2 * loaded.weight_bytes


def anonymous_bytes() -> int:
    """Return this process's memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_the_cache_takes_the_bytes_of_its_dtype(folder: Path) -> None:
    wide = load_span(make_order(folder))
    narrow = load_span(make_order(folder, kv_dtype="bf16", wire_dtype="bf16"))
    assert wide.kv_bytes == 2 * narrow.kv_bytes == NUM_PAGES * PAGE_SIZE * 3 * (2 * 2 * 8) * 4
    assert (wide.kv_dtype, narrow.kv_dtype) == ("fp32", "bf16")
    assert (wide.wire_dtype, narrow.wire_dtype) == ("fp32", "bf16")


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_a_narrow_cache_and_narrow_weights_still_generate(folder: Path, precision: Precision) -> None:
    kv_dtype = precision.value
    assert len(load_pipeline(folder, 2, precision=precision, kv_dtype=kv_dtype).generate([1, 2, 3], 3)) == 3


def test_nothing_of_a_loaded_span_is_left_without_memory(tmp_path: Path) -> None:
    for architecture in SUPPORTED_ARCHITECTURES:
        stage = load_span(make_order(make_checkpoint(tmp_path / architecture, architecture))).executor
        for block in stage._blocks:
            held = [*block.parameters(), *block.buffers()]
            assert not any(tensor.is_meta for tensor in held), architecture
            assert not any(isinstance(module, torch.nn.Linear) for module in block.modules()), architecture


def test_a_span_reads_only_its_own_tensors(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "bloom")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".h.1." in name}
    write_weights(folder, kept)
    load_span(make_order(folder, 1, 3))


def test_a_tied_head_reads_the_embedding_on_the_last_stage(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "bloom")
    middle, last = (load_span(make_order(folder, stage, 3)) for stage in (1, 2))
    assert last.weight_bytes - middle.weight_bytes == 4 * (VOCAB_SIZE * 48 + 2 * 48)


def test_progress_ends_at_the_announced_total(folder: Path) -> None:
    reports: list[LoadProgress] = []
    load_span(make_order(folder, 0, 2, precision=Precision.BF16), reports)
    reports = [report for report in reports if report.phase == "loading"]
    assert [report.bytes_done for report in reports] == sorted(report.bytes_done for report in reports)
    assert reports[0].bytes_done == 0
    assert {report.bytes_total for report in reports} == {reports[-1].bytes_done}


def test_a_missing_tensor_is_named_with_its_file(folder: Path) -> None:
    rewrite(folder, "model.layers.2.mlp.up_proj.weight", None)
    load_span(make_order(folder, 0, 3))
    with pytest.raises(ConfigurationError, match=r"model\.layers\.2\.mlp\.up_proj\.weight.*model\.safetensors"):
        load_span(make_order(folder, 2, 3))


def test_a_tensor_of_the_wrong_shape_is_named_with_its_file(folder: Path) -> None:
    rewrite(folder, "model.norm.weight", torch.ones(31))
    with pytest.raises(ConfigurationError, match=r"model\.norm\.weight in model\.safetensors.*\[31\].*\[32\]"):
        load_span(make_order(folder))


def test_numbers_of_an_unknown_quantization_are_refused(folder: Path) -> None:
    rewrite(folder, "model.layers.0.mlp.up_proj.weight", torch.zeros(56, 32, dtype=torch.float8_e4m3fn))
    with pytest.raises(ConfigurationError, match=r"up_proj\.weight.*float8_e4m3fn"):
        load_span(make_order(folder))


def test_weights_beyond_fp16_are_refused_with_the_way_out(folder: Path) -> None:
    rewrite(folder, "lm_head.weight", torch.full((VOCAB_SIZE, 32), 1e6))
    with pytest.raises(ConfigurationError, match=r"lm_head\.weight.*--precision bf16"):
        load_span(make_order(folder, precision=Precision.FP16))


def test_a_span_beyond_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"blocks \[2, 5\), but the model has 3"):
        load_span(make_order(folder, span=Span(2, 5)))
