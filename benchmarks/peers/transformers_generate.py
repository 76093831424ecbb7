"""transformers' own `generate`, in batches of at most `--max-batch`, since padding-free batches are its best case."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar

from measures import Round, Workload
from peers.process import Run, answer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def prepare_model(model: Any) -> None:
    """Make every request generate all its tokens."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("precision", choices=sorted(DTYPES))
    parser.add_argument("num_threads", type=int)
    parser.add_argument("max_batch", type=int)
    parser.add_argument("--revision", default="main")
    arguments = parser.parse_args()

    def load() -> tuple[Mapping[str, Any], Run]:
        disable_progress_bar()
        torch.set_num_threads(arguments.num_threads)
        dtype = DTYPES[arguments.precision]
        model = AutoModelForCausalLM.from_pretrained(arguments.model, revision=arguments.revision, dtype=dtype).eval()
        if torch.cuda.is_available():
            model = model.to("cuda")
        prepare_model(model)
        about = {"system": "transformers", "version": transformers.__version__, "license": "Apache-2.0"}
        return about, lambda workload: generate(model, workload, arguments.max_batch)

    answer(load)


if __name__ == "__main__":
    main()
