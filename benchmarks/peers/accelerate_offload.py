"""transformers with Accelerate's disk offload: every block is read from the checkpoint's own files on each pass."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from peers.process import Limits, Run, main
from peers.transformers_generate import generate, prepare_model


def prepare(checkpoint: Path, folder: Path) -> None:
    """Note where the checkpoint is: it is used as it lies there."""
    (folder / "checkpoint").symlink_to(checkpoint.resolve())


def load(folder: Path, limits: Limits) -> tuple[Mapping[str, Any], Run]:
    """Embedding, norms and head in memory, all blocks on disk."""
    disable_progress_bar()
    torch.set_num_threads(limits.num_threads)
    checkpoint = str(folder / "checkpoint")
    num_blocks = AutoConfig.from_pretrained(checkpoint).num_hidden_layers
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{block}": "disk" for block in range(num_blocks)}
    offload = tempfile.mkdtemp()  # stays empty: safetensors are read where they are
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", device_map=device_map, offload_folder=offload
    ).eval()
    prepare_model(model)
    about = {"system": "Accelerate disk offload", "version": accelerate.__version__, "license": "Apache-2.0"}
    return about, lambda workload: generate(model, workload, limits.max_concurrency)


if __name__ == "__main__":
    main(__doc__, prepare, load)
