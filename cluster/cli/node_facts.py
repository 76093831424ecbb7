"""What `cluster doctor` finds out about one machine. Runs there, with the standard library only.

Covers facts and reachability between machines; judging them is `cluster.cli.doctor`'s.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("spanwise", "ray", "torch", "transformers", "grpcio", "protobuf")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One machine. An empty version means that the package is not installed."""

    name: str
    python: str
    versions: Mapping[str, str]
    gpus: tuple[str, ...]  # name, memory and driver, as nvidia-smi tells
    cache_folder: str  # where downloads go
    cache_free_bytes: int
    proxies: Mapping[str, str]
    taken_ports: tuple[int, ...]  # of those asked about


def inspect_node(ports: Sequence[int] = ()) -> NodeFacts:
    """Return the facts of this machine; `ports` are those that our processes are to listen on."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    names = {name: value for name, value in os.environ.items() if name.lower() in PROXY_VARIABLES}
    return NodeFacts(
        name=socket.gethostname(),
        python=platform.python_version(),
        versions={package: _version(package) for package in PACKAGES},
        gpus=_gpus(),
        cache_folder=str(cache),
        cache_free_bytes=shutil.disk_usage(existing).free,
        proxies={name: _without_password(value) for name, value in names.items()},
        taken_ports=tuple(port for port in ports if not _is_free(port)),
    )


def unreachable_peers(addresses: Sequence[str], port: int, seconds: float = 8.0) -> tuple[str, ...]:
    """Listen on `port` for some seconds and dial it on all addresses; return those that did not answer.

    Runs on all machines at the same time, so that each finds the others listening.
    """
    deadline = time.monotonic() + seconds
    with socket.create_server(("", port), backlog=len(addresses) + 8):
        found: dict[str, bool] = {}
        dials = [threading.Thread(target=_dial, args=(address, port, deadline, found)) for address in addresses]
        for dial in dials:
            dial.start()
        for dial in dials:
            dial.join()
        time.sleep(max(0.0, deadline - time.monotonic()))  # others may still dial us
    return tuple(address for address in addresses if not found.get(address))


def _dial(address: str, port: int, deadline: float, found: dict[str, bool]) -> None:
    while not found.get(address) and time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=1.0).close()
            found[address] = True
        except OSError:
            time.sleep(0.2)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _gpus() -> tuple[str, ...]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()  # no driver, no GPU, or a driver that hangs: there is nothing to compute on
    return tuple(line.strip() for line in listing.splitlines() if line.strip())


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def _without_password(url: str) -> str:
    head, at, host = url.rpartition("@")
    return f"{head.partition('://')[0]}://…@{host}" if at else url
