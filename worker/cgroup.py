"""What the control groups around this process allow it of memory, in versions 1 and 2, nested ones included.

Covers reading; swap is not memory here. `worker.machine` sets it beside what the machine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class _Version:
    """How one version of control groups spells things."""

    mounts: tuple[str, ...]  # below /sys/fs/cgroup
    limit: str
    used: str
    cache: tuple[str, ...]  # of memory.stat: pages of files, which the kernel takes back when memory is short


_UNIFIED = _Version(("", "unified"), "memory.max", "memory.current", ("active_file", "inactive_file"))
_MEMORY = _Version(
    ("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)


def memory_limits(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[int, int]]:
    """Yield (limit, used without reclaimable pages) of every group around this process that has a limit.

    In a container the path in `membership` may be the machine's, of which only the upper end is mounted: folders that
    are not there are passed over on the way up.
    """
    for version, path in _groups(membership):
        for mount in version.mounts:
            for folder in (path, *path.parents):
                found = _read(root / mount / folder, version)
                if found is not None:
                    yield found


def _groups(membership: Path) -> Iterator[tuple[_Version, PurePosixPath]]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        number, controllers, path = line.split(":", 2)
        relative = PurePosixPath(path.lstrip("/"))
        if number == "0" and not controllers:
            yield _UNIFIED, relative
        elif "memory" in controllers.split(","):
            yield _MEMORY, relative


def _read(folder: Path, version: _Version) -> tuple[int, int] | None:
    try:
        limit = (folder / version.limit).read_text().strip()
        used = int((folder / version.used).read_text())
        statistics = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        cache = sum(int(statistics.get(name, 0)) for name in version.cache)
    except (OSError, ValueError):
        return None  # not mounted here, or not limited
    if limit == "max" or int(limit) >= _UNLIMITED:
        return None
    return int(limit), max(0, used - cache)
