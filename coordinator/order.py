"""The order to start a coordinator: what crosses from the command to its process. A value, nothing heavy to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.config import ServeConfig
from cluster.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class CoordinatorOrder:
    """How a coordinator starts. `generation` rises from one coordinator to the next: it fences their epochs."""

    config: ServeConfig
    spec: ModelSpec
    worker_addresses: tuple[str, ...]
    listen_address: str  # of the checkpoint service, which only workers call
    generation: int
    token: str = field(default="", repr=False)
    certificate: bytes = b""
    authority: bytes = b""
    node_names: Mapping[str, str] = field(default_factory=dict)  # by worker address, for messages

    def signed(self, certificate: bytes, authority: bytes) -> CoordinatorOrder:
        """Return the same order with the coordinator's certificate."""
        return replace(self, certificate=certificate, authority=authority)
