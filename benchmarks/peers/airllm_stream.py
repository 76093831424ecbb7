"""AirLLM on the CPU: the checkpoint split by layer, each layer read on every pass while the one before is computed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from peers.process import Limits, Run, main
from peers.transformers_generate import generate, prepare_model


def prepare(checkpoint: Path, folder: Path) -> None:
    """Let AirLLM split the checkpoint: it does so when it loads it for the first time."""
    (folder / "checkpoint").symlink_to(checkpoint.resolve())
    _open(folder)


def load(folder: Path, limits: Limits) -> tuple[Mapping[str, Any], Run]:
    """Load with AirLLM's defaults, prefetching included."""
    disable_progress_bar()
    torch.set_num_threads(limits.num_threads)
    model = _open(folder)
    prepare_model(model)
    about = {"system": "AirLLM", "version": version("airllm"), "license": "Apache-2.0"}
    return about, lambda workload: generate(model, workload, limits.max_concurrency)


def _open(folder: Path) -> Any:
    from airllm import AutoModel

    shards = folder / "layers"
    return AutoModel.from_pretrained(
        str(folder / "checkpoint"), device="cpu", layer_shards_saving_path=str(shards), max_seq_len=2048
    )


if __name__ == "__main__":
    main(__doc__, prepare, load)
