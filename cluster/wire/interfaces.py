"""The address by which other machines reach this one, from the name of a network interface."""

from __future__ import annotations

import socket

import psutil

from cluster.errors import ConfigurationError


def address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface; an address is returned as it is."""
    known = psutil.net_if_addrs()
    if interface not in known:
        if interface.count(".") == 3:
            return interface
        raise ConfigurationError(
            f"{socket.gethostname()} has no network interface {interface!r}; it has {', '.join(sorted(known))}"
        )
    for entry in known[interface]:
        if entry.family == socket.AF_INET:
            return str(entry.address)
    raise ConfigurationError(f"network interface {interface!r} of {socket.gethostname()} has no IPv4 address")
