"""Measures the 8-bit linear layers of one block: whole, and oneDNN's products in them alone.

Prints, by number of rows, how long one block's layers take, what quantizing inputs and scaling results cost beyond the
bare products (ratio), and how many tokens per second all blocks' layers and the head would allow if nothing else took
time. Weights and inputs are random; the inputs have outliers in `--outlier-columns` columns of every row. Each figure
is the least of many single calls, contenders in turn, so other work on the machine shifts it little.

    python benchmarks/linears.py [--models tinyllama-1.1b,llama-70b,bloom-176b] [--rows 1,8,32,64] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measures import describe_machine
from cluster.model_spec import Precision
from worker.linear import LinearNumerics
from worker.linear.int8 import Int8Group
from worker.linear.int8_products import MIN_ROWS
from worker.linear.shared_input import SharedInput, SharingLinear
from worker.stored_weight import MemoryWeight, Piece

MAX_SECONDS = 2.0  # per figure
OUTLIER = 20.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Linear layers: (inputs, outputs of each layer that shares them)."""

    num_blocks: int
    groups: tuple[tuple[int, tuple[int, ...]], ...]  # of a block
    head: tuple[int, tuple[int, ...]]


SHAPES = {
    "tinyllama-1.1b": Shape(
        22,
        ((2048, (2048, 256, 256)), (2048, (2048,)), (2048, (5632, 5632)), (5632, (2048,))),
        (2048, (32000,)),
    ),
    "llama-70b": Shape(
        80,
        ((8192, (8192, 1024, 1024)), (8192, (8192,)), (8192, (28672, 28672)), (28672, (8192,))),
        (8192, (32000,)),
    ),
    "bloom-176b": Shape(
        70,
        ((14336, (43008,)), (14336, (14336,)), (14336, (57344,)), (57344, (14336,))),
        (14336, (250880,)),
    ),
}


def random_weights(num_in: int, sizes: Sequence[int]) -> list[MemoryWeight]:
    """Return weights of random codes, in pieces of at most 64 MiB."""
    step = max(1, (64 << 20) // num_in)
    weights = []
    for size in sizes:
        codes = torch.empty(size, num_in, dtype=torch.int8).random_(-127, 128)
        pieces = tuple(
            Piece(first, len(part), {"weight": part})
            for first, part in zip(range(0, size, step), torch.split(codes, step), strict=True)
        )
        weights.append(MemoryWeight("", Precision.INT8, (size, num_in), {"scale": torch.full((size,), 0.01)}, pieces))
    return weights


class Group:
    """Layers that share an input, and the bare products in them."""

    def __init__(self, num_in: int, sizes: Sequence[int]) -> None:
        numerics = LinearNumerics(torch.float32, torch.device("cpu"), is_exact=False)
        computed = Int8Group(random_weights(num_in, sizes), [None] * len(sizes), numerics)
        shared = SharedInput(computed)
        self._layers = [SharingLinear(shared, index) for index in range(len(sizes))]
        self._num_in, self._products = num_in, computed.products

    def draw(self, num_rows: int, num_outlier_columns: int) -> None:
        """Take new inputs."""
        self._x = torch.randn(1, num_rows, self._num_in).clamp_(-5, 5)
        self._x[..., :num_outlier_columns] = OUTLIER
        self._codes = torch.randint(0, 256, (max(MIN_ROWS, num_rows), self._num_in), dtype=torch.uint8)

    def compute(self) -> None:
        """Compute the layers."""
        for layer in self._layers:
            layer(self._x)

    def multiply(self) -> None:
        """Compute the bare products."""
        for _ in self._products.multiply(self._codes):
            pass


def least_seconds(*contenders: Callable[[], None]) -> list[float]:
    """Return the least time of each, called in turn."""
    least = [float("inf")] * len(contenders)
    end = time.perf_counter() + MAX_SECONDS * len(contenders)
    while time.perf_counter() < end:
        for index, contender in enumerate(contenders):
            start = time.perf_counter()
            contender()
            least[index] = min(least[index], time.perf_counter() - start)
    return least


def measure(groups: Sequence[Group], num_rows: int, num_outlier_columns: int) -> list[float]:
    """Return the seconds of the groups' layers and of their bare products."""
    for group in groups:
        group.draw(num_rows, num_outlier_columns)
    layers, products = [group.compute for group in groups], [group.multiply for group in groups]
    return least_seconds(lambda: _run(layers), lambda: _run(products))


def _run(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def figures(name: str, row_counts: Sequence[int], num_outlier_columns: int) -> Iterator[dict[str, object]]:
    """Yield a model's figures per number of rows."""
    shape = SHAPES[name]
    groups = [Group(num_in, sizes) for num_in, sizes in shape.groups]
    blocks = [measure(groups, num_rows, num_outlier_columns) for num_rows in row_counts]
    groups = [Group(*shape.head)]
    for num_rows, block in zip(row_counts, blocks, strict=True):
        head = measure(groups, num_rows, num_outlier_columns)
        layers, products = (shape.num_blocks * one + other for one, other in zip(block, head, strict=True))
        yield {
            "model": name,
            "rows": num_rows,
            "block_ms": round(1000 * block[0], 3),
            "products_ms": round(1000 * block[1], 3),
            "ratio": round(block[0] / block[1], 3),
            "tokens_per_second": round(num_rows / layers, 1),
            "products_tokens_per_second": round(num_rows / products, 1),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tinyllama-1.1b", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--outlier-columns", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    row_counts = [int(count) for count in arguments.rows.split(",")]
    print(json.dumps(describe_machine()) if arguments.json else f"{arguments.threads} threads, {describe_machine()}")
    with torch.inference_mode():
        for name in arguments.models.split(","):
            for row in figures(name, row_counts, arguments.outlier_columns):
                print(json.dumps(row) if arguments.json else "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
