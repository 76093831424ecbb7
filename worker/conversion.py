"""Converts a model, or some of its blocks, without serving it: `cluster convert`.

Covers where the result goes and what a folder that is served by itself needs besides parts; `worker.store.fill` makes
the parts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import ConfigurationError
from cluster.hub.layout import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES, is_part_file
from cluster.hub.resolve import tokenizer_folder
from cluster.load_order import LoadOrder, LoadProgress, StoreOptions
from cluster.model_spec import ModelSpec, Precision
from cluster.span import Span
from worker.architectures import open_architecture
from worker.architectures.base import Part
from worker.store.fill import StoreFiller
from worker.store.folder import BlockStore, StoreDescription, describe_source
from worker.store.key import default_store_folder, store_key
from worker.weights import CheckpointSource


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to convert, and where to. `output` is a folder of its own; without it parts go to the block store."""

    spec: ModelSpec
    precision: Precision
    blocks: Span
    options: StoreOptions
    output: Path | None = None
    token: str = ""


def convert(asked: Conversion, num_at_once: int, on_progress: Callable[[LoadProgress], None]) -> BlockStore:
    """Make the parts that are missing and return where they are. The embedding comes with the first block, the head
    with the last one. Raises ConfigurationError and what downloading does; what was made stays for the next call."""
    _check(asked)
    architecture = open_architecture(asked.spec.config)
    if asked.blocks.end > architecture.num_blocks:
        raise ConfigurationError(
            f"{asked.spec.name} has blocks 0 to {architecture.num_blocks - 1}: there is no span {asked.blocks}"
        )
    order, store = conversion_order(asked), _store(asked)
    is_last = asked.blocks.end == architecture.num_blocks
    parts = architecture.parts(asked.blocks, is_first=asked.blocks.start == 0, is_last=is_last)
    filler = StoreFiller(order, architecture, store, lambda: CheckpointSource(order), on_progress)
    with closing(store.hold_folder()):
        filler.fill(parts, num_at_once)
        store.describe(_description(asked))
        _require_parts(store, parts)
        if asked.output is not None:
            _copy_rest(asked.spec, asked.output)
            store.remove_locks()
    return store


def _description(asked: Conversion) -> StoreDescription:
    return describe_source(asked.spec.source, asked.precision, asked.spec.num_blocks)


def _require_parts(store: BlockStore, parts: Sequence[Part]) -> None:
    missing = [part.name for part in parts if not store.has(part.name)]
    if missing:
        raise ConfigurationError(
            f"{', '.join(missing)} of {store.folder} vanished while the rest was converted: convert again"
        )


def _check(asked: Conversion) -> None:
    spec, stored = asked.spec, asked.spec.stored_precision
    if any(is_part_file(file.name) for file in spec.weight_files):
        assert stored is not None
        raise ConfigurationError(
            f"{spec.name} is converted already, to {stored.value}: serve it as it is, or convert the checkpoint that "
            "it was made from"
        )
    if stored not in (None, asked.precision):
        assert stored is not None
        raise ConfigurationError(
            f"{spec.name} comes in {stored.value}: convert it with --precision {stored.value}, or convert the original "
            "checkpoint"
        )


def _store(asked: Conversion) -> BlockStore:
    spec, precision = asked.spec, asked.precision
    if asked.output is None:
        root = Path(asked.options.store_folder or default_store_folder())
        return BlockStore(root, store_key(spec.source, precision))
    output = asked.output.absolute()
    store = BlockStore(output.parent, output.name)
    described, found = _description(asked), store.description()
    if found is not None and found != described and replace(found, version=described.version) == described:
        raise ConfigurationError(
            f"{output} holds {spec.name} in {precision.value} as another version of Spanwise wrote it: choose a new "
            "folder with --output, or empty that one"
        )
    is_empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_empty and found != described:
        raise ConfigurationError(
            f"{output} holds something else than {spec.name} in {precision.value}: choose a new folder with --output, "
            "or empty that one"
        )
    return store


def conversion_order(asked: Conversion) -> LoadOrder:
    """Return what converting needs of an order; the rest of it is about computing."""
    spec = asked.spec
    return LoadOrder(
        stage=0,
        num_stages=1,
        span=asked.blocks,
        config=spec.config,
        source=spec.source,
        checkpoint_service="",
        weight_files=spec.weight_files,
        weight_map=spec.weight_map,
        precision=asked.precision,
        kv_dtype="auto",
        wire_dtype="auto",
        num_pages=0,
        page_size=0,
        max_context=0,
        is_exact=False,
        token=asked.token,
        store=replace(asked.options, quota_bytes=0) if asked.output else asked.options,
    )


def _copy_rest(spec: ModelSpec, output: Path) -> None:
    """Copy config and tokenizer. Raises ConfigurationError."""
    folder = tokenizer_folder(spec)
    try:
        for name in (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, output / name)
    except OSError as error:
        raise ConfigurationError(f"cannot write to {output}: {error.strerror or error}") from error
