"""A stage does its part of a step and nothing else; what it computes is the parity tests' business."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.errors import ConfigurationError, InvariantError, StalePlacementError
from tests.checkpoints import make_checkpoint
from tests.worker.pipeline_driver import load_pipeline, load_span, make_order, recorded_logits
from worker.stage import HIDDEN_STATES

PROMPT = [5, 200, 31, 77, 9, 140, 66]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def test_hidden_states_travel_packed_in_the_wire_dtype(folder: Path) -> None:
    for wire_dtype, expected in (("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        driver = load_pipeline(folder, 2, wire_dtype=wire_dtype)
        first, second = driver.add(PROMPT), driver.add(PROMPT[:2])
        output = driver.stages[0].execute(driver.header({first: 7, second: 2}), {}, lambda _: None)
        assert output.result is None
        assert output.tensors.keys() == {HIDDEN_STATES}
        assert output.tensors[HIDDEN_STATES].shape == (9, 32)
        assert output.tensors[HIDDEN_STATES].dtype is expected


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16", "fp16"])
def test_more_stages_change_no_bit_of_the_logits(folder: Path, compute_dtype: str) -> None:
    with recorded_logits() as of_one:
        load_pipeline(folder, 1, compute_dtype=compute_dtype).generate(PROMPT, 2)
    with recorded_logits() as of_three:
        load_pipeline(folder, 3, compute_dtype=compute_dtype).generate(PROMPT, 2)
    assert len(of_one) == 2
    assert all(torch.equal(one, three) for one, three in zip(of_one, of_three, strict=True))


@pytest.mark.parametrize("wire_dtype", ["bf16", "fp16"])
def test_a_narrow_wire_changes_logits_little(folder: Path, wire_dtype: str) -> None:
    with recorded_logits() as exact:
        load_pipeline(folder, 3).generate(PROMPT, 1)
    with recorded_logits() as narrow:
        load_pipeline(folder, 3, wire_dtype=wire_dtype).generate(PROMPT, 1)
    assert 0 < (narrow[0] - exact[0]).abs().max() < 0.1


@pytest.mark.parametrize("setting", ["--wire-dtype", "--compute-dtype"])
def test_hidden_states_beyond_fp16_are_an_error_that_says_what_to_do(tmp_path: Path, setting: str) -> None:
    folder = make_checkpoint(tmp_path, "bloom")
    driver = load_pipeline(folder, 2, **{setting.strip("-").replace("-", "_"): "fp16"})
    with torch.no_grad():
        driver.stages[0]._entrance.module.word_embeddings_layernorm.weight.fill_(6e4)
    header = driver.header({driver.add(PROMPT): 7})
    with pytest.raises(ConfigurationError, match=rf"stage 0 \(blocks \[0, 1\)\).*{setting} bf16"):
        driver.stages[0].execute(header, {}, lambda _: None)


def test_only_the_rows_asked_for_go_through_the_head(folder: Path) -> None:
    driver = load_pipeline(folder)
    first, second = driver.add(PROMPT), driver.add(PROMPT[:3])
    with recorded_logits() as recorded:
        unfinished = driver.step({first: 4})
        finished = driver.step({first: 3, second: 2})
    assert unfinished.token_ids == ()
    assert finished.sequence_ids == (first,)
    assert [tuple(logits.shape) for logits in recorded] == [(1, 258)]


def test_a_step_may_stop_before_the_last_stage(folder: Path) -> None:
    driver = load_pipeline(folder, 3)
    header = replace(driver.header({driver.add(PROMPT): 7}), last_stage=1)
    first = driver.stages[0].execute(header, {}, lambda _: None)
    second = driver.stages[1].execute(header, first.tensors, lambda _: None)
    assert second.tensors == {}
    assert second.result is not None
    assert (second.result.step_id, second.result.sequence_ids) == (header.step_id, ())


def test_replaying_a_sequence_gives_its_next_token_again(folder: Path) -> None:
    driver = load_pipeline(folder, 2)
    token_ids = driver.generate(PROMPT, 4)
    for stage in driver.stages:
        stage.open_epoch()
    replayed = driver.add([*PROMPT, *token_ids[:3]])
    assert driver.step({replayed: len(PROMPT) + 3}).token_ids == (token_ids[3],)


def test_an_opened_epoch_has_forgotten_every_sequence(folder: Path) -> None:
    driver = load_pipeline(folder)
    sequence_id = driver.add(PROMPT)
    driver.step({sequence_id: 7})
    driver.stages[0].open_epoch()
    with pytest.raises(StalePlacementError, match=f"sequence {sequence_id}"):
        driver.step({sequence_id: 1})


def test_a_finished_sequence_is_forgotten_before_its_pages_are_used_again(folder: Path) -> None:
    driver = load_pipeline(folder, 2)
    expected = driver.generate(PROMPT[::-1], 3)
    old = driver.add(PROMPT)
    driver.step({old: 7})
    driver.free_pages += driver.sequences[old].pages
    new = driver.add(PROMPT[::-1])
    driver.step({new: 7}, finished=[old])
    assert driver.sequences[new].pages == driver.sequences[old].pages
    driver.step({new: 1})
    driver.step({new: 1})
    assert driver.sequences[new].sampled == expected


def test_the_embedding_stays_in_the_checkpoint_file(folder: Path) -> None:
    first = load_span(make_order(folder, 0, 2))
    middle = load_span(make_order(folder, 1, 3))
    assert first.weight_bytes == middle.weight_bytes  # one block each: the table is not held in memory
    assert folder / "model.safetensors" in mapped_files(first.executor._entrance.table.data_ptr())


def mapped_files(address: int) -> set[Path]:
    """Return the file that is mapped into this process's memory at an address, if one is."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < stop and "/" in line:
            found.add(Path(line[line.index("/") :]))
    return found


def test_a_position_beyond_the_context_is_an_error_before_anything_is_computed(folder: Path) -> None:
    driver = load_pipeline(folder, max_context=8)
    sequence_id = driver.add(PROMPT)
    driver.step({sequence_id: 7})
    driver.step({sequence_id: 1})
    with pytest.raises(InvariantError, match=f"sequence {sequence_id} reaches position 9.*contexts of 8 tokens"):
        driver.step({sequence_id: 1})
