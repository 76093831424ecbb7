"""Compiled blocks against the modules that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.model_spec import Precision
from tests.checkpoints import make_checkpoint
from tests.worker.pipeline_driver import PipelineDriver, load_span, recorded_logits
from tests.worker.store.converted import stored_order
from worker import loading
from worker.compiled_block import CompiledBlock, compile_block
from worker.native.library import library

PROMPT = [5, 9, 2, 7, 1, 3]
pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built here")


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_compiled_blocks_give_the_modules_bits(
    architecture: str, is_exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", architecture)
    built: list[type] = []
    logits = []
    for is_compiled in (True, False):

        def choose(block: torch.nn.Module, is_compiled: bool = is_compiled) -> torch.nn.Module:
            chosen = compile_block(block) if is_compiled else block
            built.append(type(chosen))
            return chosen

        monkeypatch.setattr(loading, "compile_block", choose)
        order = stored_order(folder, tmp_path / "store", 0, 1, Precision.INT8, compute_dtype="fp32", is_exact=is_exact)
        with recorded_logits() as recorded:
            PipelineDriver([load_span(order).executor]).generate(PROMPT, 6)
        logits.append(torch.cat(recorded))
    half = len(built) // 2
    assert all(kind is CompiledBlock for kind in built[:half])
    assert not any(kind is CompiledBlock for kind in built[half:])
    assert torch.equal(*logits)


@pytest.mark.parametrize("architecture", ["bloom", "phi3", "qwen3", "mixtral", "gpt_neox"])
def test_other_blocks_stay_as_they_are(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[bool] = []

    def choose(block: torch.nn.Module) -> torch.nn.Module:
        chosen = compile_block(block)
        kinds.append(chosen is block)
        return chosen

    monkeypatch.setattr(loading, "compile_block", choose)
    folder = make_checkpoint(tmp_path / "model", architecture)
    load_span(stored_order(folder, tmp_path / "store", 0, 1, Precision.INT8))
    assert kinds
    assert all(kinds)
