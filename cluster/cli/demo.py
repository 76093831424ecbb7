"""`cluster demo`: the whole product on one machine in one command, with the model that ships in this package."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.config import ServeConfig
    from cluster.rpc.v1 import generation_service_pb2 as service

DEFAULT_PROMPT = "My fellow citizens, the state of our Union"


def demo(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")] = DEFAULT_PROMPT,
    workers: Annotated[int, typer.Option("--workers", help="Worker processes.", min=1)] = 3,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens to write.", min=1)] = 120,
) -> None:
    """Cut a tiny BLOOM over three worker processes, stream text out of it, and clean up. Needs no network.

    Examples:

    - `cluster demo "We the people"`
    """
    from cluster.cli.console import stdout
    from cluster.cli.display import ClusterDisplay
    from cluster.cli.foreground import load_server, with_place
    from cluster.config import ServeConfig
    from cluster.logs import configure_logging

    config = with_place(ServeConfig(model="bloom-tiny", workers=workers, port=0, address="local"))
    configure_logging(config.log_dir, "serve")
    stop = threading.Event()
    with ClusterDisplay(stdout()) as display:
        reading = Reading(config, prompt, max_tokens, on_end=stop.set)

        def on_status(cluster: service.DescribeClusterResponse) -> None:
            display.show(cluster)
            reading.start_when_ready(cluster)

        status = load_server().run(config, on_status=on_status, on_note=display.note, stop=stop)
    raise typer.Exit(reading.result(status))


class Reading:
    """Streams one completion to stdout on a thread of its own, while the main thread supervises the cluster."""

    def __init__(self, config: ServeConfig, prompt: str, max_tokens: int, *, on_end: Callable[[], None]) -> None:
        from cluster.cli.foreground import client_address

        self._address = client_address(config)
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._on_end = on_end
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._is_done = False

    def start_when_ready(self, cluster: service.DescribeClusterResponse) -> None:
        """Begin at the first description that says ready."""
        from cluster.rpc.v1 import generation_service_pb2 as service

        if self._thread is None and cluster.state == service.CLUSTER_STATE_READY:
            self._thread = threading.Thread(target=self._run, name="demo", daemon=True)
            self._thread.start()

    def result(self, status: int) -> int:
        """Return the exit status once the cluster has ended with `status`; raises what went wrong with the text,
        unless the cluster itself failed, which explains it."""
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        if self._error is not None and not status:
            raise self._error
        return 0 if self._is_done else status or 130

    def _run(self) -> None:
        try:
            self._stream()
            self._is_done = True
        except Exception as error:  # crosses to the main thread, which raises it
            self._error = error
        finally:
            self._on_end()

    def _stream(self) -> None:
        from cluster.cli.console import stderr, write
        from cluster.client import Client

        with Client(self._address) as client:
            write(f"\n{self._prompt}")
            stream = client.generate(
                self._prompt, max_tokens=self._max_tokens, temperature=0.8, seed=7, ignore_eos=True
            )
            for piece in stream:
                write(piece.text)
            write("\n\n")
        if stream.summary is not None:
            stderr().print(f"{stream.summary.usage.num_completion_tokens} tokens", style="dim")
