"""`cluster models`: names that `cluster serve` knows, and what a server serves now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.cli.parameters import DEFAULT_SERVER, Json, Server

if TYPE_CHECKING:
    from cluster.client import Model


def models(server: Server = DEFAULT_SERVER, json: Json = False) -> None:
    """List the short names of known models, and what is served at the address.

    A hub id (bigscience/bloom-560m) or a folder works as well as a name.

    Examples:

    - `cluster models`
    - `cluster serve bloom-560m`
    """
    from dataclasses import asdict
    from json import dumps

    from cluster.catalogue import CATALOGUE
    from cluster.cli.console import write

    served = _served(server)
    if json:
        known = [asdict(entry) for entry in CATALOGUE]
        write(dumps({"catalogue": known, "served": [asdict(model) for model in served]}, indent=2) + "\n")
    else:
        _print_tables(server, served)


def _served(server: str) -> tuple[Model, ...]:
    from cluster.client import Client, RetryPolicy
    from cluster.errors import StageTimeoutError, StageUnavailableError

    try:
        with Client(server, silence_timeout=5.0, retry=RetryPolicy(max_attempts=1)) as client:
            return client.list_models()
    except (StageUnavailableError, StageTimeoutError):
        return ()


def _print_tables(server: str, served: tuple[Model, ...]) -> None:
    from rich.table import Table

    from cluster.catalogue import CATALOGUE
    from cluster.cli.console import stdout

    table = Table("name", "hub id", "parameters", "licence")
    for entry in CATALOGUE:
        licence = f"{entry.licence} (log in to the hub and accept it first)" if entry.is_gated else entry.licence
        where = entry.repo_id or "in this package"
        table.add_row(entry.alias, where, f"{entry.num_parameters / 1e9:.3g} billion", licence)
    console = stdout()
    console.print(table)
    for model in served:
        chat = "has" if model.has_chat_template else "no"
        console.print(f"served at {server}: {model.name} ({model.architecture}, {chat} chat template)")
    if not served:
        console.print(f"no server answers at {server}")
