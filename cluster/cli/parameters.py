"""Command-line parameters made from tables, so that a setting is described once. Covers typer's view of a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

DEFAULT_SERVER = "127.0.0.1:7050"

Server = Annotated[
    str, typer.Option("--server", "-s", envvar="SPANWISE_SERVER", help="host:port of the server.", show_default=True)
]
Port = Annotated[
    int | None,
    typer.Option("--port", "-p", envvar="SPANWISE_PORT", help="Port of the server, where several run on this machine."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """An optional flag; a flag that is not given is None."""

    name: str
    kind: type
    about: str
    variable: str = ""  # environment variable
    metavar: str | None = None
    is_argument: bool = False

    def parameter(self) -> inspect.Parameter:
        """Return it as a keyword parameter that typer reads."""
        envvar = self.variable or None
        if self.is_argument:
            info: Any = typer.Argument(envvar=envvar, help=self.about, metavar=self.metavar)
        else:
            flag = "--" + self.name.replace("_", "-")
            flags = f"{flag}/--no-{flag[2:]}" if self.kind is bool else flag
            info = typer.Option(flags, envvar=envvar, help=self.about, metavar=self.metavar, show_default=False)
        annotation = Annotated[self.kind | None, info]  # type: ignore[name-defined]  # built at run time
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def takes(specs: Sequence[OptionSpec], *, into: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these parameters; the function gets those that were given as one mapping named `into`."""
    names = {spec.name for spec in specs}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
        own = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in signature.parameters.values()]
        added = [spec.parameter() for spec in specs]
        parameters = [*(p for p in own if p.name != into), *added]

        @wraps(function)
        def command(**values: object) -> None:
            given = {name: values.pop(name) for name in names if name in values}
            function(**values, **{into: {name: value for name, value in given.items() if value is not None}})

        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


Given = Mapping[str, Any]
"""Parameters that were given, by name."""
