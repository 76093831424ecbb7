"""Where the settings of `cluster serve` come from: flag, environment variable, file, default, in this order."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from cluster.cli.console import size
from cluster.cli.parameters import OptionSpec
from cluster.config import NODE_SIZES, SIZES, ServeConfig, parse_size, read_settings
from cluster.errors import ConfigurationError

_KINDS: Mapping[str, type] = get_type_hints(ServeConfig)
_FIELDS = {field.name: field for field in fields(ServeConfig)}


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
    sizes = {name: parse_size(name, values[name]) for name in SIZES & values.keys()}
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
        about += f" [default: {size(field.default) if name in SIZES else field.default}]"
    return OptionSpec(
        name=name,
        kind=str if name in SIZES else _KINDS[name],
        about=about[0].upper() + about[1:],
        variable=variable_of(name),
        metavar="SIZE" if name in SIZES | NODE_SIZES else "MODEL" if name == "model" else None,
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
    return read_settings({key.replace("-", "_"): value for key, value in table.items()}, str(file))
