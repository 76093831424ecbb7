"""The page cache that a process' libraries take.

The system reads far ahead in them: after torch's import hundreds of megabytes are cached that nothing has used, and in
a control group they count as the process' own, where its memory is planned to the last part.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from worker.store.disk import forget_pages

MAPS = Path("/proc/self/maps")


def forget_libraries(maps: Path = MAPS) -> None:
    """Let the page cache drop what was read of this process' files and is not in use. Nothing happens without `maps`,
    which Linux has."""
    if not maps.exists():
        return
    fields = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    paths = {Path(field[5]) for field in fields if len(field) > 5 and field[5].startswith("/")}
    for path in filter(Path.is_file, paths):  # a device is none
        with suppress(OSError), path.open("rb") as file:
            forget_pages(file.fileno())
