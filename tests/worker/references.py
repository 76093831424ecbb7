"""What transformers itself computes for a checkpoint: the yardstick of the parity tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation and the logits `[num_tokens, vocab_size]` that it was taken from."""

    token_ids: list[int]
    logits: Tensor


def load_reference(folder: Path, *, is_rounded_to_bf16: bool = False) -> Any:
    """Load a checkpoint for fp32 computation, its weights rounded to bf16 first if asked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if is_rounded_to_bf16:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    return model


def generate(model: Any, prompt: Sequence[int], max_tokens: int) -> Greedy:
    """Continue a prompt with transformers' `generate`, which does not stop at an end-of-sequence token."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Greedy(out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits))
