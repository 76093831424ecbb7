import socket
import sys
import types
from dataclasses import replace

import pytest

from cluster.cli.doctor import advise
from cluster.cli.node_facts import NodeFacts, inspect_node, unreachable_peers

VERSIONS = {"spanwise": "0.1.0", "ray": "2.60.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
FACTS = NodeFacts(
    name="a",
    python="3.11.4",
    versions=VERSIONS,
    gpus=(),
    cache_folder="/cache",
    cache_free_bytes=2**40,
    proxies={},
    taken_ports=(),
)


def test_facts_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy:3128")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        facts = inspect_node([port])
    assert facts.python.startswith("3.")
    assert facts.versions["grpcio"]
    assert facts.cache_free_bytes > 0
    assert facts.taken_ports == (port,)
    assert facts.proxies["HTTPS_PROXY"] == "http://…@proxy:3128"


def test_peer_that_listens_is_reached_and_another_is_not():
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    assert unreachable_peers(["127.0.0.1", "256.0.0.1"], port, seconds=0.3) == ("256.0.0.1",)


def test_healthy_machine_needs_nothing():
    assert advise({"a": FACTS, "b": FACTS}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": VERSIONS | {"ray": "", "torch": ""}}, "ray, torch not installed: .*spanwise\\[server\\]"),
        ({"gpus": ("H200, 141 GiB, 570",)}, "torch is a CPU build"),
        ({"cache_free_bytes": 2**30}, r"only 1\.0 GiB free in /cache.*HF_HOME"),
        ({"taken_ports": (7100, 7101)}, "stage ports 7100, 7101 are taken"),
        ({"proxies": {"http_proxy": "http://p"}}, "no_proxy"),
    ],
)
def test_each_fault_has_its_remedy(changes, message):
    (line,) = advise({"a": replace(FACTS, **changes)})
    assert line.startswith("a: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(line)


def test_different_versions_and_unreachable_nodes_are_named():
    other = replace(FACTS, versions=VERSIONS | {"ray": "2.50.0"})
    advice = advise({"a": FACTS, "b": other, "c": "did not answer"})
    assert advice == ["c: did not answer", "install the same ray everywhere: a has 2.60.0, b has 2.50.0"]


def test_doctor_works_here_without_ray(run):
    result = run("doctor")
    assert result.exit_code in (0, 1)
    assert "this machine" in result.output
    assert "•" in result.output


def test_doctor_asks_every_node_and_lets_them_dial_each_other(run, monkeypatch):
    asked = []

    def inspect_nodes(config, inspect, *, on_note):
        asked.append((config.address, inspect.func.__name__, inspect.args))
        on_note("joining")
        if inspect.func is inspect_node:
            return {"a (10.0.0.1)": FACTS, "b (10.0.0.2)": FACTS}
        return {"a (10.0.0.1)": ("10.0.0.2",), "b (10.0.0.2)": ()}

    monkeypatch.setitem(sys.modules, "cluster.serve", types.SimpleNamespace(inspect_nodes=inspect_nodes))
    result = run("doctor", "--address", "auto", "--stage-ports", "7300-7301")
    assert result.exit_code == 1
    assert asked[1] == ("auto", "unreachable_peers", (("10.0.0.1", "10.0.0.2"), 7300))
    assert "a (10.0.0.1) cannot reach b (10.0.0.2) on port 7300" in result.output


def test_what_to_install_is_printed_with_its_extra(run, monkeypatch):
    why = "no module named 'worker'; install spanwise[server] there"
    report = {"a (10.0.0.1)": FACTS, "b (10.0.0.2)": why}
    fake = types.SimpleNamespace(inspect_nodes=lambda *_, **__: report)
    monkeypatch.setitem(sys.modules, "cluster.serve", fake)
    assert f"• b (10.0.0.2): {why}" in run("doctor", "--address", "auto").output
