"""Fetches, from a folder that only the head has, the byte ranges that hold a span's tensors, and no others.

Covers which ranges and keeping them; `worker.checkpoint_client` reads them, `worker.partial_file` stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from cluster.errors import ConfigurationError
from cluster.load_order import LoadProgress
from cluster.model_spec import CheckpointFile
from worker.checkpoint_client import CheckpointReader
from worker.free_space import RequireSpace
from worker.partial_file import PartialFile
from worker.safetensors_file import LENGTH_BYTES, header_length, parse_header
from worker.transfer import ByteCounter, run_transfers

RANGE_BYTES = 64 << 20
"""Longer ranges are fetched in parts of this size: what an interruption loses at most per transfer."""

Range = tuple[int, int]


def download_span(
    reader: CheckpointReader,
    files: Sequence[CheckpointFile],
    is_needed: Callable[[str], bool],
    folder: Path,
    on_progress: Callable[[LoadProgress], None],
    require_space: RequireSpace,
) -> dict[str, Path]:
    """Return where each file is: whole for a pickle, with holes where no needed tensor is for safetensors.

    What an earlier call fetched is kept. Raises ConfigurationError, or what the reader does.
    """
    try:
        with ExitStack() as stack:
            parts = [stack.enter_context(PartialFile(folder / file.name, file.size_bytes)) for file in files]
            ranges = {part: _needed_ranges(reader, part, is_needed) for part in parts}
            _fetch_ranges(reader, ranges, folder, on_progress, require_space)
            return {part.path.name: part.path for part in parts}
    except OSError as error:
        raise ConfigurationError(f"cannot store the checkpoint in {folder}: {error.strerror or error}") from error


def _fetch_ranges(
    reader: CheckpointReader,
    ranges: dict[PartialFile, list[Range]],
    folder: Path,
    on_progress: Callable[[LoadProgress], None],
    require_space: RequireSpace,
) -> None:
    total = sum(end - start for chosen in ranges.values() for start, end in chosen)
    missing = [(part, *bounds) for part, chosen in ranges.items() for bounds in chosen if not part.has(*bounds)]
    missing_bytes = sum(end - start for _, start, end in missing)
    require_space(folder, missing_bytes)
    counter = ByteCounter(total - missing_bytes)
    transfers = [partial(_fetch, reader, part, start, end, counter.add) for part, start, end in missing]
    run_transfers(transfers, counter, total, on_progress)


def _needed_ranges(reader: CheckpointReader, part: PartialFile, is_needed: Callable[[str], bool]) -> list[Range]:
    if part.path.suffix != ".safetensors":
        return _split(0, part.size_bytes)
    name = part.path.name
    prefix = _fetch_now(reader, part, 0, min(LENGTH_BYTES, part.size_bytes))
    data_start = LENGTH_BYTES + header_length(prefix, name, part.size_bytes)
    header = _fetch_now(reader, part, LENGTH_BYTES, data_start)
    entries = parse_header(header, name, part.size_bytes)
    needed = [entry for tensor, entry in entries.items() if is_needed(tensor)]
    return [bounds for entry in needed for bounds in _split(entry.start, entry.end)]


def _split(start: int, end: int) -> list[Range]:
    return [(begin, min(begin + RANGE_BYTES, end)) for begin in range(start, end, RANGE_BYTES)]


def _fetch_now(reader: CheckpointReader, part: PartialFile, start: int, end: int) -> bytes:
    if not part.has(start, end):
        _fetch(reader, part, start, end, lambda _: None)
    return part.read(start, end)


def _fetch(reader: CheckpointReader, part: PartialFile, start: int, end: int, on_bytes: Callable[[int], None]) -> None:
    position = start
    for data in reader.read(part.path.name, start, end):
        part.write(position, data)
        position += len(data)
        on_bytes(len(data))
    part.complete(start, end)
