"""Settings of `cluster serve`: one immutable value, validated once at the edge.

Precedence: command-line flag, environment variable `SPANWISE_<FIELD>`, file (`--config`, TOML), default.
Covers the value and its checks; `cluster.cli.settings` reads flags, environment and file.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import ConfigurationError

DEFAULT_PORT = 7050
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything that `cluster serve` can be told. Sizes in bytes, times in seconds."""

    model: str  # alias, hub id or folder
    revision: str = "main"
    workers: int = 1
    precision: str = "auto"  # storage of weights; auto: as the checkpoint
    kv_dtype: str = "auto"  # auto: the compute dtype
    wire_dtype: str = "auto"  # auto: fp32 where a stage computes in fp32, else bf16
    max_context: int = 0  # 0: what the model allows, at most 4096; printed
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT  # 0: any free port
    address: str = ""  # of a Ray cluster; empty: RAY_ADDRESS, else a local one
    interface: str = ""  # network interface or address that stages listen on; empty: the node's Ray address
    stage_ports: str = ""  # "7100-7110"; empty: any free port
    threads: int = 0  # compute threads per worker; 0: the node's cores shared by its workers
    gpus: float = 0.0  # GPUs per worker, as a Ray resource
    memory: int = 0  # per worker; 0: a share of what the node has free, with a margin
    kv_memory: int = 0  # per stage; 0: what the budget leaves, at most what max_running x max_context needs
    exact: bool = False  # fixed reduction order everywhere
    max_running: int = 256  # sequences admitted at once
    max_waiting: int = 1024  # requests queued beyond that
    max_step_tokens: int = 512  # prompt and decode tokens of one microbatch
    inter_token_target: float = 0.5  # prompt chunks shrink to keep steps under this while others decode
    step_timeout: float = 600.0
    load_timeout: float = 86400.0  # without any progress: 600
    internal_tls: str = "auto"  # auto: on as soon as workers are on several nodes
    detach: bool = False
    log_dir: str = ""  # empty: the state directory
    log_json: bool = False

    def validate(self) -> None:
        """Raise ConfigurationError naming the first setting that cannot be right."""
        positive = (
            "workers",
            "max_running",
            "max_waiting",
            "max_step_tokens",
            "inter_token_target",
            "step_timeout",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("max_context", "threads", "gpus", "memory", "kv_memory"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(f"port must be between 0 and 65535, not {self.port}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigurationError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        parse_port_range(self.stage_ports)


_CHOICES = {
    "precision": PRECISIONS,
    "kv_dtype": DTYPES,
    "wire_dtype": DTYPES,
    "internal_tls": ("auto", "on", "off"),
}


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
