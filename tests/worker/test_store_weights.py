"""What is loaded from the block store computes what transformers computes with the same weights, decoded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cluster.errors import ConfigurationError, StorageError
from cluster.load_order import StoreOptions
from cluster.model_spec import SUPPORTED_ARCHITECTURES, Precision
from tests.checkpoints import make_checkpoint
from tests.worker.pipeline_driver import PipelineDriver, load_span, recorded_logits
from tests.worker.references import Greedy, generate, load_reference
from tests.worker.store.converted import converted_folder, fill, order_of_converted, stored_order
from tests.worker.store.parts import flip_bit
from tests.worker.test_span_download import FolderReader
from worker.loading import TorchSpanLoader
from worker.quantization import nf4
from worker.quantization.encode import encode
from worker.store.copied import store_of
from worker.store.inventory import Pruned, list_entries, prune
from worker.stored_weight import MemoryWeight

PROMPT = [7, 200, 31, 8, 8, 90]
NUM_TOKENS = 6
EVERY_INPUT = 1e-6  # as outlier threshold: inputs keep 16 bits, so that only the weights' rounding counts
TOLERANCES = {Precision.INT8: 2e-2, Precision.NF4: 5e-3}


def decode(weight: MemoryWeight) -> Tensor:
    if weight.kind is Precision.NF4:
        return nf4.decode(weight)
    stored = weight.held[0].tensors["weight"].float()
    return stored * weight.small["scale"][:, None] if weight.kind is Precision.INT8 else stored


def round_trip(weight: Tensor, precision: Precision) -> Tensor:
    return decode(encode("any", weight, precision))


def load_decoded(folder: Path, precision: Precision) -> Any:
    """Load transformers' model with every linear weight of blocks and head as the store would give it."""
    model = load_reference(folder, is_rounded_to_bf16=precision is Precision.BF16)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight = nn.Parameter(round_trip(head.weight, precision.of_head))
        for name, module in model.named_modules():
            if module is head:
                continue
            if isinstance(module, nn.Linear):
                module.weight.copy_(round_trip(module.weight, precision))
            elif isinstance(module, Conv1D):
                module.weight.copy_(round_trip(module.weight.t(), precision).t())
            elif name.endswith(".experts"):
                _round_experts(module, precision)
    return model


def _round_experts(experts: Any, precision: Precision) -> None:
    for expert in range(experts.gate_up_proj.shape[0]):
        both = experts.gate_up_proj[expert]
        both.copy_(torch.cat([round_trip(half, precision) for half in both.chunk(2)]))
        experts.down_proj[expert].copy_(round_trip(experts.down_proj[expert], precision))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Precision], tuple[Path, Path, Greedy]]:
    """Return a checkpoint, a store for it, and what transformers makes of the decoded weights; each made once."""
    made: dict[tuple[str, Precision], tuple[Path, Path, Greedy]] = {}
    folders: dict[str, Path] = {}

    def get(architecture: str, precision: Precision) -> tuple[Path, Path, Greedy]:
        if architecture not in folders:
            folders[architecture] = make_checkpoint(tmp_path_factory.mktemp(architecture), architecture)
        if (architecture, precision) not in made:
            expected = generate(load_decoded(folders[architecture], precision), PROMPT, NUM_TOKENS)
            made[architecture, precision] = (folders[architecture], tmp_path_factory.mktemp("store"), expected)
        return made[architecture, precision]

    return get


def load_stored(folder: Path, root: Path, num_stages: int, precision: Precision) -> PipelineDriver:
    orders = [
        stored_order(folder, root, stage, num_stages, precision, outlier_threshold=EVERY_INPUT, compute_dtype="fp32")
        for stage in range(num_stages)
    ]
    return PipelineDriver([load_span(order).executor for order in orders])


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.NF4])
@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_any_number_of_stages_equals_transformers_with_decoded_weights(
    case: Callable[[str, Precision], tuple[Path, Path, Greedy]],
    architecture: str,
    precision: Precision,
    num_stages: int,
) -> None:
    folder, root, expected = case(architecture, precision)
    with recorded_logits() as recorded:
        token_ids = load_stored(folder, root, num_stages, precision).generate(PROMPT, NUM_TOKENS)
    assert token_ids == expected.token_ids
    torch.testing.assert_close(torch.cat(recorded), expected.logits, atol=TOLERANCES[precision], rtol=0)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.BF16])
def test_a_converted_folder_serves_without_its_source(tmp_path: Path, precision: Precision) -> None:
    source, converted = converted_folder(tmp_path, precision)
    expected = load_stored(source, tmp_path / "store", 2, precision).generate(PROMPT, NUM_TOKENS)
    shutil.rmtree(source)
    orders = [
        order_of_converted(converted, stage, outlier_threshold=EVERY_INPUT, compute_dtype="fp32") for stage in range(2)
    ]
    pipeline = PipelineDriver([load_span(order).executor for order in orders])
    assert pipeline.generate(PROMPT, NUM_TOKENS) == expected


def test_a_damaged_converted_folder_is_left_alone_and_named(tmp_path: Path) -> None:
    _, converted = converted_folder(tmp_path)
    order = order_of_converted(converted, 0)
    place = store_of(order).manifest("block-0000").weights[0].pieces[0].tensors["weight"]
    flip_bit(converted / "block-0000.weights", place.offset + 9)
    with pytest.raises(StorageError, match=r"block-0000.*copy block-0000 there again"):
        load_span(order)
    assert (converted / "block-0000.weights").exists()


def test_a_block_that_was_not_converted_is_named(tmp_path: Path) -> None:
    _, converted = converted_folder(tmp_path)
    for suffix in (".json", ".weights"):
        (converted / f"block-0002{suffix}").unlink()
    load_span(order_of_converted(converted, 0))
    with pytest.raises(ConfigurationError, match=r"block-0002.*cluster convert --blocks"):
        load_span(order_of_converted(converted, 1))


@pytest.mark.parametrize("part", ["embedding", "block-0001", "head"])
@pytest.mark.parametrize("harm", ["flipped", "shortened", "vanished", "manifest"])
def test_a_damaged_part_is_named_and_made_again(
    tmp_path: Path, part: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    order = stored_order(make_checkpoint(tmp_path / "model", "llama"), tmp_path / "store")
    fill(order)
    store = store_of(order)
    before = store.path(part).read_bytes()
    expected = PipelineDriver([load_span(order).executor]).generate(PROMPT, 3)
    if harm == "flipped":
        flip_bit(store.path(part), len(before) // 2 // 4096 * 4096 + 5)
    elif harm == "shortened":
        store.path(part).write_bytes(before[:-4096])
    elif harm == "vanished":
        store.path(part).unlink()
    else:
        flip_bit(store.manifest_path(part), 200)
    with caplog.at_level(logging.WARNING):
        loaded = load_span(order)
    assert part in caplog.text
    assert store.path(part).read_bytes() == before
    assert PipelineDriver([loaded.executor]).generate(PROMPT, 3) == expected


def test_parts_of_a_converted_folder_elsewhere_are_brought_once(tmp_path: Path) -> None:
    _, converted = converted_folder(tmp_path)
    options = StoreOptions(str(tmp_path / "store"), str(tmp_path / "cache"), is_source_discarded=True)
    order = order_of_converted(converted, 0, checkpoint_service="head:7000", store=options)
    converted.rename(tmp_path / "moved")
    reader = FolderReader(tmp_path / "moved")
    loader = TorchSpanLoader(torch.device("cpu"), lambda _: reader)
    loader.load(order, lambda _: None)
    assert {name for name, _, _ in reader.ranges} == {
        f"{part}{suffix}" for part in ("embedding", "block-0000") for suffix in (".json", ".weights")
    }
    store = store_of(order)
    assert store.path("block-0000").read_bytes() == (tmp_path / "moved" / "block-0000.weights").read_bytes()
    assert not list((tmp_path / "cache").rglob("*.weights"))
    flip_bit(store.path("block-0000"), store.manifest("block-0000").weights[0].pieces[0].tensors["weight"].offset)
    reader.ranges.clear()
    loader.load(order, lambda _: None)
    assert {name for name, _, _ in reader.ranges} == {"block-0000.json", "block-0000.weights"}


def test_a_folder_is_not_pruned_while_it_is_loaded_nor_while_its_embedding_is_read(tmp_path: Path) -> None:
    order = stored_order(make_checkpoint(tmp_path / "model", "llama"), tmp_path / "store")
    fill(order)
    (entry,) = list_entries(tmp_path / "store")
    kept = Pruned(0, (entry.key,))
    pruned: list[Pruned] = []
    loaded = TorchSpanLoader(torch.device("cpu")).load(order, lambda _: pruned.append(prune(entry)))
    assert set(pruned) == {kept}
    assert prune(entry) == kept
    loaded.executor.close()
