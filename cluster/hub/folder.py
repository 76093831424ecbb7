"""A checkpoint folder on this machine, and the digest that tells whether another machine has the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.errors import ConfigurationError
from cluster.hub.layout import PART_WEIGHTS
from cluster.model_spec import CheckpointFile, FolderSource

_SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"})
_CONVERTED_SUFFIXES = frozenset({PART_WEIGHTS})  # not digested: their manifests hold checksums of every tensor
_WHOLE_BYTES = 1 << 20  # files up to this size are digested whole
_NUM_SAMPLES = 32
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """The files of a checkpoint folder, by name."""

    source: FolderSource
    label: str  # for messages
    by_name: Mapping[str, CheckpointFile]

    def path(self, name: str) -> Path:
        """Return where a file is."""
        return Path(self.source.path, name)


def open_folder(path: Path) -> LocalFolder:
    """List a folder. Raises ConfigurationError when it cannot be read."""
    folder = path.resolve()
    try:
        sizes = _list(folder)
        source = FolderSource(str(folder), _digest(folder, sizes))
        sizes |= _list(folder, _CONVERTED_SUFFIXES)
        files = {name: CheckpointFile(name, size_bytes) for name, size_bytes in sizes.items()}
        return LocalFolder(source, str(folder), files)
    except OSError as error:
        raise ConfigurationError(f"cannot read model folder {folder}: {error.strerror or error}") from error


def folder_digest(folder: Path) -> str:
    """Return a digest of the checkpoint's files: names, sizes, small files whole, samples spread over large ones.

    Fast whatever the size. A trained or merged model differs nearly everywhere, so samples tell it from its origin;
    an edit of a few bytes within gigabytes can go unseen. Raises OSError.
    """
    return _digest(folder, _list(folder))


def _list(folder: Path, suffixes: Collection[str] = _SUFFIXES) -> dict[str, int]:
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    return {path.name: path.stat().st_size for path in files}


def _digest(folder: Path, sizes: Mapping[str, int]) -> str:
    digest = hashlib.sha256()
    for name, size in sizes.items():
        digest.update(f"{name}\0{size}\0".encode())
        with (folder / name).open("rb") as file:
            for offset, length in _samples(size):
                digest.update(_read(file, offset, length))
    return digest.hexdigest()


def _samples(size: int) -> list[tuple[int, int]]:
    if size <= _WHOLE_BYTES:
        return [(0, size)]
    step = (size - _SAMPLE_BYTES) / (_NUM_SAMPLES - 1)
    return [(int(index * step), _SAMPLE_BYTES) for index in range(_NUM_SAMPLES)]


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
