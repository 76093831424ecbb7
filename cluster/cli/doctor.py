"""`cluster doctor`: what each machine has, what is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.cli.node_facts import NodeFacts
    from cluster.config import ServeConfig

Report = Mapping[str, "NodeFacts | str"]
"""By machine: its facts, or why it could not be asked."""

LOW_DISK_BYTES = 20 * 1024**3
PROBE_PORT = 7100


def doctor(
    address: Annotated[
        str, typer.Option("--address", envvar="SPANWISE_ADDRESS", help="Ray cluster whose nodes to check; auto: found.")
    ] = "",
    stage_ports: Annotated[
        str,
        typer.Option("--stage-ports", envvar="SPANWISE_STAGE_PORTS", help="Ports that stages listen on: 7100-7110."),
    ] = "",
) -> None:
    """Check this machine, or every node of a Ray cluster: versions, GPUs, disk, ports, proxies, and what to do.

    Examples:

    - `cluster doctor`
    - `cluster doctor --address auto --stage-ports 7100-7110`
    """
    from cluster.cli.console import stdout
    from cluster.cli.node_facts import inspect_node
    from cluster.config import ServeConfig, parse_port_range

    ports = parse_port_range(stage_ports)
    config = ServeConfig(model="", address=address, stage_ports=stage_ports)
    report: Report = {"this machine": inspect_node(ports)}
    unreachable: list[str] = []
    if address:
        report = _inspect_nodes(config, ports)
        unreachable = _check_reachability(config, report, ports[0] if ports else PROBE_PORT)
    console = stdout()
    console.print(facts_table(report))
    advice = [*advise(report), *unreachable]
    for line in advice or ["nothing to do"]:
        console.print(f"• {line}", soft_wrap=True, markup=False)  # `spanwise[server]` is no markup
    if advice:
        raise typer.Exit(1)


def facts_table(report: Report) -> object:
    """Return a rich table with a row per machine."""
    from rich.markup import escape
    from rich.table import Table

    from cluster.cli.console import size

    table = Table("node", "Python", "Spanwise", "Ray", "torch", "GPU and driver", "free for downloads", "proxy")
    for name, facts in report.items():
        if isinstance(facts, str):
            table.add_row(name, escape(facts), style="red")
            continue
        versions = [facts.versions[package] or "-" for package in ("spanwise", "ray", "torch")]
        disk = f"{size(facts.cache_free_bytes)} in {facts.cache_folder}"
        proxies = ", ".join(f"{key}={value}" for key, value in facts.proxies.items())
        table.add_row(name, facts.python, *versions, "\n".join(facts.gpus) or "none", disk, proxies or "none")
    return table


def advise(report: Report) -> list[str]:
    """Return a sentence per thing to do."""
    reached = {name: facts for name, facts in report.items() if not isinstance(facts, str)}
    advice = [f"{name}: {why}" for name, why in report.items() if isinstance(why, str)]
    for name, facts in reached.items():
        advice += [f"{name}: {line}" for line in _advise_one(facts)]
    for package in ("spanwise", "ray", "torch", "python"):
        found = {_version_of(facts, package) for facts in reached.values()} - {""}
        if len(found) > 1:
            where = ", ".join(f"{name} has {_version_of(facts, package)}" for name, facts in reached.items())
            advice.append(f"install the same {package} everywhere: {where}")
    return advice


def _advise_one(facts: NodeFacts) -> list[str]:
    from cluster.cli.console import size

    advice = []
    missing = [package for package in ("ray", "torch", "transformers") if not facts.versions[package]]
    if missing:
        advice.append(f"{', '.join(missing)} not installed: to serve here, pip install 'spanwise[server]'")
    if facts.gpus and facts.versions["torch"].endswith("+cpu"):
        advice.append("there is a GPU but torch is a CPU build: install torch for CUDA to use it")
    if facts.cache_free_bytes < LOW_DISK_BYTES:
        advice.append(
            f"only {size(facts.cache_free_bytes)} free in {facts.cache_folder}: free some, or "
            "set HF_HOME to a larger disk"
        )
    if facts.taken_ports:
        taken = ", ".join(str(port) for port in facts.taken_ports)
        advice.append(f"stage ports {taken} are taken: stop what uses them, or choose others with --stage-ports")
    has_no_proxy = any(name.lower() == "no_proxy" for name in facts.proxies)
    if facts.proxies and not has_no_proxy:
        advice.append(
            "a proxy is set without no_proxy: set no_proxy=127.0.0.1,localhost and the server's address for clients"
        )
    return advice


def _version_of(facts: NodeFacts, package: str) -> str:
    return facts.python if package == "python" else facts.versions[package]


def _inspect_nodes(config: ServeConfig, ports: range) -> Report:
    from cluster.cli.console import stderr
    from cluster.cli.foreground import load_server
    from cluster.cli.node_facts import inspect_node

    report: Report = load_server().inspect_nodes(config, partial(inspect_node, ports), on_note=stderr().print)
    return report


def _check_reachability(config: ServeConfig, report: Report, port: int) -> list[str]:
    """Let every node dial every other; names are "host (address)"."""
    from cluster.cli.foreground import load_server
    from cluster.cli.node_facts import unreachable_peers

    addresses = {
        name.rpartition("(")[2].rstrip(")"): name for name, facts in report.items() if not isinstance(facts, str)
    }
    if len(addresses) < 2:
        return []
    probe = partial(unreachable_peers, tuple(addresses), port)
    found = load_server().inspect_nodes(config, probe, on_note=lambda _: None)
    return [
        f"{name} cannot reach {addresses[peer]} on port {port}: open it between them (--stage-ports names the range)"
        for name, peers in found.items()
        if not isinstance(peers, str)
        for peer in peers
    ]
