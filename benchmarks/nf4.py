"""Times one NF4 linear layer against what bitsandbytes offers for the same weight, and encoding against its own.

Contenders alternate in one run and several weights take turns, so that all of them meet the same machine and caches:

* ours: resident, and streamed (as if its codes had just been read)
* dequantize: bitsandbytes.functional.dequantize_4bit of the whole weight, then torch.nn.functional.linear
* matmul_4bit: bitsandbytes.matmul_4bit

    python benchmarks/nf4.py --threads 1,2 --rows 1,8,32,256
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.model_spec import Precision
from command_line import Parser, integers, run_script
from measures import describe_machine
from worker.linear.base import Linear, LinearNumerics
from worker.linear.nf4 import build_nf4
from worker.numerics import name_of
from worker.quantization.nf4 import encode
from worker.stored_weight import MemoryWeight

NUM_WEIGHTS = 3  # that take turns, more than the last-level cache holds
SECONDS = 1.5  # for each combination


class StreamedWeight(MemoryWeight):
    """A weight that is asked for its pieces at every call."""

    @property
    def is_streamed(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight for every contender."""

    resident: Linear
    streamed: Linear
    codes: Tensor
    state: Any


def make_weight(shape: tuple[int, int], seed: int, compute: torch.dtype) -> Weight:
    """Return a random weight."""
    from bitsandbytes import functional as bitsandbytes

    floats = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    stored = encode("weight", floats)
    streamed = StreamedWeight(stored.name, Precision.NF4, stored.shape, stored.small, stored.held)
    numerics = LinearNumerics(compute, torch.device("cpu"), is_exact=False)
    codes, state = bitsandbytes.quantize_4bit(floats, blocksize=64, quant_type="nf4", compress_statistics=True)
    state.dtype = compute
    return Weight(build_nf4(stored, None, numerics), build_nf4(streamed, None, numerics), codes, state)


def contenders() -> Mapping[str, Callable[[Weight, Tensor], Tensor]]:
    """Return what is compared, by name."""
    import bitsandbytes

    def dequantize(weight: Weight, rows: Tensor) -> Tensor:
        whole = bitsandbytes.functional.dequantize_4bit(weight.codes, weight.state)
        return torch.nn.functional.linear(rows, whole)

    return {
        "ours, resident": lambda weight, rows: weight.resident(rows),
        "ours, streamed": lambda weight, rows: weight.streamed(rows),
        "dequantize": dequantize,
        "matmul_4bit": lambda weight, rows: bitsandbytes.matmul_4bit(rows, weight.codes.t(), weight.state),
    }


def measure(weights: Sequence[Weight], rows: Tensor) -> dict[str, float]:
    """Return each contender's best time in milliseconds."""
    best: dict[str, float] = {}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for name, compute in contenders().items():
            for weight in weights:
                elapsed = timed(lambda: compute(weight, rows))  # noqa: B023 - called at once
                best[name] = min(best.get(name, elapsed), elapsed)
    return best


def timed(call: Callable[[], object]) -> float:
    """Return milliseconds."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure_encoding(shape: tuple[int, int]) -> dict[str, float]:
    """Return nanoseconds per parameter."""
    from bitsandbytes import functional as bitsandbytes

    weight = torch.randn(*shape).bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: encode("weight", weight),
        "quantize_4bit": lambda: bitsandbytes.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=True
        ),
    }
    best = {name: min(timed(call) for _ in range(3)) for name, call in calls.items()}
    return {name: elapsed * 1e6 / weight.numel() for name, elapsed in best.items()}


def main() -> None:
    arguments = parse()
    shape = (arguments.num_out, arguments.num_in)
    machine = describe_machine()
    report: list[dict[str, Any]] = []
    for compute in (torch.bfloat16, torch.float32):
        weights = [make_weight(shape, seed, compute) for seed in range(NUM_WEIGHTS)]
        for num_threads in arguments.threads:
            torch.set_num_threads(num_threads)
            for num_rows in arguments.rows:
                times = measure(weights, torch.randn(num_rows, shape[1]).to(compute))
                report.append({"compute": name_of(compute), "threads": num_threads, "rows": num_rows, "ms": times})
                if not arguments.json:
                    print_times(report[-1])
    torch.set_num_threads(1)
    encoding = measure_encoding(shape)
    if arguments.json:
        figures = {"shape": shape, "times": report, "encoding_ns": encoding}
        print(json.dumps({"machine": machine, "benchmark": shlex.join(sys.argv)} | figures, indent=1))
    else:
        print(machine)
        print("encoding, 1 thread, ns per parameter: " + "  ".join(f"{name} {ns:.1f}" for name, ns in encoding.items()))


def print_times(entry: Mapping[str, Any]) -> None:
    """Print one line."""
    times = "  ".join(f"{name} {ms:8.2f}" for name, ms in entry["ms"].items())
    print(f"{entry['compute']}  {entry['threads']} threads  {entry['rows']:4} rows   ms: {times}", flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--out", dest="num_out", type=int, default=5632, help="rows of the weight")
    parser.add_argument("--in", dest="num_in", type=int, default=2048, help="columns of the weight")
    parser.add_argument("--threads", type=integers, default="1,2", help="that compute")
    parser.add_argument("--rows", type=integers, default="1,8,32,256", help="of inputs")
    return parser.parse_measurement()


if __name__ == "__main__":
    run_script(main)
