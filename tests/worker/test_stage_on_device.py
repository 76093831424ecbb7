"""A stage whose streamed weights are copied to a device computes the same bits as one that holds them there.

On a simulated device copies are as late as they may be, and computations are a CPU's; on a GPU both are its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from cluster.load_order import StoreOptions
from cluster.model_spec import Precision
from tests.checkpoints import make_checkpoint
from tests.worker.pipeline_driver import PROMPT, PipelineDriver, assert_same_bits, make_order
from tests.worker.stream.disk import flip_byte
from tests.worker.stream.simulated_device import SimulatedDevice
from worker.loading import TorchSpanLoader
from worker.stage import Stage
from worker.store_weights import store_of
from worker.stream.cuda import CudaCopier
from worker.stream.device_source import Copier

RING_BYTES = 384 << 10
CACHE_BYTES = 72 << 10
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_checkpoint(tmp_path_factory.mktemp(name), name) for name in ("llama", "mixtral", "bloom")}


@dataclass
class Loads:
    """Loads one span with a block store of its own onto one device."""

    checkpoint: Path
    store: StoreOptions
    device: torch.device
    make_copier: Callable[[torch.device], Copier | None]
    open: list[Stage] = field(default_factory=list)

    def stage(self, **changes: Any) -> Stage:
        loader = TorchSpanLoader(self.device, make_copier=self.make_copier)
        order = make_order(self.checkpoint, store=self.store, **changes)
        stage = loader.load(order, lambda _: None).executor
        assert isinstance(stage, Stage)
        self.open.append(stage)
        return stage

    def part_path(self, part: str, precision: Precision) -> Path:
        return store_of(make_order(self.checkpoint, store=self.store, precision=precision)).path(part)

    def close(self) -> None:
        for stage in self.open:
            stage.close()
        self.open.clear()


@pytest.fixture
def make_loads(tmp_path: Path) -> Iterator[Callable[..., Loads]]:
    made: list[Loads] = []

    def make(*arguments: Any) -> Loads:
        made.append(Loads(arguments[0], StoreOptions(store_folder=str(tmp_path)), *arguments[1:]))
        return made[-1]

    yield make
    for loads in made:
        loads.close()


def check_streaming(loads: Loads, precision: Precision, num_streamed: int) -> None:
    resident = loads.stage(precision=precision)
    streamed = loads.stage(precision=precision, num_streamed=num_streamed, ring_bytes=RING_BYTES, memory_bytes=1 << 40)
    assert_same_bits(resident, streamed)
    streamed.open_epoch()
    driver = PipelineDriver([streamed])
    traffic = streamed.execute(driver.header({driver.add(PROMPT): len(PROMPT)}), {}, lambda _: None).traffic
    assert streamed._disk_weights is not None
    assert traffic.read_bytes == streamed._disk_weights.streamed_bytes > 0


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("num_streamed", [1, 4])  # of three blocks and the head
@pytest.mark.parametrize("precision", list(Precision))
def test_streamed_equals_resident_with_copies_as_late_as_can_be(
    folders: dict[str, Path], make_loads: Callable[..., Loads], precision: Precision, num_streamed: int, name: str
) -> None:
    device = SimulatedDevice()
    check_streaming(make_loads(folders[name], CPU, lambda _: device), precision, num_streamed)
    assert device.num_copies > 0


@has_gpu
@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("num_streamed", [1, 4])
@pytest.mark.parametrize("precision", list(Precision))
def test_streamed_equals_resident_on_a_gpu(
    folders: dict[str, Path], make_loads: Callable[..., Loads], precision: Precision, num_streamed: int, name: str
) -> None:
    check_streaming(make_loads(folders[name], GPU, CudaCopier), precision, num_streamed)


def check_experts(loads: Loads, precision: Precision) -> None:
    resident = loads.stage(precision=precision)
    assert_same_bits(resident, loads.stage(precision=precision, expert_cache_bytes=CACHE_BYTES))


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8, Precision.NF4])
def test_experts_on_demand_equal_resident_ones_with_copies_as_late_as_can_be(
    folders: dict[str, Path], make_loads: Callable[..., Loads], precision: Precision
) -> None:
    device = SimulatedDevice()
    check_experts(make_loads(folders["mixtral"], CPU, lambda _: device), precision)
    assert device.num_copies > 0


@has_gpu
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8, Precision.NF4])
def test_experts_on_demand_equal_resident_ones_on_a_gpu(
    folders: dict[str, Path], make_loads: Callable[..., Loads], precision: Precision
) -> None:
    check_experts(make_loads(folders["mixtral"], GPU, CudaCopier), precision)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="older torch")
@pytest.mark.parametrize(
    ("name", "precision"),
    [("llama", "bf16"), ("llama", "int8"), ("llama", "nf4"), ("bloom", "int8"), ("mixtral", "nf4")],
)
def test_a_stage_on_another_device_keeps_tensors_apart_and_streams_the_same_bits(name: str, precision: str) -> None:
    command = [sys.executable, "-m", "tests.worker.separate_device", name, precision]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]


def test_nothing_shifts_where_pages_have_all_their_memory_at_once(
    folders: dict[str, Path], make_loads: Callable[..., Loads]
) -> None:
    loads = make_loads(folders["llama"], CPU, lambda _: SimulatedDevice())
    stage = loads.stage(num_streamed=2, ring_bytes=RING_BYTES, memory_bytes=1)
    before = stage._disk_weights.shifting_bytes  # type: ignore[union-attr]
    PipelineDriver([stage]).generate(PROMPT, 12)
    assert stage._disk_weights.shifting_bytes == before > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("part", ["block-0001", "head"])
def test_a_damaged_part_is_made_again(folders: dict[str, Path], make_loads: Callable[..., Loads], part: str) -> None:
    loads = make_loads(folders["llama"], CPU, lambda _: SimulatedDevice())
    stage = loads.stage(precision=Precision.INT8, num_streamed=4, ring_bytes=RING_BYTES)
    expected = PipelineDriver([stage]).generate(PROMPT, 4)
    path = loads.part_path(part, Precision.INT8)
    whole = path.read_bytes()
    flip_byte(path, path.stat().st_size - 4096)
    stage.open_epoch()
    assert PipelineDriver([stage]).generate(PROMPT, 12)[:4] == expected
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "changes", [{"num_streamed": 2, "ring_bytes": RING_BYTES}, {"expert_cache_bytes": CACHE_BYTES}]
)
def test_memory_is_pinned_from_when_all_is_loaded_until_the_stage_is_closed(
    folders: dict[str, Path], make_loads: Callable[..., Loads], changes: dict[str, int]
) -> None:
    device = SimulatedDevice()
    loads = make_loads(folders["mixtral" if "expert_cache_bytes" in changes else "llama"], CPU, lambda _: device)
    stage = loads.stage(precision=Precision.INT8, **changes)
    pinned = sum(memory.nbytes for memory in device.pinned)
    assert 0 < pinned <= max(changes.values())
    PipelineDriver([stage]).generate(PROMPT, 2)
    loads.close()
    assert not device.pinned


def test_a_span_that_fits_makes_no_copier(folders: dict[str, Path], make_loads: Callable[..., Loads]) -> None:
    def make_copier(_: torch.device) -> Copier:
        raise AssertionError

    make_loads(folders["llama"], CPU, make_copier).stage(precision=Precision.INT8)


@has_gpu
def test_copies_to_a_gpu_are_whole_and_wait_for_what_is_computed() -> None:
    copier = CudaCopier(GPU)
    source = torch.arange(1 << 24).to(torch.uint8)
    target = copier.allocate(source.nbytes)
    copier.pin(source)
    try:
        target.zero_()
        rows = torch.ones(4096, 4096, device=GPU)
        for _ in range(50):
            rows = rows @ rows * 2**-12
        before = target.clone()
        copier.copy(source, target, copier.mark()).synchronize()
        assert torch.equal(target.cpu(), source)
        assert not before.any()
    finally:
        copier.unpin(source)
