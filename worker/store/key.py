"""Where the block store lies on this machine, and what the folder of one converted checkpoint is called.

Covers names only; `worker.store.folder` is what they name. Imports nothing that takes time to start.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from cluster.model_spec import HubSource, ModelSource, Precision
from worker.store.manifest import FORMAT_VERSION

HEAD = "head"
EMBEDDING = "embedding"
_DIGEST_CHARACTERS = 12
_BLOCK = re.compile(r"block-(\d{4,})")


def default_store_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return $XDG_CACHE_HOME/spanwise/store, else ~/.cache/spanwise/store."""
    home = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "spanwise" / "store"


def store_key(source: ModelSource, precision: Precision, version: int = FORMAT_VERSION) -> str:
    """Return the folder's name: the model's, the precision, and a digest of all that decides the bytes."""
    identity = "\0".join((*_identity(source), precision.value, str(version)))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:_DIGEST_CHARACTERS]
    return f"{model_name(source).replace('/', '--')}-{precision.value}-{digest}"


def model_name(source: ModelSource) -> str:
    """Name a checkpoint: its repository, or its folder."""
    name = source.repo_id if isinstance(source, HubSource) else Path(source.path).name
    return re.sub(r"[^\w./-]", "_", name) or "model"


def revision(source: ModelSource) -> str:
    """Return the commit, or the folder's digest."""
    return source.commit if isinstance(source, HubSource) else source.digest


def block_part(number: int) -> str:
    """Name the part of a block."""
    return f"block-{number:04}"


def part_block(part: str) -> int | None:
    """Return the number of a block's part; None for any other."""
    found = _BLOCK.fullmatch(part)
    return int(found[1]) if found else None


def is_part(name: str) -> bool:
    """Tell whether a name is a part's."""
    return name in (EMBEDDING, HEAD) or part_block(name) is not None


def order_parts(parts: set[str]) -> list[str]:
    """Return parts in the order of a pass: embedding, blocks, head."""
    return sorted(parts, key=lambda part: (part == HEAD, part != EMBEDDING, part_block(part) or 0, part))


def all_parts(num_blocks: int) -> list[str]:
    """Return every part of a model, in the order of a pass."""
    return [EMBEDDING, *map(block_part, range(num_blocks)), HEAD]


def _identity(source: ModelSource) -> tuple[str, str]:
    return (source.repo_id if isinstance(source, HubSource) else "", revision(source))
