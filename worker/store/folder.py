"""One converted checkpoint's folder: which parts are there, who may write them, what the folder says of itself.

    ROOT/KEY/model.json           what was converted, see StoreDescription
    ROOT/KEY/block-0007.weights   the part's bytes
    ROOT/KEY/block-0007.json      its manifest, written after them: a part without one is not there
    ROOT/KEY/block-0007.lock      held by the process that converts the part; always empty
    ROOT/KEY/*.part               being written, or left by a process that was killed

A lock is the system's (flock), so it ends with its process however that ends. A file system without such locks is
refused. Who converts or loads holds the folder besides, together with others, and who prunes holds it alone; machines
that share a file system may not see each other's holds, but do see the locks of parts. Covers names, locks and
manifests; bytes are `worker.store.writer`'s and `worker.store.reader`'s.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cluster.errors import ConfigurationError, StorageError
from cluster.model_spec import ModelSource, Precision
from worker.store.disk import PARTIAL, Disk, SystemDisk, disk_errors, partial, write_partial
from worker.store.key import is_part, model_name, order_parts, revision, store_key
from worker.store.manifest import FORMAT_VERSION, PartManifest, from_json

DESCRIPTION = "model.json"
WEIGHTS, MANIFEST, LOCK = ".weights", ".json", ".lock"
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class StoreDescription:
    """What a folder of the block store was converted from. `num_blocks` tells which parts there are in all."""

    model: str
    revision: str
    precision: str
    num_blocks: int
    version: int = FORMAT_VERSION


class FolderHold:
    """A folder that is open and locked, until it is closed or nobody has this any more."""

    _file = -1

    def __init__(self, folder: Path, *, is_alone: bool) -> None:
        """Wait until nobody has it alone; or, if `is_alone`, raise BlockingIOError while anybody else has it."""
        self._file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if is_alone:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            hold_shared(self._file)

    def is_of(self, folder: Path) -> bool:
        """Tell whether the folder is still where it was."""
        return folder.exists() and os.path.samestat(os.fstat(self._file), folder.stat())

    def close(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    __del__ = close


class BlockStore:
    """The parts of one checkpoint in one precision. The folder need not exist before something is written."""

    def __init__(self, root: Path, key: str, disk: Disk | None = None) -> None:
        self.root, self.key = root, key
        self.folder = root / key
        self.disk: Disk = disk or SystemDisk()

    def path(self, part: str) -> Path:
        """Return where the bytes of a part are, or will be."""
        return self.folder / (part + WEIGHTS)

    def manifest_path(self, part: str) -> Path:
        """Return where the manifest of a part is, or will be."""
        return self.folder / (part + MANIFEST)

    def has(self, part: str) -> bool:
        """Tell whether a part is there in its full size. Its bytes are checked when they are read."""
        try:
            return self.path(part).stat().st_size == self.manifest(part).file_bytes
        except (OSError, StorageError, ConfigurationError):
            return False

    def parts(self) -> list[str]:
        """Return the parts that were written, whole or damaged since, in the order of a pass."""
        return order_parts({path.stem for path in self.folder.glob("*" + MANIFEST) if is_part(path.stem)})

    def manifest(self, part: str) -> PartManifest:
        """Read a manifest. Raises StorageError when it is missing or damaged, ConfigurationError of another version."""
        path = self.manifest_path(part)
        try:
            found = from_json(path.read_bytes(), str(path))
        except OSError as error:
            raise StorageError(f"the manifest of {part}, {path}, cannot be read: {error.strerror}") from error
        if found.part != part:
            raise StorageError(f"{path} is the manifest of {found.part}, not of {part}: its file was renamed or copied")
        return found

    def remove(self, part: str) -> None:
        """Remove a part, its manifest first, so that it counts as missing. The caller holds its lock."""
        with disk_errors(part, self.folder):
            self.manifest_path(part).unlink(missing_ok=True)
            self.remove_leftovers(part)

    def leftovers(self, part: str) -> list[Path]:
        """Return the files of an unfinished writing of `part`. They are dead if the caller holds the part's lock."""
        orphans = [] if self.manifest_path(part).exists() else [self.path(part)]
        return [path for path in (*self.folder.glob(f"{part}.*{PARTIAL}"), *orphans) if path.exists()]

    def remove_leftovers(self, part: str) -> None:
        """Remove them. The caller holds the part's lock. Raises OSError."""
        for path in self.leftovers(part):
            path.unlink(missing_ok=True)

    @contextmanager
    def lock(
        self,
        part: str,
        on_wait: Callable[[], None] = lambda: None,
        pause: Callable[[float], None] = time.sleep,
    ) -> Iterator[None]:
        """Hold the right to write or remove a part; ask `has` again once it is held.

        While another process holds it `on_wait` is called several times a second, and may raise to give up.
        """
        while (file := self.try_lock(part)) is None:
            on_wait()
            pause(_POLL_SECONDS)
        try:
            yield
        finally:
            os.close(file)

    def try_lock(self, part: str) -> int | None:
        """Return a descriptor that holds the part's lock until it is closed; None while another one does."""
        path = self.folder / (part + LOCK)
        with _lock_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            return _lock_file(path)

    def hold_folder(self) -> FolderHold:
        """Keep `cluster store prune` from the folder, which is made where it is missing, until the hold is closed."""
        with _lock_errors(self.folder):
            while True:
                self.folder.mkdir(parents=True, exist_ok=True)
                held = FolderHold(self.folder, is_alone=False)
                if held.is_of(self.folder):
                    return held

    def hold_folder_alone(self) -> FolderHold | None:
        """Keep everybody else from holding the folder; None while another one holds it."""
        with _lock_errors(self.folder):
            try:
                return FolderHold(self.folder, is_alone=True)
            except BlockingIOError:
                return None

    def remove_locks(self) -> None:
        """Remove the files of locks that nobody holds, from a folder that is used where it is from now on."""
        for path in self.folder.glob("*" + LOCK):
            lock = self.try_lock(path.stem)
            if lock is not None:
                path.unlink()  # still held: whoever waits for it makes a new one
                os.close(lock)

    def describe(self, description: StoreDescription) -> None:
        """Write what the folder was converted from, unless it says so already. Raises ConfigurationError."""
        path = self.folder / DESCRIPTION
        text = (json.dumps(asdict(description), indent=1) + "\n").encode()
        with disk_errors(DESCRIPTION, self.folder):
            if path.exists() and path.read_bytes() == text:
                return
            with self.lock(path.stem):
                self._replace_description(path, text)

    def description(self) -> StoreDescription | None:
        """Return what `describe` wrote; None when nothing did, or its file is damaged."""
        return read_description(self.folder)

    def hold(self, file: int) -> None:
        """See hold_shared."""
        hold_shared(file)

    def note_use(self) -> None:
        """Remember that the folder was used now, where it may be written."""
        try:
            os.utime(self.folder / DESCRIPTION)
        except OSError:
            return

    def _replace_description(self, path: Path, text: bytes) -> None:
        try:
            write_partial(self.disk, path, text)
            self.disk.replace(partial(path), path)
        finally:
            self.remove_leftovers(path.stem)


def open_store(root: Path, source: ModelSource, precision: Precision) -> BlockStore:
    """Return the folder of a checkpoint in a precision, used now.

    Raises ConfigurationError when it is only there as another version wrote it: nothing is converted again unasked
    (`cluster convert` makes a BlockStore of its own).
    """
    store = BlockStore(root, store_key(source, precision))
    if not store.parts():
        _refuse_other_version(root, source, precision)
    store.note_use()
    return store


def read_description(folder: Path) -> StoreDescription | None:
    """Return what a folder was converted from; None when it does not say. Another version may say more than we read."""
    try:
        values = json.loads((folder / DESCRIPTION).read_text())
        return StoreDescription(**{field.name: values[field.name] for field in fields(StoreDescription)})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def describe_source(source: ModelSource, precision: Precision, num_blocks: int) -> StoreDescription:
    """Return what the folder of a checkpoint in a precision says."""
    return StoreDescription(model_name(source), revision(source), precision.value, num_blocks)


def _refuse_other_version(root: Path, source: ModelSource, precision: Precision) -> None:
    for path in sorted(root.glob("*/" + DESCRIPTION)):
        found = read_description(path.parent)
        if found is None or found.version == FORMAT_VERSION:
            continue
        if (found.model, found.revision, found.precision) == (model_name(source), revision(source), precision.value):
            raise ConfigurationError(
                f"{path.parent} holds {found.model} in {found.precision} as another version of Spanwise wrote it (its "
                f"format is {found.version}, this one reads {FORMAT_VERSION}): convert again with `cluster convert`, "
                "or prune it with `cluster store prune`"
            )


def hold_shared(file: int) -> None:
    """Keep `cluster store prune` from removing the part whose bytes are open as `file`, until that is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        return  # a file system without locks: reading needs none


@contextmanager
def _lock_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"cannot lock {path} ({error.strerror}): make the folder writable, or choose another one with "
            "--store-dir or --output, on a file system that has locks"
        ) from error


def _lock_file(path: Path) -> int | None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
    except BlockingIOError:
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)  # held by another, or removed by it meanwhile
    return None
