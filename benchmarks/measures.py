"""What a benchmark counts and how it is summed up. Covers values and arithmetic; nothing here runs anything."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Workload:
    """`concurrency` requests that arrive at once, each with its own prompt of random token ids."""

    concurrency: int
    num_input_tokens: int
    num_output_tokens: int
    vocab_size: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        """Return one prompt per request; the same for every system that is measured."""
        draw = random.Random(self.seed)
        first = min(300, self.vocab_size // 2)  # below are special tokens and bytes
        size = range(self.num_input_tokens)
        return [[draw.randrange(first, self.vocab_size) for _ in size] for _ in range(self.concurrency)]

    @property
    def num_tokens(self) -> int:
        """Output tokens of all requests."""
        return self.concurrency * self.num_output_tokens


@dataclass(frozen=True, slots=True)
class Round:
    """One workload, once: wall time from the first request to the last token, and the delays that users saw."""

    wall_seconds: float
    num_output_tokens: int
    first_token_seconds: list[float]  # one per request, from its arrival
    inter_token_seconds: list[float]  # one per further token
    num_passes: int = 0  # visits to all blocks; this and what follows only where the system tells
    read_bytes: int = 0  # of weights, from disk
    stall_seconds: float = 0.0  # that the computation waited for them

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second, prompts included in the time."""
        return self.num_output_tokens / self.wall_seconds


@dataclass(frozen=True, slots=True)
class StageWindow:
    """One stage during a round. `hop_seconds` and `bytes_per_step` concern the hop that leads to it."""

    stage: int
    num_steps: int
    busy_share: float
    bubble_share: float
    bytes_per_step: float
    hop_seconds: float | None


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed; 0 when there are none."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return rates (median and best over the rounds) and delays (over all requests of all rounds)."""
    rates = [one.tokens_per_second for one in rounds]
    first = [seconds for one in rounds for seconds in one.first_token_seconds]
    between = [seconds for one in rounds for seconds in one.inter_token_seconds]
    return {
        "tokens_per_second": {"median": median(rates), "best": max(rates), "rounds": rates},
        "first_token_seconds": {"p50": percentile(first, 0.5), "p99": percentile(first, 0.99)},
        "inter_token_seconds": {f"p{p}": percentile(between, p / 100) for p in (50, 95, 99)},
    }


def summarize_stages(windows: Sequence[Sequence[StageWindow]]) -> list[dict[str, Any]]:
    """Return each stage's medians over the rounds."""
    return [_summarize_stage(of_stage) for of_stage in zip(*windows, strict=True)]


def _summarize_stage(windows: Sequence[StageWindow]) -> dict[str, Any]:
    hops = [window.hop_seconds for window in windows if window.hop_seconds is not None]
    return asdict(windows[0]) | {
        "num_steps": median(window.num_steps for window in windows),
        "busy_share": median(window.busy_share for window in windows),
        "bubble_share": median(window.bubble_share for window in windows),
        "bytes_per_step": median(window.bytes_per_step for window in windows),
        "hop_seconds": median(hops) if hops else None,
    }


def describe_machine() -> dict[str, Any]:
    """Return what a reader must know of the machine to compare figures; call it before measuring, for the load."""
    import torch  # only here: other systems' processes, which count with this module, do not have it

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
