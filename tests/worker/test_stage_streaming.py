"""A stage whose weights come from disk computes the same bits as one that holds them."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import ConfigurationError, StorageError
from cluster.load_order import StoreOptions
from cluster.microbatch import WeightTraffic
from cluster.model_spec import Precision
from cluster.request import SequenceId
from tests.checkpoints import make_checkpoint
from tests.worker.pipeline_driver import (
    NUM_PAGES,
    PROMPT,
    PipelineDriver,
    assert_same_bits,
    load_span,
    make_order,
    outputs,
)
from tests.worker.stream.disk import flip_byte
from worker.executor import LoadedSpan
from worker.stage import Stage
from worker.store_weights import store_of

RING_BYTES = 384 << 10
NUM_BLOCKS = 3  # of the checkpoints below


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_checkpoint(tmp_path_factory.mktemp(name), name) for name in ("llama", "mixtral", "bloom")}


class Loads:
    """Loads spans with a block store of their own and closes them."""

    def __init__(self, folder: Path) -> None:
        self.store = StoreOptions(store_folder=str(folder))
        self.open: list[Stage] = []

    def span(self, checkpoint: Path, **changes: Any) -> LoadedSpan:
        """Load on the CPU."""
        loaded = load_span(make_order(checkpoint, store=self.store, **changes))
        assert isinstance(loaded.executor, Stage)
        self.open.append(loaded.executor)
        return loaded

    def stage(self, checkpoint: Path, **changes: Any) -> Stage:
        """Load on the CPU."""
        self.span(checkpoint, **changes)
        return self.open[-1]

    def part_path(self, checkpoint: Path, part: str, precision: Precision) -> Path:
        """Return the file of a part in the store."""
        return store_of(make_order(checkpoint, store=self.store, precision=precision)).path(part)

    def close(self) -> None:
        for stage in self.open:
            stage.close()
        self.open.clear()


@pytest.fixture
def loads(tmp_path: Path) -> Iterator[Loads]:
    made = Loads(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("num_streamed", [1, NUM_BLOCKS + 1])
@pytest.mark.parametrize("precision", list(Precision))
def test_streamed_equals_resident_bit_for_bit(
    folders: dict[str, Path], loads: Loads, precision: Precision, num_streamed: int, name: str
) -> None:
    resident = loads.stage(folders[name], precision=precision)
    streamed = loads.stage(folders[name], precision=precision, num_streamed=num_streamed, ring_bytes=RING_BYTES)
    assert_same_bits(resident, streamed)


def test_a_span_that_fits_has_no_ring_and_no_threads(folders: dict[str, Path], loads: Loads) -> None:
    before = threading.active_count()
    stage = loads.stage(folders["llama"], precision=Precision.INT8)
    outputs(stage)
    assert threading.active_count() == before
    assert stage._disk_weights is None


def traffic_of(stage: Stage, driver: PipelineDriver) -> WeightTraffic:
    """Return the traffic of one step of a new sequence."""
    return stage.execute(driver.header({driver.add(PROMPT): len(PROMPT)}), {}, lambda _: None).traffic


def test_a_step_accounts_for_what_it_read(folders: dict[str, Path], loads: Loads) -> None:
    resident = loads.span(folders["llama"], precision=Precision.INT8)
    loaded = loads.span(folders["llama"], precision=Precision.INT8, num_streamed=2, ring_bytes=RING_BYTES)
    stage = loads.open[-1]
    driver = PipelineDriver([stage])
    for _ in range(3):
        traffic = traffic_of(stage, driver)
        assert traffic.read_bytes == loaded.streamed_bytes > 0
        assert traffic.resident_bytes == loaded.weight_bytes < resident.weight_bytes
        assert traffic.stall_ns >= 0
    assert traffic_of(loads.open[0], PipelineDriver([loads.open[0]])) == WeightTraffic(0, 0, resident.weight_bytes)


def test_a_prompt_reads_each_streamed_block_once(folders: dict[str, Path], loads: Loads) -> None:
    stage = loads.stage(folders["llama"], num_streamed=NUM_BLOCKS, ring_bytes=RING_BYTES)
    driver = PipelineDriver([stage])
    short = traffic_of(stage, driver).read_bytes
    long = driver.add(PROMPT * 60)
    output = stage.execute(driver.header({long: 420}), {}, lambda _: None)
    assert output.traffic.read_bytes == short


def test_weights_give_way_to_pages_and_come_back_without_changing_tokens(
    folders: dict[str, Path], loads: Loads
) -> None:
    expected = PipelineDriver([loads.stage(folders["llama"], precision=Precision.INT8)]).generate(PROMPT, 40)
    kv_bytes = loads.open[0]._cache.size_bytes
    streamed = loads.span(
        folders["llama"], precision=Precision.INT8, num_streamed=1, ring_bytes=RING_BYTES, memory_bytes=1
    )
    (weights,) = {loads.open[-1]._disk_weights.residency._sizes[0]}  # type: ignore[union-attr]
    stage = loads.stage(
        folders["llama"],
        precision=Precision.INT8,
        num_streamed=1,
        ring_bytes=RING_BYTES,
        memory_bytes=loads.open[-1]._disk_weights.shifting_bytes + weights + weights // 2,  # type: ignore[union-attr]
    )
    driver = PipelineDriver([stage])
    tracked = driver.add(PROMPT)
    others = [driver.add(PROMPT) for _ in range(max(1, 2 * weights * NUM_PAGES // kv_bytes))]
    driver.step({tracked: len(PROMPT)})
    shares = [stage._disk_weights.shifting_bytes]  # type: ignore[union-attr]
    for number in range(39):
        slices = {tracked: 1} | ({other: len(PROMPT) for other in others} if number == 5 else {})
        driver.step(slices, finished=others if number == 12 else [])
        shares.append(stage._disk_weights.shifting_bytes)  # type: ignore[union-attr]
    assert driver.sequences[tracked].sampled == expected
    assert min(shares) < shares[0] <= shares[-1]
    assert streamed.streamed_bytes > 0


def flip(path: Path) -> None:
    flip_byte(path, path.stat().st_size - 4096)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


@pytest.mark.parametrize("part", ["block-0001", "head"])
@pytest.mark.parametrize("damage", [flip, cut])
def test_a_part_that_is_damaged_while_it_is_streamed_is_made_again(
    folders: dict[str, Path], loads: Loads, damage: Callable[[Path], None], part: str
) -> None:
    stage = loads.stage(folders["llama"], precision=Precision.INT8, num_streamed=NUM_BLOCKS + 1, ring_bytes=RING_BYTES)
    expected = PipelineDriver([stage]).generate(PROMPT, 4)
    path = loads.part_path(folders["llama"], part, Precision.INT8)
    whole = path.read_bytes()
    damage(path)
    stage.open_epoch()
    assert PipelineDriver([stage]).generate(PROMPT, 12)[:4] == expected
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "options", [{"num_streamed": 2, "ring_bytes": RING_BYTES}, {"num_streamed": 1, "ring_bytes": RING_BYTES}]
)
def test_a_part_that_was_damaged_before_loading_is_made_again(
    folders: dict[str, Path], loads: Loads, damage: Callable[[Path], None], options: dict[str, int]
) -> None:
    stage = loads.stage(folders["llama"], precision=Precision.INT8, **options)
    expected = PipelineDriver([stage]).generate(PROMPT, 4)
    loads.close()
    damage(loads.part_path(folders["llama"], "block-0001", Precision.INT8))
    stage = loads.stage(folders["llama"], precision=Precision.INT8, **options)
    assert PipelineDriver([stage]).generate(PROMPT, 4) == expected


def test_damage_that_cannot_be_repaired_fails_the_step_by_name_and_the_next_works_once_it_is(
    loads: Loads, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    stage = loads.stage(folder, precision=Precision.INT8, num_streamed=3, ring_bytes=RING_BYTES)
    expected = PipelineDriver([stage]).generate(PROMPT, 4)
    path = loads.part_path(folder, "block-0001", Precision.INT8)
    shutil.copytree(path.parent, tmp_path / "backup")
    (folder / "model.safetensors").rename(tmp_path / "gone")
    flip(path)
    stage.open_epoch()
    driver = PipelineDriver([stage])
    for _ in range(2):  # the ring may have read ahead for as many passes
        with suppress(StorageError):
            driver.generate(PROMPT, 4)
    with pytest.raises(StorageError, match="block-0001"):
        driver.generate(PROMPT, 4)
    shutil.copytree(tmp_path / "backup", path.parent, dirs_exist_ok=True)
    stage.open_epoch()
    assert PipelineDriver([stage]).generate(PROMPT, 4) == expected


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8, Precision.NF4])
def test_experts_on_demand_equal_resident_ones_bit_for_bit(
    folders: dict[str, Path], loads: Loads, precision: Precision
) -> None:
    resident = loads.stage(folders["mixtral"], precision=precision)
    cached = loads.stage(folders["mixtral"], precision=precision, expert_cache_bytes=72 << 10)
    assert_same_bits(resident, cached)
    cached.open_epoch()
    assert traffic_of(cached, PipelineDriver([cached])).read_bytes > 0


def test_experts_that_are_read_on_demand_are_told_once_loaded(folders: dict[str, Path], loads: Loads) -> None:
    resident = loads.span(folders["mixtral"], precision=Precision.INT8)
    cached = loads.span(folders["mixtral"], precision=Precision.INT8, expert_cache_bytes=72 << 10)
    assert resident.streamed_bytes == 0
    assert 0 < resident.weight_bytes - cached.weight_bytes <= cached.streamed_bytes  # with what aligns them


def test_a_ring_too_small_is_refused(folders: dict[str, Path], loads: Loads) -> None:
    before = psutil.Process().num_fds()
    with pytest.raises(ConfigurationError, match="buffers for streamed weights"):
        loads.stage(folders["llama"], num_streamed=1, ring_bytes=1000)
    gc.collect()
    assert psutil.Process().num_fds() <= before


def test_closing_ends_threads_and_files(folders: dict[str, Path], loads: Loads) -> None:
    loads.stage(folders["llama"], num_streamed=1, ring_bytes=RING_BYTES)
    loads.close()
    gc.collect()
    threads, files = threading.active_count(), psutil.Process().num_fds()
    outputs(loads.stage(folders["llama"], num_streamed=3, ring_bytes=RING_BYTES))
    assert threading.active_count() > threads
    loads.close()
    gc.collect()
    assert threading.active_count() == threads
    assert psutil.Process().num_fds() == files


def test_a_thousand_passes_leak_nothing(folders: dict[str, Path], loads: Loads) -> None:
    stage = loads.stage(folders["llama"], precision=Precision.INT8, num_streamed=2, ring_bytes=RING_BYTES)
    driver = PipelineDriver([stage])
    process = psutil.Process()

    def run(num_passes: int) -> tuple[int, int, int]:
        for _ in range(num_passes):
            sequence_id = driver.add(PROMPT[:1])
            previous = [SequenceId(sequence_id - 1)] if sequence_id else []
            stage.execute(driver.header({sequence_id: 1}, finished=previous), {}, lambda _: None)
            driver.free_pages += driver.sequences[sequence_id].pages
        gc.collect()
        return process.num_fds(), threading.active_count(), process.memory_info().rss

    fds, threads, memory = run(100)
    after = run(1000)
    assert after[:2] == (fds, threads)
    assert after[2] < memory + (8 << 20)
