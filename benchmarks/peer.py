"""The yardstick: transformers' own `generate`, in a process of its own, on the same prompts with the same threads.

Run as a script it is that process: it loads the model, then answers each workload with a round, both lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar

from measures import Round, Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Peer:
    """The process, from the outside."""

    def __init__(self, model: str, revision: str, precision: str, num_threads: int, max_batch: int) -> None:
        command = [sys.executable, str(Path(__file__)), model, precision, str(num_threads), str(max_batch)]
        command += ["--revision", revision]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def run(self, workload: Workload) -> Round:
        """Run one workload, in batches of at most `max_batch`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(workload)) + "\n")
        self._process.stdin.flush()
        return Round(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the transformers process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()


class Stopwatch(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token of a batch was there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(model: Any, workload: Workload, max_batch: int) -> Round:
    """Generate batch after batch. All requests arrive at the start, so later batches wait for earlier ones."""
    prompts = workload.prompts()
    first: list[float] = []
    between: list[float] = []
    begin = time.perf_counter()
    for start in range(0, len(prompts), max_batch):
        ids = torch.tensor(prompts[start : start + max_batch], device=model.device)
        stopwatch = Stopwatch()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=workload.num_output_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([stopwatch]),
            )
        assert len(stopwatch.times) == workload.num_output_tokens
        first += [stopwatch.times[0] - begin] * len(ids)
        steps = zip(stopwatch.times, stopwatch.times[1:], strict=False)
        between += [after - before for before, after in steps for _ in range(len(ids))]
    return Round(time.perf_counter() - begin, workload.num_tokens, first, between)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("precision", choices=sorted(DTYPES))
    parser.add_argument("num_threads", type=int)
    parser.add_argument("max_batch", type=int)
    parser.add_argument("--revision", default="main")
    arguments = parser.parse_args()

    disable_progress_bar()
    torch.set_num_threads(arguments.num_threads)
    dtype = DTYPES[arguments.precision]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, revision=arguments.revision, dtype=dtype).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    model.generation_config.eos_token_id = None  # every request generates all its tokens
    model.generation_config.pad_token_id = 0
    print("{}", flush=True)
    for line in sys.stdin:
        answer = generate(model, Workload(**json.loads(line)), arguments.max_batch)
        print(json.dumps(asdict(answer)), flush=True)


if __name__ == "__main__":
    main()
