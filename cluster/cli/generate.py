"""`cluster generate`: one prompt, its text on stdout as it comes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.parameters import DEFAULT_SERVER, Given, Json, Server, takes
from cluster.cli.sampling import SAMPLING_FLAGS, client_options

if TYPE_CHECKING:
    from cluster.client import Client, Completion


@takes(SAMPLING_FLAGS, into="sampling")
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    sampling: Given,
    server: Server = DEFAULT_SERVER,
    num_completions: Annotated[int, typer.Option("--num-completions", "-n", help="Independent texts.", min=1)] = 1,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt first.")] = False,
    json: Json = False,
) -> None:
    """Continue a text. It streams to stdout; progress and errors go to stderr. Ctrl-C aborts the request.

    Examples:

    - `cluster generate "The capital of France is" --max-tokens 20 --temperature 0`
    - `cat letter.txt | cluster generate - --server node1:7050`
    """
    from cluster.client import Client

    text = sys.stdin.read() if prompt == "-" else prompt
    options = client_options(sampling) | {"num_completions": num_completions, "echo": echo}
    with Client(server) as client:
        if json or num_completions > 1:
            _print_whole(client, text, options, json=json)
        else:
            _stream(client, text, options)


def _stream(client: Client, prompt: str, options: dict[str, Any]) -> None:
    from cluster.cli.console import stderr, write
    from cluster.cli.progress import RequestProgress

    with RequestProgress(stderr()) as progress, client.generate(prompt, on_progress=progress.show, **options) as pieces:
        line_end = ""
        try:
            for piece in pieces:
                if piece.text:
                    progress.clear()
                    write(piece.text)
                    line_end = "\n"
        finally:
            write(line_end)


def _print_whole(client: Client, prompt: str, options: dict[str, Any], *, json: bool) -> None:
    from cluster.cli.console import stderr, write
    from cluster.cli.progress import RequestProgress

    with RequestProgress(stderr()) as progress:
        completion = client.complete(prompt, on_progress=progress.show, **options)
    if json:
        write(f"{_as_json(completion)}\n")
        return
    start = completion.prompt.text if completion.prompt else ""
    for index, choice in enumerate(completion.choices):
        write(f"--- {index + 1} of {len(completion.choices)}\n{start}{choice.text}\n")


def _as_json(completion: Completion) -> str:
    import json
    from dataclasses import asdict
    from enum import Enum

    def value_of(value: object) -> object:
        return value.value if isinstance(value, Enum) else str(value)

    return json.dumps(asdict(completion), default=value_of, ensure_ascii=False, indent=2)
