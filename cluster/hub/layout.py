"""Which files of a checkpoint are its weights and its tokenizer, by the names that transformers gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import ConfigurationError
from cluster.model_spec import CheckpointFile, ModelSource, Precision

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
OLD_SCHEMES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files that told of quantized weights before config.json did, and the scheme of each."""

CONVERTED = "model.json"
"""The file that says of a folder that it holds a converted checkpoint, as `worker.store.folder` describes."""

PART_WEIGHTS, PART_MANIFEST = ".weights", ".json"  # of a part's file and of its manifest
_VOCABULARIES = ({"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"})
_WEIGHTS = (  # the first that exists is taken: safetensors before pickles, one file before shards
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class CheckpointFiles(Protocol):
    """The files of a checkpoint, wherever they are."""

    @property
    def source(self) -> ModelSource: ...

    @property
    def label(self) -> str:
        """Name the checkpoint in a message."""
        ...

    @property
    def by_name(self) -> Mapping[str, CheckpointFile]:
        """Say what is known of each file."""
        ...

    def path(self, name: str) -> Path:
        """Return where a file is on this machine, after fetching it if need be."""
        ...


def read_json(files: CheckpointFiles, name: str) -> dict[str, Any]:
    """Return the JSON object that a file holds. Raises ConfigurationError."""
    try:
        value = json.loads(files.path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{name} of {files.label} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{name} of {files.label} holds no JSON object")
    return value


def fetch_tokenizer(files: CheckpointFiles) -> None:
    """Bring the tokenizer's files to this machine. Raises ConfigurationError when there is none."""
    present = {name for name in TOKENIZER_FILES if name in files.by_name}
    if not any(vocabulary <= present for vocabulary in _VOCABULARIES):
        raise ConfigurationError(
            f"{files.label} has a {CONFIG} but no tokenizer: add the tokenizer.json of the model it was trained from"
        )
    for name in present:
        files.path(name)


def find_weights(files: CheckpointFiles) -> tuple[tuple[CheckpointFile, ...], Mapping[str, str]]:
    """Return the weight files, and tensor → file (empty for a single file). Raises ConfigurationError."""
    for single, index in _WEIGHTS:
        if single in files.by_name:
            return (files.by_name[single],), {}
        if index in files.by_name:
            return _find_shards(files, index)
    tried = ", ".join(name for names in _WEIGHTS for name in names)
    raise ConfigurationError(f"{files.label} has no weights in a format that Spanwise reads (looked for {tried})")


def part_files(part: str) -> tuple[str, str]:
    """Return the files of a part of a converted checkpoint, in the order in which they are written."""
    return part + PART_WEIGHTS, part + PART_MANIFEST


def is_part_file(name: str) -> bool:
    """Tell whether a file holds a part of a converted checkpoint."""
    return name.endswith(PART_WEIGHTS)


def find_parts(files: CheckpointFiles) -> tuple[tuple[CheckpointFile, ...], Precision]:
    """Return the files of a converted checkpoint and its precision. Raises ConfigurationError."""
    try:
        precision = Precision(read_json(files, CONVERTED).get("precision"))
    except ValueError as error:
        raise ConfigurationError(f"{CONVERTED} of {files.label} is damaged: {error}") from error
    parts = sorted(name.removesuffix(PART_WEIGHTS) for name in files.by_name if is_part_file(name))
    found = [name for part in parts for name in part_files(part) if name in files.by_name]
    return tuple(files.by_name[name] for name in found), precision


def _find_shards(files: CheckpointFiles, index: str) -> tuple[tuple[CheckpointFile, ...], Mapping[str, str]]:
    weight_map = read_json(files, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConfigurationError(f"{index} of {files.label} has no weight_map: fetch it again")
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if name not in files.by_name]
    if missing:
        raise ConfigurationError(
            f"{files.label} lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''} "
            f"({len(missing)} of {len(shards)} shards), which {index} names: fetch the checkpoint again"
        )
    return tuple(files.by_name[name] for name in shards), weight_map
