"""From the name that a user writes to a ModelSpec: everything about a model but its weights, checked before any load.

Covers aliases, folders and hub ids. Weights are the workers' business (`worker.weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from cluster.catalogue import find_entry, shipped_folder, unknown_model
from cluster.errors import ConfigurationError, NotFoundError
from cluster.hub.download import HubAccess, cached_file
from cluster.hub.folder import open_folder
from cluster.hub.layout import (
    CONFIG,
    CONVERTED,
    GENERATION_CONFIG,
    OLD_SCHEMES,
    CheckpointFiles,
    fetch_tokenizer,
    find_parts,
    find_weights,
    is_part_file,
    read_json,
)
from cluster.hub.model_config import (
    HIDDEN_SIZE,
    NUM_BLOCKS,
    VOCAB_SIZE,
    check_supported,
    eos_token_ids,
    max_context,
    positive_integer,
    quantized_precision,
)
from cluster.hub.repository import is_repo_id, open_repository
from cluster.model_spec import CheckpointFile, FolderSource, ModelSpec, Precision

DEFAULT_REVISION = "main"


def find_token() -> str | None:
    """Return the hub token of this machine's user: HF_TOKEN, else what `hf auth login` stored."""
    token: str | None = get_token()
    return token


def resolve(name: str, revision: str = DEFAULT_REVISION, token: str | None = None) -> ModelSpec:
    """Return what is known about a model: an alias of the catalogue, a folder, or a hub id.

    Raises NotFoundError, PermissionDeniedError and AuthenticationError as the hub says; ConfigurationError for a
    checkpoint that cannot be served, naming what is wrong with it.
    """
    return resolve_with(name, revision, HubAccess(token=token))


def resolve_with(name: str, revision: str, access: HubAccess) -> ModelSpec:
    """Do what `resolve` does, with a given hub and cache."""
    return _describe(name, _open(name, revision, access))


def tokenizer_folder(spec: ModelSpec, access: HubAccess | None = None) -> Path:
    """Return the folder that holds the tokenizer's files (and config.json) of a resolved model; no network."""
    if isinstance(spec.source, FolderSource):
        return Path(spec.source.path)
    config = cached_file(spec.source.repo_id, CONFIG, spec.source.commit, access or HubAccess())
    if config is None:
        raise NotFoundError(f"the tokenizer of {spec.name} is not in this machine's hub cache: resolve it here first")
    return config.parent


def _open(name: str, revision: str, access: HubAccess) -> CheckpointFiles:
    entry = find_entry(name)
    if entry is not None and entry.repo_id:
        return open_repository(entry.repo_id, revision, access)
    folder = shipped_folder(entry.alias) if entry is not None else Path(name).expanduser()
    if folder.is_dir():
        if revision != DEFAULT_REVISION:
            raise ConfigurationError(f"{name} is a folder, which has no revision {revision!r}: omit --revision")
        return open_folder(folder)
    if name.startswith((".", "/", "~")):
        raise NotFoundError(f"there is no folder {folder.absolute()}", reason="UNKNOWN_MODEL")
    if is_repo_id(name):
        return open_repository(name, revision, access)
    raise unknown_model(name)


def _describe(name: str, files: CheckpointFiles) -> ModelSpec:
    if CONFIG not in files.by_name:
        raise ConfigurationError(f"{files.label} has no {CONFIG}: it is not a checkpoint in transformers' format")
    config = _read_config(files)
    architecture = check_supported(config, files.label)
    generation_config = read_json(files, GENERATION_CONFIG) if GENERATION_CONFIG in files.by_name else {}
    weight_files, weight_map, stored_precision = _find_weights(files)
    fetch_tokenizer(files)
    return ModelSpec(
        name=name,
        source=files.source,
        architecture=architecture,
        config=config,
        num_blocks=positive_integer(config, NUM_BLOCKS, files.label),
        hidden_size=positive_integer(config, HIDDEN_SIZE, files.label),
        vocab_size=positive_integer(config, VOCAB_SIZE, files.label),
        max_context=max_context(config, files.label),
        eos_token_ids=eos_token_ids(config, generation_config),
        weight_files=weight_files,
        weight_map=weight_map,
        generation_config=generation_config,
        stored_precision=stored_precision or quantized_precision(config, files.label),
    )


def _read_config(files: CheckpointFiles) -> Mapping[str, Any]:
    """Return config.json, with the scheme of weights that were quantized before it told of that."""
    methods = [method for name, method in OLD_SCHEMES.items() if name in files.by_name]
    old_scheme = {"quantization_config": {"quant_method": methods[0]}} if methods else {}
    return old_scheme | read_json(files, CONFIG)


def _find_weights(
    files: CheckpointFiles,
) -> tuple[tuple[CheckpointFile, ...], Mapping[str, str], Precision | None]:
    """Return weight files, tensor → file, and the precision of a converted checkpoint."""
    if CONVERTED in files.by_name and any(map(is_part_file, files.by_name)):
        parts, precision = find_parts(files)
        return parts, {}, precision
    return *find_weights(files), None
