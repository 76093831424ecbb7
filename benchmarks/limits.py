"""A process under a memory limit, and the disk without the help of memory: control groups, page cache, `fio`.

Needs root, on Linux. Covers making a group and reading its peak; what runs in it is the caller's business.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
REMOVE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group with a memory limit, of version 1 or 2. Page cache counts, as in a container."""

    folder: Path
    is_unified: bool

    def wrap(self, command: Sequence[str]) -> list[str]:
        """Return a command that enters the group, then becomes `command`."""
        return ["sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh", *command]

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that was used at once, page cache included; None where the system does not tell."""
        name = "memory.peak" if self.is_unified else "memory.max_usage_in_bytes"
        with contextlib.suppress(OSError):
            return int((self.folder / name).read_text())
        return None

    @property
    def anonymous_bytes(self) -> int:
        """The memory that belongs to processes now: without page cache, which can be taken back."""
        statistics = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(statistics["anon" if self.is_unified else "total_rss"])

    @property
    def num_times_at_limit(self) -> int:
        """How often the limit was hit: harmless when page cache could be dropped."""
        if not self.is_unified:
            return int((self.folder / "memory.failcnt").read_text())
        events = dict(line.split() for line in (self.folder / "memory.events").read_text().splitlines())
        return int(events["max"])


@contextlib.contextmanager
def memory_limit(size_bytes: int) -> Iterator[MemoryGroup]:
    """Make a group, without swap; remove it afterwards. Raises SystemExit where that is not possible."""
    parent = CGROUP / "memory"
    is_unified = not parent.is_dir()
    folder = (CGROUP if is_unified else parent) / f"spanwise-{os.getpid()}"
    limits = {"memory.max": size_bytes, "memory.swap.max": 0} if is_unified else {"memory.limit_in_bytes": size_bytes}
    try:
        folder.mkdir()
    except OSError as error:
        raise SystemExit(
            f"a memory limit needs a control group, which could not be made ({error}): run as root"
        ) from error
    try:
        for name, value in limits.items():
            with contextlib.suppress(FileNotFoundError):  # no swap accounting
                (folder / name).write_text(str(value))
        yield MemoryGroup(folder, is_unified)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a group as soon as its last process is gone. Raises TimeoutError."""
    while processes := (folder / "cgroup.procs").read_text().split():
        _wait_ended(int(processes[0]))
    folder.rmdir()


def _wait_ended(process: int) -> None:
    with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(process), "rb", buffering=0) as handle:
        if not select.select([handle], [], [], REMOVE_SECONDS)[0]:
            raise TimeoutError(f"process {process} still runs in a memory group that is to be removed")


def drop_page_cache() -> None:
    """Forget what memory holds of files: pages that anyone read before are free for everyone."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What a device gives, and how that was measured."""

    bytes_per_second: float
    method: str


def measure_disk(files: Sequence[Path], *, block_bytes: int, depth: int, seconds: float) -> DiskSpeed:
    """Read files from their beginnings with direct I/O, `depth` reads of `block_bytes` at a time, one file after the
    other, for at most so long: with fio where it is installed."""
    fio = shutil.which("fio")
    if fio is None:
        print(
            "fio is not installed (apt-get install fio): reading with Spanwise's own threads instead", file=sys.stderr
        )
        return _measure_by_ourselves(files, block_bytes, depth, seconds)
    names = ":".join(str(file).replace(":", r"\:") for file in files)
    options = [
        "--name=read",
        "--rw=read",
        "--direct=1",
        "--ioengine=libaio",
        "--readonly",
        "--file_service_type=sequential",
    ]
    sizes = [f"--filename={names}", f"--bs={block_bytes}", f"--iodepth={depth}", f"--runtime={seconds}", "--time_based"]
    command = [fio, *options, *sizes, "--output-format=json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return DiskSpeed(
        float(found["jobs"][0]["read"]["bw_bytes"]), f"fio, direct, {block_bytes >> 10} KiB, depth {depth}"
    )


def _measure_by_ourselves(files: Sequence[Path], block_bytes: int, depth: int, seconds: float) -> DiskSpeed:
    """Read the same way with threads, each its own blocks in turn."""
    places = [(file, start) for file in files for start in range(0, file.stat().st_size - block_bytes + 1, block_bytes)]
    deadline = time.perf_counter() + seconds
    counts = [0] * depth

    def read(index: int) -> None:
        memory = mmap.mmap(-1, block_bytes)
        while time.perf_counter() < deadline:
            for file, start in places[index::depth]:
                descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
                counts[index] += os.preadv(descriptor, [memory], start)
                os.close(descriptor)
                if time.perf_counter() > deadline:
                    return

    begin = time.perf_counter()
    threads = [threading.Thread(target=read, args=(index,)) for index in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = sum(counts) / (time.perf_counter() - begin)
    return DiskSpeed(rate, f"{depth} threads of our own, direct, {block_bytes >> 10} KiB")
