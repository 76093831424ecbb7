"""How probable transformers finds a text, with weights as they are or quantized by bitsandbytes.

Prints one line of JSON: the sum of negative log probabilities, and of how many tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from peers.process import own_output

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SCHEMES: dict[str, tuple[torch.dtype, dict[str, Any] | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8": (torch.float32, {"load_in_8bit": True}),
    "nf4": (torch.float32, {**NF4, "bnb_4bit_compute_dtype": torch.float32}),
    "nf4-bf16": (torch.bfloat16, {**NF4, "bnb_4bit_compute_dtype": torch.bfloat16}),
    "nf4-head": (torch.float32, {**NF4, "bnb_4bit_compute_dtype": torch.float32}),
}
"""What each computes in and how bitsandbytes stores weights: "nf4-head" does so with the head, too."""


def load(model: str, scheme: str) -> Any:
    """Load on the CPU."""
    dtype, options = SCHEMES[scheme]
    quantization = {"quantization_config": BitsAndBytesConfig(**options)} if options else {}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map="cpu", **quantization).eval()
    if scheme == "nf4-head":
        loaded.lm_head = quantize(loaded.lm_head)
    return loaded


def quantize(head: nn.Linear) -> nn.Module:
    """Return the head in NF4, cut loose from the embedding."""
    built = Linear4bit(head.in_features, head.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = head.weight.detach().float().clone()
    built.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
    return built.to("cpu")


@torch.inference_mode()
def score(model: Any, window: list[int]) -> float:
    """Return the sum of the negative log probabilities of all tokens but the first."""
    ids = torch.tensor([window])
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    return float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("scheme", choices=sorted(SCHEMES))
    parser.add_argument("windows", type=Path, help="a file with lists of token ids in JSON")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with own_output() as output:
        disable_progress_bar()
        torch.set_num_threads(arguments.threads)
        windows = json.loads(arguments.windows.read_text())
        model = load(arguments.model, arguments.scheme)
        total = sum(score(model, window) for window in windows)
        versions = {"transformers": transformers.__version__, "bitsandbytes": bitsandbytes.__version__}
        answer = {"nats": total, "num_tokens": sum(len(window) - 1 for window in windows), "versions": versions}
        print(json.dumps(answer), file=output)


if __name__ == "__main__":
    main()
