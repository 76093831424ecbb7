"""Orders that go through the block store, and a process that converts one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster.hub.resolve import resolve
from cluster.load_order import LoadOrder, LoadProgress, StoreOptions
from cluster.model_spec import Precision
from cluster.span import Span
from tests.checkpoints import make_checkpoint
from tests.worker.pipeline_driver import make_order
from worker.architectures import open_architecture
from worker.architectures.base import Part
from worker.conversion import Conversion, convert
from worker.free_space import free_bytes
from worker.store.copied import store_of
from worker.store.fill import StoreFiller
from worker.store.folder import BlockStore
from worker.weights import CheckpointSource

ROOT = Path(__file__).parents[3]


def stored_order(
    folder: Path, root: Path, stage: int = 0, num_stages: int = 1, precision: Precision = Precision.INT8, **changes: Any
) -> LoadOrder:
    """Return an order whose parts are in the store below `root`."""
    options = changes.pop("store", StoreOptions(store_folder=str(root)))
    return make_order(folder, stage, num_stages, precision=precision, store=options, **changes)


def converted_folder(tmp_path: Path, precision: Precision = Precision.INT8) -> tuple[Path, Path]:
    """Return a checkpoint and the folder that `cluster convert --output` makes of it."""
    source = make_checkpoint(tmp_path / "model", "qwen3", num_shards=2)
    spec = resolve(str(source))
    asked = Conversion(spec, precision, Span(0, spec.num_blocks), StoreOptions(), tmp_path / "converted")
    convert(asked, 1, lambda _: None)
    return source, tmp_path / "converted"


def order_of_converted(folder: Path, stage: int, **changes: Any) -> LoadOrder:
    """Return the order for one of two stages of a folder that is converted already."""
    spec = resolve(str(folder))
    assert spec.stored_precision is not None
    fields = {"source": spec.source, "weight_files": spec.weight_files, "precision": spec.stored_precision}
    return make_order(folder, stage, 2, **(fields | changes))


def parts_of(order: LoadOrder) -> list[Part]:
    architecture = open_architecture(order.config)
    return architecture.parts(order.span, is_first=order.stage == 0, is_last=order.stage == order.num_stages - 1)


def fill(order: LoadOrder, store: BlockStore | None = None, **changes: Any) -> list[LoadProgress]:
    """Make an order's missing parts; return what was reported."""
    reports: list[LoadProgress] = []
    source = changes.pop("source", None) or (lambda: CheckpointSource(order))
    arguments = (order, open_architecture(order.config), store or store_of(order), source, reports.append)
    measure = changes.pop("measure", free_bytes)
    StoreFiller(*arguments, measure).fill(parts_of(order), **changes)
    return reports


def start_process(folder: Path, root: Path) -> subprocess.Popen[str]:
    """Start a process that converts a checkpoint to int8, and prints the parts that it wrote itself."""
    command = [sys.executable, "-m", "tests.worker.store.converted", str(folder), str(root)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main(folder: Path, root: Path) -> None:
    from worker.store import fill as module

    original = module.convert_part

    def noted(part: Part, *arguments: Any) -> Any:
        print(part.name, flush=True)
        return original(part, *arguments)

    module.convert_part = noted
    print("ready", flush=True)
    input()
    fill(stored_order(folder, root))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
