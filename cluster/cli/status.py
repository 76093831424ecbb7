"""`cluster status`: what a server does now, or how its last run ended."""

from __future__ import annotations

import typer

from cluster.cli.parameters import DEFAULT_SERVER, Json, Server


def status(server: Server = DEFAULT_SERVER, json: Json = False) -> None:
    """Show state, stages, spans, precision, memory, requests and speed of a server.

    Examples:

    - `cluster status --server node1:7050`
    - `cluster status --json | jq .state`
    """
    from dataclasses import asdict
    from json import dumps

    from cluster.cli.console import stdout
    from cluster.cli.display import cluster_view
    from cluster.cli.local_runs import explain_absence
    from cluster.client import Client, RetryPolicy
    from cluster.errors import StageUnavailableError

    try:
        with Client(server, silence_timeout=10.0, retry=RetryPolicy(max_attempts=1)) as client:
            cluster = client.describe()
    except StageUnavailableError as error:
        raise explain_absence(server, error) from error
    if json:
        typer.echo(dumps(asdict(cluster), indent=2))
    else:
        stdout().print(cluster_view(cluster))
    if cluster.state == "failed":
        raise typer.Exit(1)
