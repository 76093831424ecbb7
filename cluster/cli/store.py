"""`cluster store`: what the block store holds, whether it is whole, and removing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.parameters import Json

if TYPE_CHECKING:
    from rich.progress import Progress

    from worker.store.inventory import Pruned, StoreEntry
    from worker.store.verify import Damage

app = typer.Typer(no_args_is_help=True, help="Show, check and prune converted models on this machine.")

StoreDir = Annotated[
    Path | None,
    typer.Option(
        "--store-dir",
        envvar="SPANWISE_STORE_DIR",
        file_okay=False,
        help="The block store's folder.",
        show_default="~/.cache/spanwise/store",
    ),
]
Key = Annotated[str | None, typer.Argument(help="A name of `cluster store list`, its beginning, or a model's name.")]


@app.command("list")
def list_(store_dir: StoreDir = None, json: Json = False) -> None:
    """List converted models: parts, bytes, last use.

    Examples:

    - `cluster store list`
    - `cluster store list --store-dir /mnt/nvme/spanwise --json`
    """
    from json import dumps

    from cluster.cli.console import write
    from worker.store.inventory import list_entries

    root = _root(store_dir)
    entries = list_entries(root)
    if json:
        write(dumps([_as_json(entry) for entry in entries], indent=2) + "\n")
    else:
        _print_table(root, entries)


@app.command()
def verify(
    key: Key = None,
    store_dir: StoreDir = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove damaged parts: the next use makes them anew.")
    ] = False,
) -> None:
    """Read everything and compare it with what was written. Ends with status 1 when a damaged part stays.

    Examples:

    - `cluster store verify`
    - `cluster store verify bigscience/bloom-560m --remove`
    """
    root = _root(store_dir)
    entries = _select(root, key)
    usable = [entry for entry in entries if not entry.is_other_version]
    for entry in entries:
        if entry.is_other_version:
            typer.echo(f"{entry.key}: not checked, since another version of Spanwise made it")
    damages = _verify_all(usable)
    num_staying = sum(_tell_damage(entry, found, is_removed=remove) for entry, found in damages)
    if num_staying and not remove:
        typer.echo("`cluster store verify --remove` removes what is damaged: the next use makes it anew")
    if num_staying:
        raise typer.Exit(1)


@app.command()
def prune(
    key: Key = None,
    older_version: Annotated[
        bool, typer.Option("--older-version", help="What other versions of Spanwise made.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="Only what killed conversions left.")] = False,
    store_dir: StoreDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove converted models, or what killed conversions left. What is in use stays.

    Examples:

    - `cluster store prune bigscience/bloom-560m`
    - `cluster store prune --older-version --yes`
    - `cluster store prune --partial`
    """
    from worker.store.inventory import prune as prune_folder
    from worker.store.inventory import prune_leftovers

    if sum((key is not None, older_version, everything, partial)) != 1:
        raise typer.BadParameter("say what to remove: a name, --older-version, --partial or --all")
    entries = _select(_root(store_dir), key)
    if older_version:
        entries = [entry for entry in entries if entry.is_other_version]
    if partial:
        entries = [entry for entry in entries if entry.num_leftovers]
    if _is_agreed(entries, yes, is_partial=partial):
        _remove(entries, prune_leftovers if partial else prune_folder)


def _root(store_dir: Path | None) -> Path:
    from worker.store.key import default_store_folder

    return (store_dir or default_store_folder()).expanduser()


def _select(root: Path, key: str | None) -> list[StoreEntry]:
    from worker.store.inventory import find_entries, list_entries

    return list_entries(root) if key is None else find_entries(root, key)


def _as_json(entry: StoreEntry) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "key": entry.key,
        "description": asdict(entry.description) if entry.description else None,
        "parts": entry.parts,
        "damaged": entry.damaged,
        "missing": entry.missing,
        "bytes": entry.num_bytes,
        "leftover_bytes": entry.leftover_bytes,
        "last_used": entry.last_used,
    }


def _print_table(root: Path, entries: Sequence[StoreEntry]) -> None:
    from rich.table import Column, Table

    from cluster.cli.console import size, stdout

    console = stdout()
    if not entries:
        console.print(f"nothing is converted in {root}", soft_wrap=True)
        return
    table = Table(Column("name", overflow="fold"), "model", "precision", "format", "parts", "size", "last used")

    for entry in entries:
        table.add_row(entry.key, *_described(entry), _parts_text(entry), size(entry.num_bytes), _date(entry.last_used))
    console.print(table)
    console.print(f"{size(sum(entry.num_bytes for entry in entries))} in {root}", soft_wrap=True)


def _described(entry: StoreEntry) -> tuple[str, str, str]:
    found = entry.description
    if found is None:
        return "unknown", "", ""
    return found.model, found.precision, f"{found.version} (other)" if entry.is_other_version else str(found.version)


def _parts_text(entry: StoreEntry) -> str:
    from cluster.cli.console import size

    expected = f" of {entry.description.num_blocks + 2}" if entry.description else ""
    leftovers = f", {size(entry.leftover_bytes)} unfinished" if entry.num_leftovers else ""
    damaged = f", {len(entry.damaged)} damaged" if entry.damaged else ""
    return f"{len(entry.parts) - len(entry.damaged)}{expected}{damaged}{leftovers}"


def _date(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _verify_all(entries: Sequence[StoreEntry]) -> list[tuple[StoreEntry, list[Damage]]]:
    from worker.store.verify import verify_parts

    total = sum(entry.num_bytes for entry in entries)
    with _progress() as progress:
        task = progress.add_task("verifying", total=total)
        found = [
            (entry, verify_parts(entry.store, entry.parts, lambda count: progress.advance(task, count)))
            for entry in entries
        ]
        progress.update(task, completed=total)
    return found


def _progress() -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from cluster.cli.console import stderr

    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    return Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


def _tell_damage(entry: StoreEntry, damages: Sequence[Damage], *, is_removed: bool) -> int:
    """Say what is damaged, and remove it if so asked; return how many parts stay."""
    from worker.store.inventory import remove_parts

    if not damages:
        count = len(entry.parts)
        typer.echo(f"{entry.key}: {count} part{' is' if count == 1 else 's are'} whole")
        return 0
    parts = [damage.part for damage in damages]
    staying = remove_parts(entry.store, parts) if is_removed else parts
    for damage in damages:
        typer.echo(f"{entry.key}: {'damaged' if damage.part in staying else 'removed'}: {damage.message}")
    return len(staying)


def _is_agreed(entries: Sequence[StoreEntry], yes: bool, *, is_partial: bool) -> bool:
    from cluster.cli.console import size

    if not entries:
        typer.echo("nothing to remove")
        return False
    sizes = [entry.leftover_bytes if is_partial else entry.num_bytes for entry in entries]
    for entry, num_bytes in zip(entries, sizes, strict=True):
        typer.echo(f"{entry.key}: {size(num_bytes)}{' of unfinished conversions' if is_partial else ''}")
    return yes or typer.confirm(f"Remove {size(sum(sizes))}?")


def _remove(entries: Sequence[StoreEntry], remove: Callable[[StoreEntry], Pruned]) -> None:
    from cluster.cli.console import size

    removed = 0
    for entry in entries:
        pruned = remove(entry)
        removed += pruned.num_bytes
        for name in pruned.in_use:
            typer.echo(f"{name} is in use by another process and stays")
    typer.echo(f"removed {size(removed)}")
