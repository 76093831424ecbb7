"""What int8 linear layers alone allow: those of a Llama, and nothing else of it.

As a process it answers workloads as the peers do: each step multiplies ready-made inputs with every layer's packed
weights, layers that share an input as one product, the head only for rows that are sampled. `onednn` is oneDNN's
product of ready-made codes; `ours` are Spanwise's layers as this machine builds them, which quantize their inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.model_spec import Precision
from measures import Round, Workload
from peers.process import Run, answer
from stage import STEP_TOKENS
from worker.heap import keep_freed_memory
from worker.linear.base import LinearNumerics, Scratch
from worker.linear.build import build_linears
from worker.quantization.encode import encode

ZERO_POINT = 128


class OneDnnProduct:
    """One packed weight of random codes."""

    min_rows, dtype = 4, torch.uint8  # the product takes longer for fewer

    def __init__(self, num_rows: int, num_columns: int) -> None:
        codes = torch.randint(-127, 128, (num_rows, num_columns), dtype=torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scale = torch.ones(num_rows)
        self._zero_points = torch.zeros(num_rows, dtype=torch.int32)
        self.num_columns = num_columns

    def __call__(self, codes: Tensor) -> Tensor:
        """Multiply uint8 `[num_rows, in]`."""
        weight = (self._packed, self._scale, self._zero_points, None)
        options = (1.0, 0, torch.float32, "none", [], "")
        out: Tensor = torch.ops.onednn.qlinear_pointwise(codes, 1.0, ZERO_POINT, *weight, *options)
        return out


class OurLayer:
    """One layer of random weights."""

    min_rows, dtype = 1, torch.float32

    def __init__(self, num_rows: int, num_columns: int) -> None:
        weight = encode("layer", torch.randn(num_rows, num_columns), Precision.INT8)
        numerics = LinearNumerics(torch.float32, torch.device("cpu"), is_exact=False)
        (self._layer,) = build_linears([weight], [None], numerics, Scratch())
        self.num_columns = num_columns

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply fp32 `[num_rows, in]`."""
        out: Tensor = self._layer(rows)
        return out


KERNELS: dict[str, type[OneDnnProduct | OurLayer]] = {"onednn": OneDnnProduct, "ours": OurLayer}


def block_shapes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (out, in) of a block's products: q, k and v together, then o, gate and up together, down."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    out = hidden + 2 * head_dim * config["num_key_value_heads"]
    return [(out, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]


def load(config: Mapping[str, Any], kernel: str, num_threads: int) -> tuple[Mapping[str, Any], Run]:
    """Pack all layers."""
    keep_freed_memory()  # as a worker does
    torch.set_num_threads(num_threads)
    make = KERNELS[kernel]
    blocks = [make(*shape) for _ in range(config["num_hidden_layers"]) for shape in block_shapes(config)]
    head = make(config["vocab_size"], config["hidden_size"])

    def step(num_tokens: int, num_sampled: int) -> None:
        num_rows = max(make.min_rows, num_tokens)
        inputs = {size: torch.ones(num_rows, size, dtype=make.dtype) for size in {one.num_columns for one in blocks}}
        for product in blocks:
            product(inputs[product.num_columns])
        head(inputs[head.num_columns][: max(make.min_rows, num_sampled)])

    def run(workload: Workload) -> Round:
        begin = time.perf_counter()
        size = max(1, STEP_TOKENS // workload.num_input_tokens)
        with torch.inference_mode():
            for start in range(0, workload.concurrency, size):
                num_prompts = min(size, workload.concurrency - start)
                step(num_prompts * workload.num_input_tokens, num_prompts)
            for _ in range(workload.num_output_tokens - 1):
                step(workload.concurrency, workload.concurrency)
        return Round(time.perf_counter() - begin, workload.num_tokens, [], [])

    return {"system": f"int8 linear layers alone, {kernel}", "version": f"torch {torch.__version__}"}, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder with a Llama's config.json")
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    answer(lambda: load(config, arguments.kernel, arguments.threads))


if __name__ == "__main__":
    main()
