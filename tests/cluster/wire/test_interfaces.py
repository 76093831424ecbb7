"""The address of an interface, with the interfaces of an imagined machine."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from cluster.errors import ConfigurationError
from cluster.wire.interfaces import address_of


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "eth0": [
            SimpleNamespace(family=socket.AF_INET6, address="fe80::1"),
            SimpleNamespace(family=socket.AF_INET, address="10.0.0.7"),
        ],
        "wg0": [SimpleNamespace(family=socket.AF_INET6, address="fd00::7")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


def test_a_name_gives_its_ipv4_address() -> None:
    assert address_of("eth0") == "10.0.0.7"


def test_an_address_stays_what_it_is() -> None:
    assert address_of("192.0.2.9") == "192.0.2.9"


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(ConfigurationError, match=r"no network interface 'eth9'; it has eth0, wg0"):
        address_of("eth9")


def test_an_interface_without_ipv4_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="has no IPv4 address"):
        address_of("wg0")
