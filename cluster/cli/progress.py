"""What a person who waits for a first token sees: one line on stderr. Covers a single request."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from cluster.client.values import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


class RequestProgress:
    """Shows progress until the first piece; a spinner in a terminal, elsewhere a line per change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._last = ""

    def __enter__(self) -> RequestProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def show(self, progress: Progress) -> None:
        """Show where the request is; safe to call from the client's thread."""
        text = describe(progress)
        if text in ("", self._last):
            return
        self._last = text
        if not self._console.is_terminal:
            self._console.print(text)
        elif self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def clear(self) -> None:
        """Take the line away: text follows."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def describe(progress: Progress) -> str:
    """Return a line for a person; empty when there is nothing to wait for."""
    if progress.phase == "queued":
        return f"waiting behind {progress.queue_position} request{'' if progress.queue_position == 1 else 's'}"
    blocks = f", block {progress.num_blocks_done} of {progress.num_blocks}" if progress.num_blocks_done else ""
    if progress.phase == "prefill":
        return f"reading the prompt: {progress.num_prompt_tokens_done} of {progress.num_prompt_tokens} tokens{blocks}"
    return f"writing{blocks}" if blocks else ""
