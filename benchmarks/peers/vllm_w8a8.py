"""vLLM's CPU build with W8A8 weights in compressed-tensors' form: int8 per output row, inputs int8 per token.

The head stays in 16 bits, as llm-compressor leaves it by default. One process, prefix cache off.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from measures import Round, Workload
from peers.process import Limits, Run, main

SCHEME = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**SCHEME, "strategy": "channel", "dynamic": False},
            "input_activations": {**SCHEME, "strategy": "token", "dynamic": True},
        }
    },
}


def prepare(checkpoint: Path, folder: Path) -> None:
    """Quantize every linear layer but the head."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder)
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    weight_map = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors: dict[str, torch.Tensor] = {}
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensors |= quantize(name, opened.get_tensor(name))
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def quantize(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the checkpoint holds in place of one tensor."""
    if not name.endswith("_proj.weight"):
        return {name: tensor}
    scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
    codes = (tensor.float() / scale).round().to(torch.int8)
    return {name: codes, f"{name}_scale": scale}


def load(folder: Path, limits: Limits) -> tuple[Mapping[str, Any], Run]:
    """Load with vLLM's own defaults for everything but sizes."""
    import vllm

    torch.set_num_threads(limits.num_threads)
    engine = vllm.LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=limits.max_context,
        max_num_seqs=limits.max_concurrency,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def run(workload: Workload) -> Round:
        length = workload.num_output_tokens
        params = vllm.SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts()]
        begin = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == length for output in outputs)
        return Round(seconds, workload.num_tokens, [], [])

    return {"system": "vLLM CPU, W8A8", "version": vllm.__version__, "license": "Apache-2.0"}, run


if __name__ == "__main__":
    main(__doc__, prepare, load)
