"""With is_exact a streamed span gives the bits of a resident one, however a sequence is cut up and whoever shares its
steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.load_order import StoreOptions
from cluster.model_spec import Precision
from tests.checkpoints import make_checkpoint
from tests.worker.pipeline_driver import PipelineDriver, load_pipeline
from tests.worker.test_parity import make_prompt
from tests.worker.test_parity_exact import assert_bits_do_not_depend_on_company, logits_alone

PROMPT = make_prompt(20)
CASES = [
    ("llama", Precision.INT8),
    ("llama", Precision.NF4),
    ("bloom", Precision.INT8),
    ("gpt2", Precision.NF4),
    ("mixtral", Precision.INT8),
    ("mixtral", Precision.BF16),
]


@pytest.fixture
def pipelines(tmp_path: Path) -> Iterator[Any]:
    """Load pipelines over one store, closed afterwards."""
    loaded: list[PipelineDriver] = []

    def load(folder: Path, **changes: Any) -> PipelineDriver:
        store = StoreOptions(store_folder=str(tmp_path / "store"))
        loaded.append(load_pipeline(folder, 1, is_exact=True, store=store, **changes))
        return loaded[-1]

    yield load
    for pipeline in loaded:
        pipeline.stages[0].close()


@pytest.mark.parametrize(("architecture", "precision"), CASES)
def test_streamed_bits_depend_neither_on_company_nor_on_where_weights_are(
    tmp_path: Path, pipelines: Any, architecture: str, precision: Precision
) -> None:
    folder = make_checkpoint(tmp_path / "model", architecture)
    options = {"num_streamed": 2, "ring_bytes": 384 << 10}
    if architecture == "mixtral":
        options = {"expert_cache_bytes": 96 << 10}
    streamed = pipelines(folder, precision=precision, **options)
    assert_bits_do_not_depend_on_company(streamed, PROMPT)
    resident = pipelines(folder, precision=precision)
    assert torch.equal(logits_alone(streamed, PROMPT, chunk=512), logits_alone(resident, PROMPT, chunk=5))
