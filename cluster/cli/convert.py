"""`cluster convert`: makes the block store's parts of a model ahead of serving it, or a folder that serves by itself.

Covers arguments and what the terminal shows; `worker.conversion` does the work.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import ConfigurationError

if TYPE_CHECKING:
    from cluster.load_order import LoadProgress, StoreOptions
    from cluster.model_spec import ModelSpec
    from cluster.span import Span

PRECISIONS = ("int8", "nf4", "bf16", "fp16", "fp32")
_STEP = 0.1  # of a phase, between two lines where there is no terminal


def _known(precision: str) -> str:
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    return precision


Model = Annotated[str, typer.Argument(help="A name of `cluster models`, a hub id or a folder.")]
PrecisionName = Annotated[
    str,
    typer.Option(
        callback=_known,
        help="int8: half the bytes of 16 bits, hardly any loss. nf4: a quarter, a little loss. bf16, fp16, fp32: "
        "for models that are streamed from disk as they are.",
    ),
]
Blocks = Annotated[str, typer.Option(metavar="A:B", help="Only blocks A to B-1, as one machine of several needs them.")]
Output = Annotated[
    Path | None, typer.Option(help="A new folder that `cluster serve` takes by itself. Without it: the block store.")
]
StoreDir = Annotated[
    str, typer.Option(envvar="SPANWISE_STORE_DIR", help="The block store's folder.", show_default=False)
]
DownloadDir = Annotated[
    str,
    typer.Option(
        envvar="SPANWISE_DOWNLOAD_DIR",
        help="Where downloaded files are kept. Without it: the hub's cache.",
        show_default=False,
    ),
]
DiscardSource = Annotated[
    bool,
    typer.Option(
        "--discard-source", help="Delete each downloaded file once it is converted. Files of your own folders stay."
    ),
]
StoreQuota = Annotated[
    str,
    typer.Option(envvar="SPANWISE_STORE_QUOTA", metavar="SIZE", help="What the block store may take; 0: no limit."),
]
DiskReserve = Annotated[
    str,
    typer.Option(
        envvar="SPANWISE_DISK_RESERVE", metavar="SIZE", help="What downloading and converting leave free of a disk."
    ),
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a hub repository.")]
Jobs = Annotated[
    int, typer.Option(min=1, help="Parts made at once: with 2, one is converted while the next is downloaded.")
]


def convert(
    model: Model,
    precision: PrecisionName,
    blocks: Blocks = "",
    output: Output = None,
    store_dir: StoreDir = "",
    download_dir: DownloadDir = "",
    discard_source: DiscardSource = False,
    store_quota: StoreQuota = "0",
    disk_reserve: DiskReserve = "1GiB",
    revision: Revision = "main",
    jobs: Jobs = 1,
) -> None:
    """Convert a model to 8 or 4 bits (or another precision) once, so that serving it starts at once.

    Serving converts by itself what it needs; converting first moves the wait to where it suits, and needs no GPU and
    hardly any memory. It may be stopped at any time: the next run goes on with the blocks that are missing.

    Examples:

    - `cluster convert bloom-7b1 --precision int8`
    - `cluster convert bigscience/bloom --precision nf4 --blocks 0:35 --discard-source`
    - `cluster convert ./my-model --precision int8 --output ./my-model-int8`, then `cluster serve ./my-model-int8`
    """
    from cluster.config import parse_size
    from cluster.load_order import StoreOptions

    options = StoreOptions(
        store_folder=store_dir and str(Path(store_dir).expanduser()),
        download_folder=download_dir,
        is_source_discarded=discard_source,
        quota_bytes=parse_size("store_quota", store_quota),
        reserve_bytes=parse_size("disk_reserve", disk_reserve),
    )
    typer.echo(_make(model, revision, precision, blocks, options, output, jobs))
    typer.echo("serve it with: " + _serve_command(model, precision, revision, store_dir, output))


def _make(
    model: str, revision: str, precision: str, blocks: str, options: StoreOptions, output: Path | None, num_at_once: int
) -> str:
    """Convert, and say what there is now."""
    from cluster.hub.resolve import find_token, resolve
    from cluster.model_spec import Precision
    from worker import conversion
    from worker.store.key import all_parts

    token = find_token()
    spec = resolve(model, revision, token)
    span, target = _parse_blocks(blocks, spec), output.expanduser() if output else None
    asked = conversion.Conversion(spec, Precision(precision), span, options, target, token or "")
    with _shown() as show:
        store = conversion.convert(asked, num_at_once, show)
    wanted = all_parts(spec.num_blocks)
    num_made = sum(store.has(part) for part in wanted)
    return f"{num_made} of {len(wanted)} parts of {spec.name} in {precision}: {store.folder}"


def _parse_blocks(text: str, spec: ModelSpec) -> Span:
    from cluster.span import Span

    first, colon, end = (text or ":").partition(":")
    try:
        if not colon:
            raise ValueError
        return Span(int(first or 0), int(end or spec.num_blocks))
    except ValueError as error:
        raise ConfigurationError(
            f'--blocks must be A:B for blocks A to B-1, of 0 to {spec.num_blocks - 1} of {spec.name}, not "{text}"'
        ) from error


def _serve_command(model: str, precision: str, revision: str, store_dir: str, output: Path | None) -> str:
    if output is not None:
        return shlex.join(["cluster", "serve", str(output)])
    command = ["cluster", "serve", model, "--precision", precision]
    if revision != "main":
        command += ["--revision", revision]
    if store_dir:
        command += ["--store-dir", store_dir]
    return shlex.join(command)


@contextmanager
def _shown() -> Iterator[Callable[[LoadProgress], None]]:
    """Show progress: bars in a terminal, elsewhere a line now and then."""
    from cluster.cli.console import stderr

    try:
        if stderr().is_terminal:
            with _bars() as show:
                yield show
        else:
            yield _lines()
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on with what is missing", err=True)
        raise


@contextmanager
def _bars() -> Iterator[Callable[[LoadProgress], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from cluster.cli.console import stderr

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=stderr()) as bars:
        tasks = {phase: bars.add_task(phase, visible=False) for phase in ("downloading", "converting")}

        def show(progress: LoadProgress) -> None:
            if progress.phase in tasks:
                is_under_way = progress.phase == "converting" or progress.bytes_done < progress.bytes_total
                bars.update(
                    tasks[progress.phase],
                    completed=progress.bytes_done,
                    total=progress.bytes_total or None,
                    visible=is_under_way,
                )

        yield show


def _lines() -> Callable[[LoadProgress], None]:
    from cluster.cli.console import size

    said: dict[str, float] = {}

    def show(progress: LoadProgress) -> None:
        share = progress.bytes_done / max(1, progress.bytes_total)
        if share < said.get(progress.phase, 0.0) + _STEP and (share < 1 or said.get(progress.phase) == 1):
            return
        said[progress.phase] = share
        typer.echo(f"{progress.phase}: {size(progress.bytes_done)} of {size(progress.bytes_total)}", err=True)

    return show
