"""Every architecture computes what transformers computes: the same greedy tokens, logits within 1e-3."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cluster.models
from cluster.model_spec import SUPPORTED_ARCHITECTURES, Precision
from cluster.request import SequenceId
from tests.checkpoints import CONFIGS, VOCAB_SIZE, make_checkpoint, write_weights
from tests.worker.pipeline_driver import PipelineDriver, load_pipeline, recorded_logits
from tests.worker.references import Greedy, generate, load_reference

PROMPT_LENGTHS = (1, 6, 150)  # one token, less than a chunk, several chunks and pages
CHUNK = 40
MAX_TOKENS = 8
BLOOM_TINY = Path(cluster.models.__file__).parent / "bloom-tiny"

# The config fields that change what a block, the embedding or the head computes.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bloom, residual after norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "bloom, untied, 8 heads": ("bloom", {"tie_word_embeddings": False, "n_head": 8}),
    "gpt2, untied, scaled by block": ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2, relu": ("gpt2", {"activation_function": "relu", "n_inner": 40}),
    "gpt_neox, sequential, tied": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "gpt_neox, full rotary": ("gpt_neox", {"rotary_pct": 1.0, "attention_bias": False}),
    "llama, tied, no biases": ("llama", {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}),
    "llama, ungrouped heads": ("llama", {"num_key_value_heads": 4}),
    "llama, rotary llama3": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama, rotary linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": None}),
    "mixtral, window, 3 of 4, tied": (
        "mixtral",
        {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
    "phi3, no window, full rotary, tied": (
        "phi3",
        {"sliding_window": None, "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    ),
    "qwen2, no window, tied": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen3, window, yarn": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
}


def make_prompt(length: int, seed: int = 0) -> list[int]:
    numbers = random.Random(length + 1000 * seed)
    return [numbers.randrange(VOCAB_SIZE) for _ in range(length)]


def assert_parity(pipeline: PipelineDriver, prompt: list[int], expected: Greedy) -> None:
    with recorded_logits() as recorded:
        token_ids = pipeline.generate(prompt, MAX_TOKENS, chunk=CHUNK)
    assert token_ids == expected.token_ids
    torch.testing.assert_close(torch.cat(recorded), expected.logits, atol=1e-3, rtol=0)


@dataclass(frozen=True)
class Case:
    """An architecture's checkpoint and what transformers makes of some prompts."""

    folder: Path
    expected: Mapping[int, Greedy]  # by prompt length


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Return an architecture's case, made once."""
    made: dict[str, Case] = {}

    def get(architecture: str) -> Case:
        if architecture not in made:
            folder = make_checkpoint(tmp_path_factory.mktemp(architecture), architecture)
            model = load_reference(folder)
            expected = {length: generate(model, make_prompt(length), MAX_TOKENS) for length in PROMPT_LENGTHS}
            made[architecture] = Case(folder, expected)
        return made[architecture]

    return get


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_any_number_of_stages_equals_transformers(
    case: Callable[[str], Case], architecture: str, num_stages: int
) -> None:
    pipeline = load_pipeline(case(architecture).folder, num_stages)
    for length, expected in case(architecture).expected.items():
        assert_parity(pipeline, make_prompt(length), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_variants_equal_transformers(tmp_path: Path, variant: str) -> None:
    architecture, overrides = VARIANTS[variant]
    folder = make_checkpoint(tmp_path, architecture, overrides)
    expected = generate(load_reference(folder), make_prompt(40), MAX_TOKENS)
    assert_parity(load_pipeline(folder, 2), make_prompt(40), expected)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_the_embedded_model_equals_transformers(num_stages: int) -> None:
    model, pipeline = load_reference(BLOOM_TINY), load_pipeline(BLOOM_TINY, num_stages)
    for prompt in ([33], list(range(300, 345))):
        assert_parity(pipeline, prompt, generate(model, prompt, MAX_TOKENS))


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_sixteen_sequences_that_arrive_at_different_moments_equal_transformers(
    case: Callable[[str], Case], architecture: str
) -> None:
    folder = case(architecture).folder
    model, pipeline = load_reference(folder), load_pipeline(folder, 2)
    prompts = [make_prompt(1 + (37 * index) % 81, seed=index) for index in range(16)]
    sequences = serve_with_arrivals(pipeline, prompts, chunk=19)
    for prompt, sequence_id in zip(prompts, sequences, strict=True):
        assert pipeline.sequences[sequence_id].sampled == generate(model, prompt, MAX_TOKENS).token_ids


def serve_with_arrivals(pipeline: PipelineDriver, prompts: list[list[int]], chunk: int) -> list[SequenceId]:
    """Generate with one more sequence joining at every step, prompt chunks beside others' decodes."""
    sequences: list[SequenceId] = []
    while True:
        if len(sequences) < len(prompts):
            sequences.append(pipeline.add(prompts[len(sequences)]))
        running = [s for s in sequences if len(pipeline.sequences[s].sampled) < MAX_TOKENS]
        if not running:
            return sequences
        left = {s: len(pipeline.sequences[s].token_ids) - pipeline.sequences[s].num_computed for s in running}
        pipeline.step({s: min(chunk, count) for s, count in left.items()})


@pytest.mark.parametrize("architecture", ["bloom", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("has_prefix", [True, False], ids=["prefixed", "bare"])
@pytest.mark.parametrize(("file_format", "num_shards"), [("bin", 1), ("bin", 3), ("safetensors", 3)])
def test_every_file_format_loads_the_same_weights(
    tmp_path: Path, architecture: str, has_prefix: bool, file_format: Any, num_shards: int
) -> None:
    plain = make_checkpoint(tmp_path / "plain", architecture)
    other = make_checkpoint(
        tmp_path / "other", architecture, file_format=file_format, num_shards=num_shards, has_prefix=has_prefix
    )
    with recorded_logits() as expected:
        load_pipeline(plain).generate(make_prompt(9), 2)
    with recorded_logits() as actual:
        load_pipeline(other, 2).generate(make_prompt(9), 2)
    assert torch.equal(torch.cat(actual), torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["from fp32", "from bf16"])
@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_bf16_storage_equals_transformers_with_rounded_weights(
    tmp_path: Path, architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.loading.has_native_bf16", lambda: False)
    folder = make_checkpoint(tmp_path, architecture, dtype=dtype)
    pipeline = load_pipeline(folder, 2, precision=Precision.BF16)
    expected = generate(load_reference(folder, is_rounded_to_bf16=True), make_prompt(30), MAX_TOKENS)
    assert_parity(pipeline, make_prompt(30), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("has_embedding", [True, False], ids=["both", "head alone"])
def test_a_head_beside_a_config_that_ties_it_counts_as_in_transformers(
    tmp_path: Path, architecture: str, has_embedding: bool
) -> None:
    folder = make_checkpoint(tmp_path, architecture)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if not has_embedding:
        tensors = load_file(folder / "model.safetensors")
        write_weights(
            folder,
            {
                name: value
                for name, value in tensors.items()
                if not name.endswith(("embed_tokens.weight", "embed_in.weight"))
            },
        )
    expected = generate(load_reference(folder), make_prompt(12), MAX_TOKENS)
    assert_parity(load_pipeline(folder, 2), make_prompt(12), expected)


def test_every_supported_architecture_has_a_checkpoint() -> None:
    assert set(CONFIGS) == set(SUPPORTED_ARCHITECTURES)


def test_greedy_tokens_of_the_checkpoints_vary(case: Callable[[str], Case]) -> None:
    """Parity of a constant continuation would prove little."""
    for architecture in SUPPORTED_ARCHITECTURES:
        continuations = case(architecture).expected.values()
        assert len({token_id for greedy in continuations for token_id in greedy.token_ids}) > 3, architecture
