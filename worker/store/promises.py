"""What processes are about to write below a folder, told to each other, so that they do not fill it together.

    ROOT/.*.promise   held (flock) by what announced it, until that is written

A promise without its lock is of a process that died, and counts no more. Where no such file can be written nothing is
promised. Covers these files; `worker.store.room` counts them.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from worker.store.disk import PARTIAL

SUFFIX = ".promise"


@dataclass(frozen=True, slots=True)
class Promise:
    """Bytes of files that are about to be written, by path: absolute, or below the folder."""

    parts: Mapping[str, int]
    downloads: Mapping[str, int]


@contextmanager
def announced(root: Path, promise: Promise) -> Iterator[None]:
    """Let others count a promise within the block."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be written to tells so itself
            _announce(root, promise, stack)
        yield


def read_promises(root: Path) -> list[Promise]:
    """Return what is announced, by this process too."""
    found = [_read(path) for path in root.glob("*" + SUFFIX)]
    return [promise for promise in found if promise is not None]


def _announce(root: Path, promise: Promise, stack: ExitStack) -> None:
    """Write and lock a file before it gets its name, so that others see it whole and held."""
    root.mkdir(parents=True, exist_ok=True)
    file, name = tempfile.mkstemp(SUFFIX + PARTIAL, ".", root)
    stack.callback(os.close, file)
    path = Path(name)
    named = path.with_suffix("")
    stack.callback(path.unlink, missing_ok=True)
    stack.callback(named.unlink, missing_ok=True)
    os.fchmod(file, 0o644)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(file, json.dumps(asdict(promise)).encode())
    path.rename(named)


def _read(path: Path) -> Promise | None:
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Promise(**json.load(file))
            path.unlink(missing_ok=True)
    except (OSError, ValueError, TypeError):
        pass  # not ours to read or to remove
    return None
