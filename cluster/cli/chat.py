"""`cluster chat`: a conversation in the terminal. The history is kept here, the template is applied by the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.parameters import DEFAULT_SERVER, Given, Server, takes
from cluster.cli.sampling import SAMPLING_FLAGS, client_options

if TYPE_CHECKING:
    from cluster.client import ChatMessage, Client


@takes(SAMPLING_FLAGS, into="sampling")
def chat(
    sampling: Given,
    server: Server = DEFAULT_SERVER,
    system: Annotated[str, typer.Option("--system", help="Instructions that hold for the whole conversation.")] = "",
) -> None:
    """Talk with a model. /reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer.

    Examples:

    - `cluster chat --system "Answer in one sentence." --temperature 0.7`
    """
    from cluster.client import ChatMessage, Client

    start = [ChatMessage("system", system)] if system else []
    with Client(server) as client:
        _check_template(client)
        Conversation(client, start, client_options(sampling)).run()


class Conversation:
    """A history and the loop that grows it."""

    def __init__(self, client: Client, start: list[ChatMessage], options: dict[str, Any]) -> None:
        self._client = client
        self._start = start
        self._history = list(start)
        self._options = options

    def run(self) -> None:
        """Read lines until the person leaves."""
        while True:
            try:
                line = _read_line()
            except EOFError:
                return
            if line == "/quit":
                return
            if line == "/reset":
                self._history = list(self._start)
            elif line:
                self._turn(line)

    def _turn(self, line: str) -> None:
        """Ask and print; an answer that failed leaves the history as it was."""
        from cluster.cli.console import print_error
        from cluster.client import ChatMessage
        from cluster.errors import SpanwiseError

        question = [*self._history, ChatMessage("user", line)]
        try:
            answer = self._answer(question)
        except SpanwiseError as error:
            print_error(error.message)
            return
        self._history = [*question, ChatMessage("assistant", answer)]

    def _answer(self, question: list[ChatMessage]) -> str:
        """Print the answer as it comes and return it; Ctrl-C ends it early."""
        from cluster.cli.console import stderr, write
        from cluster.cli.progress import RequestProgress

        texts: list[str] = []
        progress = RequestProgress(stderr())
        with progress, self._client.generate(question, on_progress=progress.show, **self._options) as pieces:
            try:
                for piece in pieces:
                    progress.clear()
                    texts.append(piece.text)
                    write(piece.text)
            except KeyboardInterrupt:
                write(" [stopped]")
            finally:
                write("\n")
        return "".join(texts)


def _check_template(client: Client) -> None:
    from cluster.errors import InvalidRequestError

    model = client.list_models()[0]
    if not model.has_chat_template:
        raise InvalidRequestError(
            f"{model.name} has no chat template: it continues texts and was not trained to answer; use `cluster "
            "generate`, or serve an instruct model (`cluster models` lists some)"
        )


def _read_line() -> str:
    """Return the next line, stripped; Ctrl-C only drops what was typed."""
    import contextlib
    import sys

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit and recall lines
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return ""
