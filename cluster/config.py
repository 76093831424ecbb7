"""Settings of `cluster serve`: one immutable value, validated once at the edge.

Precedence: command-line flag, environment variable `SPANWISE_<FIELD>`, file (`--config`, TOML), default.
Covers the value, its checks, and how sizes, nodes and ports are written; `cluster.cli.settings` reads flags,
environment and file.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from cluster.errors import ConfigurationError

DEFAULT_PORT = 7050
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "nf4")
DTYPES = ("auto", "fp32", "bf16", "fp16")


T = TypeVar("T")


def _setting(default: T, about: str, *, unit: str = "") -> T:
    """A field with a default and the sentence that `cluster serve --help` shows."""
    value: T = field(default=default, metadata={"about": about, "unit": unit})
    return value


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything that `cluster serve` can be told. Sizes in bytes, times in seconds."""

    model: str = field(metadata={"about": "alias (see `cluster models`), hub id or folder", "unit": ""})
    revision: str = _setting("main", "branch, tag or commit of a hub repository")
    workers: int = _setting(1, "worker processes; each serves one stage")
    precision: str = _setting("auto", "storage of weights: fp32, bf16, fp16, int8 or nf4; auto: as the checkpoint")
    compute_dtype: str = _setting("auto", "to compute in: fp32, bf16 or fp16; auto: what the device does best")
    outlier_threshold: float = _setting(
        6.0, "of int8: inputs of at least this magnitude, or ten times the mean of their token, keep 16 bits"
    )
    kv_dtype: str = _setting("auto", "of keys and values: fp32, bf16 or fp16; auto: the compute dtype")
    wire_dtype: str = _setting("auto", "between stages: fp32, bf16 or fp16; auto: the compute dtype")
    max_context: int = _setting(0, "tokens of prompt and answer; 0: what model and memory allow, at most 4096")
    host: str = _setting("127.0.0.1", "address that clients connect to; 0.0.0.0: any of this machine")
    port: int = _setting(DEFAULT_PORT, "port that clients connect to; 0: any free one")
    address: str = _setting(
        "", "of a Ray cluster, or local; empty: RAY_ADDRESS, else one on this machine, else a new one"
    )
    interface: str = _setting("", "network interface or address that stages listen on; empty: the node's Ray address")
    stage_ports: str = _setting("", 'ports that stages listen on, like "7100-7110"; empty: any free ones')
    threads: int = _setting(0, "compute threads per worker; 0: the node's cores shared by its workers")
    gpus: float = _setting(0.0, "GPUs per worker, as Ray counts them")
    memory: str = _setting(
        "",
        'that a worker\'s whole process may take, which needs 0.4 GiB or so for itself, like "12GiB", or by node, like '
        '"12GiB,bignode=48GiB"; empty: a share of what is free',
        unit="bytes by node",
    )
    gpu_memory: str = _setting("", "of a GPU, per worker, likewise", unit="bytes by node")
    kv_memory: int = _setting(
        0,
        "for keys and values per stage; weights that then do not fit are streamed; 0: what they leave of the budget",
        unit="bytes",
    )
    store_dir: str = _setting("", "folder of the block store; empty: in the cache directory")
    download_dir: str = _setting("", "folder of downloaded checkpoints; empty: the hub's cache")
    discard_source: bool = _setting(False, "delete each downloaded file once it is converted")
    store_quota: int = _setting(0, "that the block store may take per node; 0: no limit", unit="bytes")
    disk_reserve: int = _setting(1 << 30, "of a disk that downloads and conversions leave free", unit="bytes")
    exact: bool = _setting(
        False,
        "a fixed order of sums also on GPUs and without compiled kernels: the same tokens whatever else is served",
    )
    max_running: int = _setting(256, "sequences generated at once")
    max_waiting: int = _setting(1024, "requests queued beyond that; more are refused")
    max_step_tokens: int = _setting(
        0, "prompt and output tokens of one microbatch; 0: 512, or as long a prompt as fits where weights are streamed"
    )
    inter_token_target: float = _setting(
        0.5, "seconds; prompt chunks shrink to keep steps under it while others decode"
    )
    step_timeout: float = _setting(600.0, "seconds until a step that passes no block counts as lost")
    load_timeout: float = _setting(600.0, "seconds without any progress until a download or load is given up")
    internal_tls: str = _setting("auto", "between workers: auto (as soon as they are on several nodes), on or off")
    detach: bool = _setting(False, "serve in the background and return once ready")
    log_dir: str = _setting("", "folder of log files; empty: in the state directory")
    log_json: bool = _setting(False, "write log files as JSON lines")

    def validate(self) -> None:
        """Raise ConfigurationError naming the first setting that cannot be right."""
        positive = (
            "workers",
            "max_running",
            "max_waiting",
            "inter_token_target",
            "step_timeout",
            "load_timeout",
            "outlier_threshold",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("max_context", "threads", "gpus", "max_step_tokens", "kv_memory", "store_quota", "disk_reserve"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(f"port must be between 0 and 65535, not {self.port}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigurationError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("memory", "gpu_memory"):
            parse_node_sizes(name, getattr(self, name))
        parse_port_range(self.stage_ports)


_CHOICES = {
    "precision": PRECISIONS,
    "compute_dtype": DTYPES,
    "kv_dtype": DTYPES,
    "wire_dtype": DTYPES,
    "internal_tls": ("auto", "on", "off"),
}


_FIELDS = {field.name: field for field in fields(ServeConfig)}
_KINDS: Mapping[str, type] = get_type_hints(ServeConfig)
SIZES = {name for name, field in _FIELDS.items() if field.metadata["unit"] == "bytes"}
NODE_SIZES = {name for name, field in _FIELDS.items() if field.metadata["unit"] == "bytes by node"}


def read_settings(values: Mapping[str, object], source: str) -> dict[str, Any]:
    """Return settings as ServeConfig takes them, of a file or of Python's keyword arguments: sizes may be numbers or
    text, folders paths. Raises ConfigurationError, naming `source`, for an unknown name or a wrong type."""
    return {_known(name, source): _typed(name, value, source) for name, value in values.items()}


def _known(name: str, source: str) -> str:
    if name in _FIELDS:
        return name
    close = difflib.get_close_matches(name, _FIELDS, n=1)
    meant = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(_FIELDS)}"
    raise ConfigurationError(f"{source} has the unknown setting {name!r}; {meant}")


def _typed(name: str, value: object, source: str) -> object:
    kind = _KINDS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in SIZES and (is_number or isinstance(value, str)):
        return parse_size(name, value)  # type: ignore[arg-type]  # as just checked
    if name in NODE_SIZES and is_number:
        return str(value)
    if kind is float and is_number:
        return float(value)  # type: ignore[arg-type]  # is_number says so
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_number and isinstance(value, int) if kind is int else isinstance(value, kind):
        return value
    wanted = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    raise ConfigurationError(f"{source}: {name} must be {wanted}, not {value!r}")


def parse_port_range(text: str) -> range:
    """Return the ports of "7100-7110" (inclusive) or "7100"; an empty text is an empty range (any free port)."""
    if not text:
        return range(0)
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        raise ConfigurationError(f"stage_ports must look like 7100-7110, not {text!r}")
    ports = range(int(first), int(last or first) + 1)
    if not ports or ports[0] < 1 or ports[-1] > 65535:
        raise ConfigurationError(f"stage_ports must be a range within 1-65535, not {text!r}")
    return ports


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(name: str, text: str | float) -> int:
    """Return bytes of "12GiB", "500 MB", "1.5T" or 4096; ConfigurationError names the setting otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(text).strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ConfigurationError(f"{name} must be a size like 12GiB, 500MB or a number of bytes, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, slots=True)
class NodeSizes:
    """A size for every node, with others for some of them. 0: not set."""

    default: int
    by_node: Mapping[str, int]

    def on(self, *names: str) -> int:
        """Return the size for the node that has these names."""
        return next((self.by_node[name] for name in names if name in self.by_node), self.default)


def parse_node_sizes(name: str, text: str) -> NodeSizes:
    """Return the sizes of "12GiB", "12GiB,bignode=48GiB" or ""; ConfigurationError names the setting otherwise."""
    by_node: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        node, equals, size = (word.strip() for word in part.rpartition("="))
        if bool(node) != bool(equals) or node in by_node:
            raise ConfigurationError(
                f"{name} must be a size, and others by node, each once, like 12GiB,bignode=48GiB, not {text!r}"
            )
        by_node[node] = parse_size(name, size)
        if not by_node[node]:
            raise ConfigurationError(f"{name} must be above 0, not {size!r}; leave it out for a share of what is free")
    return NodeSizes(by_node.pop("", 0), by_node)
