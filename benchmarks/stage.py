"""One stage with all blocks, driven by the step headers that a coordinator would send: no cluster around it.

Covers loading and driving it in this process; run as a module (`python -m stage MODEL`) it is a process that answers
workloads as the peers' do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cluster.errors import SpanwiseError
from cluster.hub.resolve import find_token, resolve
from cluster.load_order import LoadOrder, StoreOptions
from cluster.microbatch import Epoch, PageDelta, SequenceSampling, StepHeader, StepId
from cluster.model_spec import ModelSpec, Precision
from cluster.request import SamplingParams, SequenceId
from cluster.span import Span
from measures import Round, Workload
from peers.process import Run, answer
from worker.executor import Executor, LoadedSpan, StageOutput
from worker.heap import keep_freed_memory
from worker.loading import TorchSpanLoader

PAGE_SIZE = 64
STEP_TOKENS = 512  # prompt tokens that one step computes at most, whole prompts only
DEADLINE_MS = 3_600_000


def load(
    spec: ModelSpec, precision: Precision, *, num_sequences: int, max_context: int, store: str = "", **changes: Any
) -> LoadedSpan:
    """Load all blocks into one stage on the CPU, with pages for so many sequences of `max_context` tokens.

    `changes` are further fields of the LoadOrder, like `num_streamed`.
    """
    order = LoadOrder(
        stage=0,
        num_stages=1,
        span=Span(0, spec.num_blocks),
        config=spec.config,
        source=spec.source,
        checkpoint_service="",
        weight_files=spec.weight_files,
        weight_map=spec.weight_map,
        precision=precision,
        num_pages=num_sequences * num_pages(max_context),
        page_size=PAGE_SIZE,
        max_context=max_context,
        token=find_token() or "",
        store=StoreOptions(store_folder=store),
        **({"kv_dtype": "auto", "wire_dtype": "auto", "is_exact": False} | changes),
    )
    return TorchSpanLoader(torch.device("cpu")).load(order, lambda _: None)


def num_pages(num_tokens: int) -> int:
    """Return how many pages a sequence of so many tokens takes."""
    return -(-num_tokens // PAGE_SIZE)


class Driver:
    """Makes the headers for a single stage: prompts first, then a token of every sequence at a time."""

    def __init__(self, executor: Executor, *, max_context: int, step_tokens: int = STEP_TOKENS) -> None:
        self._executor, self._step_tokens = executor, step_tokens
        self._pages_each = num_pages(max_context)
        self._num_steps = 0
        self.read_bytes = self.stall_ns = 0

    def run(self, workload: Workload) -> Round:
        """Run a workload from empty caches, greedily."""
        self.open()
        begin = time.perf_counter()
        tokens, first = [], []
        for prompts in self._split(workload.prompts()):
            tokens += self.prefill(len(tokens), prompts, SamplingParams(temperature=0.0))
            first += [time.perf_counter() - begin] * len(prompts)
        between: list[float] = []
        for number in range(workload.num_output_tokens - 1):
            started = time.perf_counter()
            tokens = self.decode(tokens, workload.num_input_tokens + number)
            between += [time.perf_counter() - started] * len(tokens)
        seconds = time.perf_counter() - begin
        return Round(
            seconds, workload.num_tokens, first, between, self._num_steps, self.read_bytes, self.stall_ns / 1e9
        )

    def open(self) -> None:
        """Forget all sequences and counts."""
        self._executor.open_epoch()
        self._num_steps = self.read_bytes = self.stall_ns = 0

    def prefill(self, first: int, prompts: Sequence[Sequence[int]], params: SamplingParams) -> tuple[int, ...]:
        """Compute whole prompts of sequences `first, first + 1, …`; return each one's next token."""
        output = self._execute(prompts, first=first, position=0, params=params)
        assert output.result is not None
        return output.result.token_ids

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Return the log probability of every token but the first, given those before it."""
        self.open()
        output = self._execute([tokens], first=0, position=0, params=SamplingParams(0.0, num_prompt_logprobs=0))
        assert output.result is not None
        found = [one.logprob for prompt in output.result.prompt_logprobs for one in prompt.tokens]
        return [logprob for logprob in found if logprob is not None]

    def decode(self, tokens: Sequence[int], position: int) -> list[int]:
        """Compute one token of every sequence, all at the same position; return the next ones."""
        output = self._execute([[token_id] for token_id in tokens], first=0, position=position)
        assert output.result is not None
        return list(output.result.token_ids)

    def _split(self, prompts: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
        size = max(1, self._step_tokens // len(prompts[0]))
        return [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def _execute(
        self, rows: Sequence[Sequence[int]], *, first: int, position: int, params: SamplingParams | None = None
    ) -> StageOutput:
        self._num_steps += 1
        ids = [SequenceId(first + index) for index in range(len(rows))]
        lengths = tuple(map(len, rows))
        is_scored = params is not None and params.num_prompt_logprobs is not None
        header = StepHeader(
            epoch=Epoch(1, 1),
            step_id=StepId(self._num_steps),
            deadline_ms=DEADLINE_MS,
            sequence_ids=tuple(ids),
            start_positions=(position,) * len(rows),
            lengths=lengths,
            token_ids=tuple(token_id for row in rows for token_id in row),
            logits_rows=lengths if is_scored else (1,) * len(rows),
            is_sampled=(True,) * len(rows),
            page_deltas=tuple(PageDelta(sequence_id, 0, self._pages(sequence_id)) for sequence_id in ids)
            if params
            else (),
            sampling_changes=tuple(map(lambda i, n: SequenceSampling(i, n, params), ids, lengths)) if params else (),
        )
        output = self._executor.execute(header, {}, lambda _: None)
        self.read_bytes += output.traffic.read_bytes
        self.stall_ns += output.traffic.stall_ns
        return output

    def _pages(self, sequence_id: int) -> tuple[int, ...]:
        return tuple(range(sequence_id * self._pages_each, (sequence_id + 1) * self._pages_each))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides how a stage is loaded."""
    parser.add_argument("model", help="alias, hub id or folder")
    parser.add_argument(
        "--precision", choices=[precision.value for precision in Precision], default="int8", help="of weights"
    )
    parser.add_argument("--threads", type=int, default=2, help="that compute")
    parser.add_argument("--max-concurrency", type=int, default=32, help="sequences that have room in the cache")
    parser.add_argument("--max-context", type=int, default=512, help="tokens of a sequence at most")
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS, help="prompt tokens of a step at most")
    parser.add_argument("--kv-dtype", default="auto", help="of keys and values")
    parser.add_argument("--store-dir", help="where converted weights are")
    parser.add_argument("--streamed", type=int, default=0, help="how many blocks, and after them the head, to stream")
    parser.add_argument("--ring-bytes", type=int, default=0, help="memory for what is read ahead")


def open_stage(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Run]:
    """Load what the arguments say; return what to tell of it, and how to run workloads on it."""
    keep_freed_memory()  # as a worker does
    torch.set_num_threads(arguments.threads)
    spec = resolve(arguments.model, token=find_token())
    loaded = load(
        spec,
        Precision(arguments.precision),
        num_sequences=arguments.max_concurrency,
        max_context=arguments.max_context,
        store=arguments.store_dir or "",
        kv_dtype=arguments.kv_dtype,
        num_streamed=arguments.streamed,
        ring_bytes=arguments.ring_bytes,
    )
    driver = Driver(loaded.executor, max_context=arguments.max_context, step_tokens=arguments.step_tokens)
    return describe(loaded, arguments.precision), driver.run


def describe(loaded: LoadedSpan, precision: str) -> dict[str, Any]:
    """Return what readers of a figure want to know of the stage."""
    return {
        "system": f"Spanwise, {precision}, one stage",
        "weight_bytes": loaded.weight_bytes,
        "kv_bytes": loaded.kv_bytes,
        "kv_dtype": loaded.kv_dtype,
        "compute_dtype": loaded.compute_dtype,
        "streamed_bytes": loaded.streamed_bytes,
        "disk_bytes_per_second": loaded.disk_bytes_per_second,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    answer(lambda: open_stage(arguments), (SpanwiseError,))


if __name__ == "__main__":
    main()
