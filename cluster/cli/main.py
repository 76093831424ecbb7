"""The `cluster` application: its commands, and how errors end it.

Exit status: 0 done; 1 an error, told in one sentence; 2 wrong usage; 130 Ctrl-C. Command modules import what is heavy
when they run, so that help and completion are quick.
"""

from __future__ import annotations

import errno
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.cli import chat, convert, demo, doctor, generate, logs, models, serve, status, stop, store
from cluster.errors import SpanwiseError
from cluster.version import VERSION


class _Group(TyperGroup):
    """Turns errors into a sentence and an exit status; takes --debug anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        if "--debug" in options:
            args.remove("--debug")
            ctx.meta["debug"] = True
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.meta.get("debug") or _is_typers(error):
                raise
            from cluster.cli.console import print_error

            print_error(_sentence(error))
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")

for command in (
    *(serve.serve, status.status, generate.generate, chat.chat, logs.logs, stop.stop),
    *(convert.convert, models.models, demo.demo, doctor.doctor),
):
    app.command()(command)
app.add_typer(store.app, name="store")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"spanwise {VERSION}")
        raise typer.Exit


@app.callback()
def _cluster(
    version: Annotated[  # its callback acts
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Serve a language model across several machines, and talk to it.

    Start with `cluster demo`, then `cluster serve bloom-560m --workers 2` and, in another terminal,
    `cluster generate "The capital of France is"`.
    """


def main() -> None:
    """Run the command line of this process."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its remarks about lost connections are ours to make
    app(prog_name="cluster")


def _is_typers(error: Exception) -> bool:
    """Whether typer knows what to do: wrong usage, an exit, a reader that closed the pipe. Its classes have moved
    between versions; what they have in common is an exit code."""
    is_broken_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
    return is_broken_pipe or hasattr(error, "exit_code") or isinstance(error, typer.Abort)


def _sentence(error: Exception) -> str:
    if isinstance(error, SpanwiseError):
        return error.message
    return (
        f"unexpected {type(error).__name__}: {error} (a bug of ours, or of the environment; "
        "the same command with --debug shows where)"
    )
