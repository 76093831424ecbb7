"""CTranslate2 with int8 weights and fp32 elsewhere, all requests of a workload in one batch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ctranslate2

from measures import Round, Workload
from peers.process import Limits, Run, main


def prepare(checkpoint: Path, folder: Path) -> None:
    """Convert with CTranslate2's own converter."""
    converter = ctranslate2.converters.TransformersConverter(str(checkpoint), low_cpu_mem_usage=True)
    converter.convert(str(folder), quantization="int8_float32", force=True)


def load(folder: Path, limits: Limits) -> tuple[Mapping[str, Any], Run]:
    """Load one generator with all threads."""
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type="int8_float32", inter_threads=1, intra_threads=limits.num_threads
    )
    words = json.loads((folder / "vocabulary.json").read_text())

    def run(workload: Workload) -> Round:
        length = workload.num_output_tokens
        prompts = [[words[token_id] for token_id in prompt] for prompt in workload.prompts()]
        begin = time.perf_counter()
        results = generator.generate_batch(
            prompts, max_length=length, min_length=length, sampling_topk=1, include_prompt_in_result=False
        )
        seconds = time.perf_counter() - begin
        assert all(len(result.sequences_ids[0]) == length for result in results)
        return Round(seconds, workload.num_tokens, [], [])

    return {"system": "CTranslate2, int8_float32", "version": ctranslate2.__version__, "license": "MIT"}, run


if __name__ == "__main__":
    main(__doc__, prepare, load)
