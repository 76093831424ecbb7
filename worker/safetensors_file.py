"""A safetensors file, memory-mapped: tensors are views of the file's pages.

Format: https://huggingface.co/docs/safetensors/index#format. Covers reading; checks that the header agrees with the
file's length before any tensor is touched, so that a truncated download is told from a good one. Not fetching.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ConfigurationError
from worker.store.disk import forget_pages

LENGTH_BYTES = 8
"""The file begins with the header's length: an unsigned little-endian integer of this many bytes."""

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python 3.11 has no name for it
_MAP_FLAGS = mmap.MAP_PRIVATE | _MAP_NORESERVE
# Private and writable: torch wants writable memory, and a stray write must never reach the file. Linux would set memory
# aside for such a mapping, and refuse one of a file larger than memory, if it were not told otherwise.
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor's bytes are: `[start, end)` counted from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def header_length(prefix: bytes, file_name: str, file_bytes: int) -> int:
    """Return how many bytes of JSON follow the first LENGTH_BYTES. Raises ConfigurationError when that cannot be."""
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if len(prefix) < LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise ConfigurationError(
            f"{file_name} is truncated or not a safetensors file ({file_bytes:,} bytes, and its header claims "
            f"{length:,}): delete it and fetch it again"
        )
    return length


def parse_header(header: bytes, file_name: str, file_bytes: int) -> dict[str, TensorEntry]:
    """Return the file's tensors by name. Raises ConfigurationError when header and file length disagree."""
    data_start = LENGTH_BYTES + len(header)
    try:
        fields: dict[str, Any] = json.loads(header)
        fields.pop("__metadata__", None)
        entries = {name: _parse_entry(field, data_start) for name, field in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{file_name} has a damaged header ({error}): delete it and fetch it again") from error
    for name, entry in entries.items():
        if entry.end > file_bytes:
            raise ConfigurationError(
                f"{file_name} is truncated: it has {file_bytes:,} bytes, but tensor {name} ends at byte "
                f"{entry.end:,}: delete it and fetch it again"
            )
    return entries


def _parse_entry(field: Mapping[str, Any], data_start: int) -> TensorEntry:
    begin, end = field["data_offsets"]
    shape = tuple(int(size) for size in field["shape"])
    if field["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {field['dtype']}")
    dtype = _DTYPES[field["dtype"]]
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} cannot occupy bytes {begin} to {end}")
    return TensorEntry(dtype, shape, data_start + begin, data_start + end)


class SafetensorsFile:
    """An open file. The tensors stay valid after `close`: each of them holds the mapping it is a view of."""

    def __init__(self, path: Path, label: str) -> None:
        """Open and check. `label` names the file in messages. Raises ConfigurationError and OSError."""
        self._path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(LENGTH_BYTES), label, size)
            self._entries = parse_header(file.read(length), label, size)
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, flags=_MAP_FLAGS, prot=protection)

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def size(self, name: str) -> int:
        """Return the tensor's bytes in the file."""
        entry = self._entries[name]
        return entry.end - entry.start

    def tensor(self, name: str) -> torch.Tensor:
        """Return a view of the file, or a copy where its bytes are not aligned for their type."""
        if self._map is None:
            raise ValueError("the file is closed")
        entry = self._entries[name]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        size = entry.end - entry.start
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=entry.start)
        if entry.start % entry.dtype.itemsize:
            flat = flat.clone()
        return flat.view(entry.dtype).view(entry.shape)

    def forget_pages(self) -> None:
        """Let go of the memory that reading took, the page cache's too, which counts as that of a control group.

        Tensors stay valid: what is read again comes from the file again.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            with suppress(OSError), self._path.open("rb") as file:  # it may have been discarded meanwhile
                forget_pages(file.fileno())

    def close(self) -> None:
        self.forget_pages()
        self._map = None
