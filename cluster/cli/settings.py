"""Where the settings of `cluster serve` come from: flag, environment variable, file, default, in this order."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from cluster.cli.console import size
from cluster.cli.parameters import OptionSpec
from cluster.config import ServeConfig, parse_size
from cluster.errors import ConfigurationError

_KINDS: Mapping[str, type] = get_type_hints(ServeConfig)
_FIELDS = {field.name: field for field in fields(ServeConfig)}
_SIZES = {name for name, field in _FIELDS.items() if field.metadata["unit"] == "bytes"}
_NODE_SIZES = {name for name, field in _FIELDS.items() if field.metadata["unit"] == "bytes by node"}


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"SPANWISE_{name.upper()}"


def serve_options() -> list[OptionSpec]:
    """Return a flag (or argument) for every setting; typer reads flag and environment, in this order."""
    return [_option(name) for name in _FIELDS]


def load(given: Mapping[str, Any], file: Path | None) -> ServeConfig:
    """Return the checked settings; `given` holds flags and environment, `file` is TOML.

    Raises ConfigurationError for an unknown key, a wrong type or an impossible value.
    """
    values = (_read(file) if file else {}) | dict(given)
    if "model" not in values:
        raise ConfigurationError(
            "name the model to serve: `cluster serve bloom-560m`, SPANWISE_MODEL, or model = in the --config file"
        )
    sizes = {name: parse_size(name, values[name]) for name in _SIZES & values.keys()}
    config = ServeConfig(**(values | sizes))
    config.validate()
    return config


def to_arguments(config: ServeConfig) -> list[str]:
    """Return arguments of `cluster serve` that give these settings in an environment without any of ours."""
    arguments = [config.model]
    for name, field in _FIELDS.items():
        value = getattr(config, name)
        if name == "model" or value == field.default:
            continue
        flag = name.replace("_", "-")
        arguments += [f"--{flag}" if value else f"--no-{flag}"] if _KINDS[name] is bool else [f"--{flag}", str(value)]
    return arguments


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without our settings."""
    ours = {variable_of(name) for name in _FIELDS} | {"SPANWISE_CONFIG"}
    return {name: value for name, value in environment.items() if name not in ours}


def _option(name: str) -> OptionSpec:
    field = _FIELDS[name]
    about = str(field.metadata["about"])
    if field.default is not MISSING and field.default not in ("", 0, 0.0, False):
        about += f" [default: {size(field.default) if name in _SIZES else field.default}]"
    return OptionSpec(
        name=name,
        kind=str if name in _SIZES else _KINDS[name],
        about=about[0].upper() + about[1:],
        variable=variable_of(name),
        metavar="SIZE" if name in _SIZES | _NODE_SIZES else "MODEL" if name == "model" else None,
        is_argument=name == "model",
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigurationError(f"cannot read the settings file {file}: {why}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"the settings file {file} is not TOML: {error}") from error
    return {_known(key, file): _typed(_known(key, file), value, file) for key, value in table.items()}


def _known(key: str, file: Path) -> str:
    name = key.replace("-", "_")
    if name in _FIELDS:
        return name
    close = difflib.get_close_matches(name, _FIELDS, n=1)
    meant = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(_FIELDS)}"
    raise ConfigurationError(f"{file} has the unknown setting {key!r}; {meant}")


def _typed(name: str, value: object, file: Path) -> object:
    kind = _KINDS[name]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and is_whole:
        return float(value)  # type: ignore[arg-type]  # is_whole says so
    if name in _NODE_SIZES and is_whole:
        return str(value)
    if (name in _SIZES and isinstance(value, str)) or (is_whole if kind is int else isinstance(value, kind)):
        return value
    wanted = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    raise ConfigurationError(f"{file}: {name} must be {wanted}, not {value!r}")
