"""BLOOM-176B's real shape on one machine under a memory limit: seconds per pass, beside what the disk allows.

    python benchmarks/bloom.py --precision int8 --folder /mnt/disk/bloom-176b
    python benchmarks/bloom.py --precision nf4 --folder /mnt/disk/bloom-176b

Makes a converted checkpoint of true size in FOLDER and removes it in the end (--keep keeps it): some distinct blocks of
random weights, every other block a hard link to one of them, the true head, and an embedding that is a hole. Reads are
direct, so all of them really go to the device: 70 blocks cost what 70 different ones would, but the disk needs room for
few. int8 takes 9 GB of disk, NF4 5 GB.

The model is then loaded as a user would load it, with `LocalModel` and a budget 10 % below the limit of the control
group around it. "disk" is what fio reads of the same files, directly, just before and just after. A tutorial that made
BLOOM on a desktop known takes about 180 s per token. Needs root, for control groups and the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cluster.model_spec import FolderSource, Precision
from command_line import Parser, integers, run_script, size
from limits import drop_page_cache, measure_disk, memory_limit
from make_checkpoint import SHAPES, make_config, write_tokenizer
from measures import Round, Workload, describe_machine
from peers import environment
from peers.process import Peer
from streamed import BUDGET_SHARE, FIO_BYTES, FIO_DEPTH
from worker.architectures import Architecture, open_architecture
from worker.architectures.base import Part
from worker.blocks import LinearLayer
from worker.checkpoint_weights import CheckpointWeights
from worker.store.convert import convert_part
from worker.store.disk import SystemDisk, disk_errors, partial, write_partial
from worker.store.folder import BlockStore, describe_source
from worker.store.key import EMBEDDING, HEAD, block_part
from worker.store.layout import WeightSpec, piece_specs, small_specs
from worker.store.manifest import to_json
from worker.stored_weight import MemoryWeight, Piece

TUTORIAL_SECONDS = 180.0  # per token
CODE_STD = 73.0  # of codes drawn evenly from -127 to 127
WEIGHT_STD = 0.01
CHUNK_BYTES = 64 << 20


class HoleDisk(SystemDisk):
    """Leaves holes where zeros are written."""

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """See Disk."""
        chunk = data[:CHUNK_BYTES]
        if np.frombuffer(chunk, np.uint8).any():
            return super().write(file, chunk, offset)
        return len(chunk)


@dataclass(frozen=True, slots=True)
class RandomCheckpoint:
    """Stands for a checkpoint where parts are made: weights of any size without their source."""

    architecture: Architecture
    precision: Precision

    def part(self, part: Part, precision: Precision, *, is_copied: bool) -> RandomCheckpoint:  # noqa: ARG002
        """See CheckpointWeights."""
        return self

    def table(self) -> Tensor:
        """Return the embedding: zeros that take no memory, unlike torch's own."""
        zeros = np.zeros((self.architecture.vocab_size, self.architecture.hidden_size), np.int16)
        return torch.from_numpy(zeros).view(torch.bfloat16)

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """Return a norm's or a bias' values: with the embedding zero, biases are where numbers come from."""
        return torch.randn(shape) * 0.1 if name.endswith("bias") else torch.ones(shape)

    def spec(self, layer: LinearLayer) -> WeightSpec:
        """See PartOfCheckpoint."""
        return WeightSpec(layer.name, self.precision, layer.shape)

    def weight(self, layer: LinearLayer) -> MemoryWeight:
        """Return random codes, and scales that keep what they are multiplied with in bounds."""
        num_rows, num_columns = layer.shape
        large = {
            role: _random_bytes(spec.shape, signed=spec.dtype == "I8")
            for role, spec in piece_specs(self.precision, num_rows, num_columns).items()
        }
        value = WEIGHT_STD / CODE_STD if self.precision is Precision.INT8 else WEIGHT_STD
        small = {role: torch.full(spec.shape, value) for role, spec in small_specs(self.precision, layer.shape).items()}
        return MemoryWeight(layer.name, self.precision, layer.shape, small, (Piece(0, num_rows, large),))


def _random_bytes(shape: tuple[int, ...], *, signed: bool) -> Tensor:
    size = torch.Size(shape).numel()
    words = torch.randint(-(2**63), 2**63 - 1, (-(-size // 8),), dtype=torch.int64)
    codes = words.view(torch.int8 if signed else torch.uint8)[:size].view(shape)
    return codes.clamp_(min=-127) if signed else codes


def make_model(folder: Path, shape: str, num_blocks: int | None, precision: Precision, num_distinct: int) -> BlockStore:
    """Write a converted checkpoint that serves by itself."""
    config = make_config(shape, num_blocks)
    config.architectures = ["BloomForCausalLM"]
    config.dtype = torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    architecture = open_architecture(json.loads((folder / "config.json").read_text()))
    store = BlockStore(folder.parent, folder.name)
    checkpoint = cast(CheckpointWeights, RandomCheckpoint(architecture, precision))
    for name in [*map(block_part, range(num_distinct)), HEAD]:
        convert_part(architecture.build_part(name), checkpoint, store, precision)
        print(f"made {name}: {store.path(name).stat().st_size / 1e9:.2f} GB", file=sys.stderr)
    holes = BlockStore(folder.parent, folder.name, HoleDisk())
    convert_part(architecture.build_part(EMBEDDING), checkpoint, holes, precision)
    for block in range(num_distinct, architecture.num_blocks):
        link_part(store, block_part(block % num_distinct), block_part(block))
    store.describe(describe_source(FolderSource(shape, "random"), precision, architecture.num_blocks))
    return store


def link_part(store: BlockStore, existing: str, name: str) -> None:
    """Let a part have another one's bytes, with a manifest of its own."""
    with disk_errors(name, store.folder):
        os.link(store.path(existing), store.path(name))
        write_partial(store.disk, store.manifest_path(name), to_json(replace(store.manifest(existing), part=name)))
        store.disk.replace(partial(store.manifest_path(name)), store.manifest_path(name))


@contextmanager
def model_in(arguments: argparse.Namespace) -> Iterator[BlockStore]:
    """Make the model, or use the one that is kept; remove it unless it is to be kept."""
    folder = arguments.folder / f"{arguments.shape}-{arguments.precision}"
    try:
        made = BlockStore(folder.parent, folder.name)
        if made.description() is None:
            shutil.rmtree(folder, ignore_errors=True)
            precision = Precision(arguments.precision)
            made = make_model(folder, arguments.shape, arguments.blocks, precision, arguments.distinct)
        yield made
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def measure(arguments: argparse.Namespace, store: BlockStore) -> dict[str, Any]:
    """Load the model in its group, run every workload, measure the disk before and after."""
    context = arguments.input_tokens + arguments.output_tokens
    budget = str(int(arguments.memory * BUDGET_SHARE))
    command = [sys.executable, "-m", "local_model", str(store.folder), "--memory", budget]
    command += ["--precision", arguments.precision, "--threads", str(arguments.threads)]
    command += ["--max-context", str(context), "--kv-dtype", arguments.kv_dtype]
    disk = [read_disk(arguments, store)]
    with (
        memory_limit(arguments.memory) as group,
        Peer(group.wrap(command), environment.variables(None, arguments.threads)) as peer,
    ):
        vocab_size = SHAPES[arguments.shape]["vocab_size"]
        runs = []
        for concurrency in arguments.concurrency:
            workload = Workload(concurrency, arguments.input_tokens, arguments.output_tokens, vocab_size)
            runs.append(pass_figures(workload, peer.run(workload)))
            print(runs[-1], file=sys.stderr)
        rss = peak_rss_bytes(peer.process_id)
        memory = {"peak_bytes": group.peak_bytes, "num_times_at_limit": group.num_times_at_limit, "rss_bytes": rss}
        about = peer.about
    disk.append(read_disk(arguments, store))
    if not about["num_streamed"]:
        raise SystemExit("bloom.py: all weights fit in memory, so nothing of the disk was measured: lower --memory")
    for run in runs:
        run["over_disk_time"] = run["seconds_per_pass"] * fmean(disk) / run["bytes_per_pass"]
    memory["limit_bytes"] = arguments.memory
    return {"about": about, "disk_bytes_per_second": disk, "memory": memory, "runs": runs}


def read_disk(arguments: argparse.Namespace, store: BlockStore) -> float:
    """Return what the device gives for the distinct files that are streamed."""
    files = [store.path(name) for name in [*map(block_part, range(arguments.distinct)), HEAD]]
    drop_page_cache()
    speed = measure_disk(files, block_bytes=FIO_BYTES, depth=FIO_DEPTH, seconds=arguments.fio_seconds)
    print(f"{speed.method}: {speed.bytes_per_second / 1e9:.2f} GB/s", file=sys.stderr)
    return speed.bytes_per_second


def pass_figures(workload: Workload, run: Round) -> dict[str, Any]:
    """Return what a decode pass took and read."""
    seconds = fmean(run.inter_token_seconds)
    return {
        "concurrency": workload.concurrency,
        "first_token_seconds": max(run.first_token_seconds),
        "seconds_per_pass": seconds,
        "tokens_per_minute": 60 * workload.concurrency / seconds,
        "bytes_per_pass": run.read_bytes / run.num_passes,
        "stall_share": run.stall_seconds / run.wall_seconds,
    }


def peak_rss_bytes(process_id: int) -> int:
    """Return the most memory that a process had resident, page cache aside."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def make_table(report: dict[str, Any]) -> Table:
    """Return the figures for people."""
    memory = report["memory"]
    peak, resident = (size / 2**30 for size in (memory["peak_bytes"] or 0, memory["rss_bytes"]))
    title = f"{report['shape']}, {report['precision']}, {report['blocks']} blocks: "
    title += f"peak {peak:.2f} GiB with page cache, {resident:.2f} without"
    columns = ("requests", "first token s", "s/pass", "GB/pass", "x disk time", "tokens/min", "tutorial s/pass")
    table = Table(*columns, title=title)
    for run in report["runs"]:
        cells = [f"{run['first_token_seconds']:.1f}", f"{run['seconds_per_pass']:.2f}"]
        cells += [f"{run['bytes_per_pass'] / 1e9:.1f}", f"{run['over_disk_time']:.2f}"]
        cells += [f"{run['tokens_per_minute']:.2f}", f"{TUTORIAL_SECONDS:.0f}"]
        table.add_row(str(run["concurrency"]), *cells)
    return table


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--precision", choices=("int8", "nf4"), default="int8", help="of weights")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--memory", type=size, default="16GiB", help="limit of the control group")
    shapes = [name for name in SHAPES if name.startswith("bloom")]
    parser.add_argument("--shape", choices=shapes, default="bloom-176b", help="a published one")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--distinct", type=int, default=2, help="blocks with bytes of their own")
    parser.add_argument("--concurrency", type=integers, default="1,16", help="requests at once")
    parser.add_argument("--input-tokens", type=int, default=8, help="of every prompt")
    parser.add_argument("--output-tokens", type=int, default=4, help="of every request")
    parser.add_argument(
        "--kv-dtype", choices=("auto", "fp32", "bf16", "fp16"), default="bf16", help="of keys and values"
    )
    parser.add_argument("--threads", type=int, default=2, help="that compute")
    parser.add_argument("--fio-seconds", type=float, default=20.0, help="of both looks at the disk")
    parser.add_argument("--keep", action="store_true", help="leave the model for the next run")
    return parser.parse_measurement(quick="--shape bloom-7b1 --blocks 6 --memory 2GiB --fio-seconds 2")


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout` removes the model, too
    machine = describe_machine()
    with model_in(arguments) as store:
        num_blocks = sum(name.startswith("block") for name in store.parts())
        figures = measure(arguments, store)
    report: dict[str, Any] = {
        "machine": machine,
        "benchmark": shlex.join(sys.argv),
        "shape": arguments.shape,
        "precision": arguments.precision,
        "blocks": num_blocks,
        "input_tokens": arguments.input_tokens,
        "output_tokens": arguments.output_tokens,
    } | figures
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        Console(width=140).print(machine, report["about"], make_table(report))


if __name__ == "__main__":
    run_script(main)
