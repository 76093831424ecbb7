"""A `pytorch_model*.bin` file: a pickled dictionary of tensors, read without ever running its code.

Covers torch's zip format (memory-mapped) and the one before torch 1.6 (read whole, since it cannot be mapped).
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ConfigurationError

_ZIP_MAGIC = b"PK\x03\x04"


class PickledFile:
    """An open file. The tensors stay valid after `close`."""

    def __init__(self, path: Path, label: str) -> None:
        """Read and check. `label` names the file in messages. Raises ConfigurationError and OSError."""
        self._tensors = _load(path, label)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def size(self, name: str) -> int:
        """Return the tensor's bytes."""
        return self._tensors[name].nbytes

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def forget_pages(self) -> None:
        """Nothing: the mapping is torch's own."""

    def close(self) -> None:
        self._tensors = {}


def _load(path: Path, label: str) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    if is_zip and not zipfile.is_zipfile(path):
        raise ConfigurationError(f"{label} is truncated (its directory is missing): delete it and fetch it again")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            f"{label} is damaged or holds something other than tensors, and Spanwise never runs code from a "
            f"checkpoint: fetch it again, or convert the checkpoint to safetensors"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"{label} is truncated or damaged ({reason}): delete it and fetch it again") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{label} holds a {type(content).__name__}, not tensors by name")
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
