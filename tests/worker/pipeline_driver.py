"""Stages chained in one process, driven by hand-made step headers: what coordinator and relay do, without them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.hub.folder import folder_digest
from cluster.load_order import LoadOrder, LoadProgress
from cluster.microbatch import Epoch, PageDelta, SequenceSampling, StepHeader, StepId, StepResult
from cluster.model_spec import CheckpointFile, FolderSource, Precision
from cluster.request import SamplingParams, SequenceId
from cluster.span import Span
from worker.executor import Executor, LoadedSpan
from worker.loading import TorchSpanLoader
from worker.stage import Exit, Stage

EPOCH = Epoch(1, 1)
PAGE_SIZE = 64
NUM_PAGES = 64
PROMPT = [5, 200, 31, 77, 9, 140, 66]


def make_order(folder: Path, stage: int = 0, num_stages: int = 1, **changes: Any) -> LoadOrder:
    """Return an order for one of `num_stages` equal spans of a checkpoint folder."""
    config = json.loads((folder / "config.json").read_text())
    num_blocks = config.get("num_hidden_layers") or config["n_layer"]
    indexes = list(folder.glob("*.index.json"))
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")]
    fields: dict[str, Any] = {
        "stage": stage,
        "num_stages": num_stages,
        "span": Span(stage * num_blocks // num_stages, (stage + 1) * num_blocks // num_stages),
        "config": config,
        "source": FolderSource(str(folder), folder_digest(folder)),
        "checkpoint_service": "",
        "weight_files": tuple(CheckpointFile(path.name, path.stat().st_size) for path in files),
        "weight_map": json.loads(indexes[0].read_text())["weight_map"] if indexes else {},
        "precision": Precision.FP32,
        "kv_dtype": "auto",
        "wire_dtype": "auto",
        "num_pages": NUM_PAGES,
        "page_size": PAGE_SIZE,
        "max_context": 512,
        "is_exact": False,
    }
    return LoadOrder(**(fields | changes))


def load_span(order: LoadOrder, progress: list[LoadProgress] | None = None) -> LoadedSpan:
    """Load on the CPU."""
    reports = progress if progress is not None else []
    return TorchSpanLoader(torch.device("cpu")).load(order, reports.append)


def load_pipeline(folder: Path, num_stages: int = 1, **changes: Any) -> PipelineDriver:
    """Load all stages of a checkpoint folder and chain them."""
    orders = [make_order(folder, stage, num_stages, **changes) for stage in range(num_stages)]
    return PipelineDriver([load_span(order).executor for order in orders])


@dataclass
class DrivenSequence:
    """One sequence: its tokens so far, how many of them are computed, its pages."""

    token_ids: list[int]
    prompt_length: int
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def sampled(self) -> list[int]:
        return self.token_ids[self.prompt_length :]


class PipelineDriver:
    """Greedy sequences over chained stages. Pages are handed out in a shuffled order, so that runs of slots break."""

    def __init__(self, stages: Sequence[Executor], *, num_pages: int = NUM_PAGES, page_size: int = PAGE_SIZE) -> None:
        self.stages, self.page_size = stages, page_size
        self.free_pages = list(range(num_pages))
        random.Random(0).shuffle(self.free_pages)
        self.sequences: dict[SequenceId, DrivenSequence] = {}
        self.results: list[StepResult] = []
        self._num_steps = 0

    def add(self, prompt: Sequence[int]) -> SequenceId:
        """Add a sequence; steps name it by the returned id."""
        sequence_id = SequenceId(len(self.sequences))
        self.sequences[sequence_id] = DrivenSequence(list(prompt), len(prompt))
        return sequence_id

    def step(self, slices: Mapping[SequenceId, int], *, finished: Sequence[SequenceId] = ()) -> StepResult:
        """Compute the next `slices[sequence]` tokens of each sequence; one is sampled where the last is computed."""
        header = self.header(slices, finished)
        result = self.execute(header)
        for sequence_id, token_id in zip(result.sequence_ids, result.token_ids, strict=True):
            self.sequences[sequence_id].token_ids.append(token_id)
        return result

    def execute(self, header: StepHeader) -> StepResult:
        """Send a step through the stages."""
        tensors: Mapping[str, Tensor] = {}
        for stage in self.stages:
            blocks: list[int] = []
            output = stage.execute(header, tensors, blocks.append)
            assert blocks[-stage.num_blocks :] == list(range(1, stage.num_blocks + 1))
            tensors = output.tensors
        assert output.result is not None
        self.results.append(output.result)
        return output.result

    def header(self, slices: Mapping[SequenceId, int], finished: Sequence[SequenceId] = ()) -> StepHeader:
        """Return the header of a step and count its tokens as computed."""
        self._num_steps += 1
        starts, token_ids, is_sampled, deltas, changes = [], [], [], [], []
        for sequence_id, length in slices.items():
            sequence = self.sequences[sequence_id]
            start = sequence.num_computed
            sequence.num_computed += length
            starts.append(start)
            token_ids += sequence.token_ids[start : sequence.num_computed]
            is_sampled.append(sequence.num_computed == len(sequence.token_ids))
            deltas += self._page_deltas(sequence_id, sequence)
            if start == 0:
                params = SamplingParams(temperature=0.0)
                changes.append(SequenceSampling(sequence_id, sequence.prompt_length, params))
        return StepHeader(
            epoch=EPOCH,
            step_id=StepId(self._num_steps),
            deadline_ms=60_000,
            sequence_ids=tuple(slices),
            start_positions=tuple(starts),
            lengths=tuple(slices.values()),
            token_ids=tuple(token_ids),
            logits_rows=tuple(map(int, is_sampled)),
            is_sampled=tuple(is_sampled),
            page_deltas=tuple(deltas),
            sampling_changes=tuple(changes),
            finished_sequence_ids=tuple(finished),
            last_stage=len(self.stages) - 1,
        )

    def generate(self, prompt: Sequence[int], max_tokens: int, *, chunk: int = 512) -> list[int]:
        """Return the greedy tokens of one sequence alone, its prompt computed in chunks."""
        sequence_id = self.add(prompt)
        sequence = self.sequences[sequence_id]
        while len(sequence.sampled) < max_tokens:
            self.step({sequence_id: min(chunk, len(sequence.token_ids) - sequence.num_computed)})
        return sequence.sampled

    def _page_deltas(self, sequence_id: SequenceId, sequence: DrivenSequence) -> list[PageDelta]:
        missing = -(-sequence.num_computed // self.page_size) - len(sequence.pages)
        if missing <= 0:
            return []
        pages = [self.free_pages.pop() for _ in range(missing)]
        sequence.pages += pages
        return [PageDelta(sequence_id, len(sequence.pages) - missing, tuple(pages))]


@contextmanager
def recorded_logits() -> Iterator[list[Tensor]]:
    """Collect the logits `[num_rows, vocab_size]` that the last stage computes."""
    original, recorded = Exit.logits, []

    def record(self: Exit, rows: Tensor) -> Tensor:
        logits = original(self, rows)
        recorded.append(logits.clone())
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exit, "logits", record)
        yield recorded


def outputs(stage: Stage) -> tuple[list[list[int]], list[Tensor]]:
    """Return tokens and logits of a few sequences, together and one after the other."""
    driver = PipelineDriver([stage])
    with recorded_logits() as logits:
        first, second = driver.add(PROMPT), driver.add(PROMPT[::-1] * 3)
        driver.step({first: 7, second: 20})
        for _ in range(3):
            driver.step({first: 1, second: 1})
        tokens = [driver.sequences[first].sampled, driver.sequences[second].sampled, driver.generate(PROMPT, 3)]
    return tokens, logits


def assert_same_bits(left: Stage, right: Stage) -> None:
    """Compare tokens and every logit."""
    (tokens, logits), (other_tokens, other_logits) = outputs(left), outputs(right)
    assert tokens == other_tokens
    assert all(torch.equal(a, b) for a, b in zip(logits, other_logits, strict=True))
