"""What blocks spend outside their linear layers: TinyLlama-1.1B's shape in int8 with random weights, in this process.

    python benchmarks/stage_overhead.py --blocks 6 --threads 2

Each step runs by turns with real linear layers and with ones that return zeros at once, whose time is all that is not
a linear layer. Figures are microseconds per block, the least over the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cluster.microbatch import Epoch, PageDelta, StepHeader, StepId
from cluster.model_spec import Precision
from cluster.request import SequenceId
from measures import describe_machine
from worker.architectures import open_architecture
from worker.architectures.base import Architecture
from worker.blocks import LinearLayer, StepContext, materialize
from worker.heap import keep_freed_memory
from worker.kv_cache import KVCache
from worker.linear import LinearNumerics, Scratch, build_linears
from worker.quantization.encode import encode

PAGE_SIZE = 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Work:
    """A step: every sequence has `context` tokens in the cache and computes `num_tokens` more."""

    name: str
    num_sequences: int
    context: int
    num_tokens: int

    def header(self) -> StepHeader:
        """Return the step, which gives every sequence its pages."""
        rows = self.num_sequences
        pages = -(-(self.context + self.num_tokens) // PAGE_SIZE)
        tables = [tuple(range(i * pages, (i + 1) * pages)) for i in range(rows)]
        return StepHeader(
            epoch=Epoch(1, 1),
            step_id=StepId(0),
            deadline_ms=1000,
            sequence_ids=tuple(SequenceId(i) for i in range(rows)),
            start_positions=(self.context,) * rows,
            lengths=(self.num_tokens,) * rows,
            token_ids=(1,) * rows * self.num_tokens,
            logits_rows=(0,) * rows,
            is_sampled=(False,) * rows,
            page_deltas=tuple(PageDelta(SequenceId(i), 0, table) for i, table in enumerate(tables)),
        )


class NoLinear(nn.Module):
    """Returns zeros at once, the same ones again and again."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs, self._zeros = num_outputs, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        if self._zeros.shape[:-1] != x.shape[:-1]:
            self._zeros = torch.zeros(*x.shape[:-1], self.num_outputs)
        return self._zeros


class RandomWeights:
    """A WeightSource without a checkpoint: linear layers are int8 or, with `is_empty`, compute nothing."""

    def __init__(self, *, is_empty: bool) -> None:
        self._is_empty = is_empty

    def linears(self, layers: Sequence[LinearLayer]) -> list[nn.Module]:
        """See WeightSource."""
        if self._is_empty:
            return [NoLinear(layer.shape[0]) for layer in layers]
        numerics = LinearNumerics(torch.float32, torch.device("cpu"), False)
        weights = [encode(layer.name, torch.randn(layer.shape) / 45, Precision.INT8) for layer in layers]
        return build_linears(weights, [None] * len(layers), numerics, Scratch())

    def tensor(self, name: str, shape: torch.Size) -> Tensor:  # noqa: ARG002
        """See WeightSource."""
        return torch.ones(shape)

    def buffer(self, value: Tensor) -> Tensor:
        """See WeightSource."""
        return value


class Blocks:
    """Some blocks over a cache for one work."""

    def __init__(self, architecture: Architecture, *, is_empty: bool) -> None:
        self._architecture, source = architecture, RandomWeights(is_empty=is_empty)
        self._blocks = [
            materialize(architecture.build_block(i), architecture.linear_use, source)
            for i in range(architecture.num_blocks)
        ]

    def step(self, work: Work, cache: KVCache) -> float:
        """Return the seconds that one step's blocks take."""
        layout = cache.layout(work.header())
        hidden = torch.ones(1, work.num_sequences * work.num_tokens, self._architecture.hidden_size)
        rotary = self._architecture.rotary_table(hidden.shape[1], torch.float32, "cpu")
        assert rotary is not None
        cos, sin = (table.unsqueeze(0) for table in rotary)
        step = StepContext(cache, layout, 0, (cos, sin), False)
        begin = time.perf_counter()
        for block in self._blocks:
            hidden = self._architecture.run_block(block, hidden, step)
        return time.perf_counter() - begin


@contextmanager
def timed_attention(spent: list[float]) -> Iterator[None]:
    """Append what every call of the attention takes, the writing of keys and values included."""
    original: Callable[..., Tensor] = StepContext.attend

    def attend(*arguments: Any, **options: Any) -> Tensor:
        begin = time.perf_counter()
        out = original(*arguments, **options)
        spent.append(time.perf_counter() - begin)
        return out

    with patch.object(StepContext, "attend", attend):
        yield


def measure(work: Work, real: Blocks, empty: Blocks, num_blocks: int, num_rounds: int) -> tuple[float, float, float]:
    """Return microseconds per block, at best: all, without linear layers, and attention alone."""
    num_pages = sum(len(delta.page_ids) for delta in work.header().page_deltas)
    cache = KVCache([4] * num_blocks, [64] * num_blocks, num_pages, PAGE_SIZE, torch.float32, "cpu")
    for tensor in cache.keys + cache.values:
        tensor.normal_()
    cache.apply(work.header())
    whole, rest, attention = [], [], []
    for _ in range(num_rounds):
        whole.append(real.step(work, cache))
        rest.append(empty.step(work, cache))
        spent: list[float] = []
        with timed_attention(spent):
            empty.step(work, cache)
        attention.append(sum(spent))
    best = [min(seconds) / num_blocks * 1e6 for seconds in (whole, rest, attention)]
    return best[0], best[1], best[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    console = Console(width=100)
    console.print(describe_machine())
    architecture = open_architecture(CONFIG | {"num_hidden_layers": options.blocks})
    table = Table("step", "block", "all but linears", "attention", "other", "linears' share")
    with torch.inference_mode():
        real, empty = Blocks(architecture, is_empty=False), Blocks(architecture, is_empty=True)
        for work in WORKS:
            whole, rest, attention = measure(work, real, empty, options.blocks, options.rounds)
            figures = [f"{value:.0f}" for value in (whole, rest, attention, rest - attention)]
            table.add_row(work.name, *figures, f"{1 - rest / whole:.2f}")
    console.print(table)


WORKS = (
    Work("decode, 1", 1, 96, 1),
    Work("decode, 8", 8, 96, 1),
    Work("decode, 32", 32, 96, 1),
    Work("prefill, 64", 1, 0, 64),
)

if __name__ == "__main__":
    main()
