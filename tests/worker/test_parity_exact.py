"""A token's logits have the same bits however its sequence is cut up and whoever shares its steps: with is_exact, and
on CPUs with our kernels also without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.model_spec import SUPPORTED_ARCHITECTURES, Precision
from tests.checkpoints import make_checkpoint
from tests.worker.pipeline_driver import PipelineDriver, load_pipeline, recorded_logits
from tests.worker.test_parity import make_prompt
from worker.native.attention import kernels

LONG_PROMPT, SHORT_PROMPT = make_prompt(75), make_prompt(20)  # of two pages and of one
MAX_TOKENS = 4
IS_EXACT_ASKED = kernels() is None


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def logits_alone(pipeline: PipelineDriver, prompt: list[int], chunk: int) -> Tensor:
    with recorded_logits() as recorded:
        pipeline.generate(prompt, MAX_TOKENS, chunk=chunk)
    return torch.cat(recorded)


def logits_among_neighbours(pipeline: PipelineDriver, prompt: list[int]) -> Tensor:
    """The sequence stands last in every step, behind a prompt that is prefilled and two sequences that decode."""
    neighbours = [pipeline.add(make_prompt(length)) for length in (90, 1, 17)]
    pipeline.step({neighbours[0]: 3, neighbours[1]: 1, neighbours[2]: 17})
    watched = pipeline.add(prompt)
    with recorded_logits() as recorded:
        for step in range(MAX_TOKENS):
            length = len(prompt) if step == 0 else 1
            pipeline.step({neighbours[0]: 7, neighbours[1]: 1, neighbours[2]: 1, watched: length})
    return torch.stack([logits[-1] for logits in recorded])


def assert_bits_do_not_depend_on_company(pipeline: PipelineDriver, prompt: list[int]) -> None:
    whole = logits_alone(pipeline, prompt, chunk=512)
    assert torch.equal(logits_alone(pipeline, prompt, chunk=7), whole)
    assert torch.equal(logits_alone(pipeline, prompt, chunk=1), whole)
    assert torch.equal(logits_among_neighbours(pipeline, prompt), whole)


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_bits_do_not_depend_on_company(tmp_path: Path, architecture: str, num_threads: int) -> None:
    folder = make_checkpoint(tmp_path, architecture)
    prompt = LONG_PROMPT if num_threads == 1 else SHORT_PROMPT  # threads that wait for a busy core take long
    assert_bits_do_not_depend_on_company(load_pipeline(folder, 2, is_exact=IS_EXACT_ASKED), prompt)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("is_exact", sorted({IS_EXACT_ASKED, True}))
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("architecture", ["bloom", "llama", "mixtral"])
def test_bits_of_a_wider_model_do_not_depend_on_company(
    tmp_path: Path, architecture: str, precision: Precision, is_exact: bool
) -> None:
    """Wide enough that torch divides its products and elementwise functions among threads."""
    sizes = {"hidden_size": 264, "num_hidden_layers": 1}
    by_architecture = {
        "bloom": {"hidden_size": 264, "n_layer": 1},
        "llama": {**sizes, "intermediate_size": 1030},
        "mixtral": {**sizes, "intermediate_size": 1030},
    }
    folder = make_checkpoint(tmp_path, architecture, by_architecture[architecture])
    pipeline = load_pipeline(folder, 1, is_exact=is_exact, precision=precision)
    assert_bits_do_not_depend_on_company(pipeline, SHORT_PROMPT)
