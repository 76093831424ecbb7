"""`cluster serve`: brings a model up and serves it, here or in the background.

Covers settings, the run record, logs and what the terminal shows; `cluster.serve` does the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.parameters import Given, takes
from cluster.cli.settings import load, serve_options

if TYPE_CHECKING:
    pass


@takes(serve_options(), into="given")
def serve(
    given: Given,
    config: Annotated[
        Path | None, typer.Option("--config", envvar="SPANWISE_CONFIG", help="TOML file with any of these settings.")
    ] = None,
) -> None:
    """Serve a model: cut it into spans, one per worker, and answer clients until Ctrl-C.

    MODEL is a name from `cluster models`, a hub id or a folder. Every setting is also an environment variable
    (SPANWISE_WORKERS) and a key of the TOML file (workers = 3); a flag beats the variable, which beats the file.

    Examples:

    - `cluster serve bloom-tiny --workers 3`
    - `cluster serve bigscience/bloom-7b1 --workers 4 --precision bf16 --host 0.0.0.0 --detach`
    - `cluster serve bloom-176b --address auto --config cluster.toml`
    """
    from cluster.cli.detached import start_detached
    from cluster.cli.foreground import serve_here, with_place

    settings = with_place(load(given, config))
    raise typer.Exit(start_detached(settings) if settings.detach else serve_here(settings))
