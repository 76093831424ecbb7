"""What a cluster looks like in a terminal: a table of stages that follows while a model loads, plain lines elsewhere.

Covers DescribeCluster's answers only; requests are shown by `cluster.cli.generate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.cli.console import duration, size
from cluster.client.values import ClusterStatus, StageStatus, read_cluster

if TYPE_CHECKING:
    from cluster.rpc.v1 import generation_service_pb2 as service

_COLOURS = {"ready": "green", "failed": "red", "lost": "red", "draining": "yellow"}


class TimeLeft:
    """Estimates how long each stage still needs, from its progress since it was first seen in its state."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._first: dict[tuple[int, str], tuple[float, int]] = {}

    def of(self, stage: StageStatus) -> float | None:
        """Return seconds; None while there is nothing to estimate from."""
        started, first_bytes = self._first.setdefault((stage.stage, stage.state), (self._now(), stage.progress_bytes))
        done, elapsed = stage.progress_bytes - first_bytes, self._now() - started
        if done <= 0 or elapsed <= 0 or not stage.progress_total_bytes:
            return None
        return (stage.progress_total_bytes - stage.progress_bytes) * elapsed / done


class ClusterDisplay:
    """Follows a cluster from start to ready and beyond. A context manager: the terminal is its own again afterwards."""

    def __init__(self, console: Console, *, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._time_left = TimeLeft(now)
        self._live: Live | None = None
        self._last_lines: dict[int, str] = {}
        self._last_state = ""
        self._has_shown_memory = False

    def __enter__(self) -> ClusterDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_live()

    def note(self, text: str) -> None:
        """Print a remark."""
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def show(self, message: service.DescribeClusterResponse) -> None:
        """Show the latest description; costs nothing when it looks like the one before."""
        cluster = read_cluster(message)
        if cluster.state == "loading" and not self._has_shown_memory and _is_placed(cluster):
            self._has_shown_memory = True
            self._stop_live()
            self._console.print(memory_table(cluster))
        if cluster.state != "loading":
            self._show_outcome(cluster)
        elif self._console.is_terminal:
            self._follow(cluster)
        else:
            self._print_changes(cluster)
        self._last_state = cluster.state

    def _show_outcome(self, cluster: ClusterStatus) -> None:
        if cluster.state == self._last_state:
            return
        self._stop_live()
        if cluster.state == "draining":
            self.note(cluster.message)
        else:
            self._console.print(cluster_view(cluster))

    def _follow(self, cluster: ClusterStatus) -> None:
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(loading_table(cluster, self._time_left), refresh=True)

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print_changes(self, cluster: ClusterStatus) -> None:
        """Print a stage's line when its state or its tenth of the bytes changes."""
        for stage in cluster.stages:
            tenths = 10 * stage.progress_bytes // stage.progress_total_bytes if stage.progress_total_bytes else 0
            key = f"{stage.state} {tenths}"
            if self._last_lines.get(stage.stage) != key:
                self._last_lines[stage.stage] = key
                self._console.print(f"stage {stage.stage} {_place(stage)}: {stage.state} {_bytes_done(stage)}".rstrip())


def loading_table(cluster: ClusterStatus, time_left: TimeLeft) -> Table:
    """Return the table of a cluster that loads."""
    columns = ("stage", "node", "blocks", "state", "bytes", "time left")
    table = Table(*columns, title=f"loading {cluster.model.name}", title_justify="left", box=SIMPLE_HEAD)
    for stage in cluster.stages:
        left = time_left.of(stage)
        row = (str(stage.stage), stage.node_name, _blocks(stage), stage.state, _bytes_done(stage))
        table.add_row(*row, "" if left is None else duration(left), style=_COLOURS.get(stage.state))
    return table


def memory_table(cluster: ClusterStatus) -> Table:
    """Return how each stage divides its memory, as planned before anything is loaded."""
    columns = (
        "stage",
        "node",
        "blocks",
        "precision",
        "process",
        "resident",
        "read per step",
        "ring",
        "KV cache",
        "buffers",
        "budget",
    )
    table = _plain_table(
        *columns,
        title=f"memory for {cluster.model.name}",
        caption=_plan(cluster),
    )
    for stage in cluster.stages:
        streamed = f"{stage.num_streamed} parts, {size(stage.streamed_bytes)}" if stage.num_streamed else ""
        if stage.expert_cache_bytes:
            streamed = f"experts of {size(stage.streamed_bytes)}, {size(stage.expert_cache_bytes)} cached"
        table.add_row(
            *(str(stage.stage), stage.node_name, _blocks(stage), stage.numerics.precision),
            *(size(_process_bytes(stage)), size(stage.weight_bytes), streamed or "none", size(stage.ring_bytes)),
            *(_kv_cache(stage), size(stage.buffer_bytes), _budget(stage)),
        )
    return table


def streaming_table(cluster: ClusterStatus) -> Table:
    """Return what the stages read from disk, since the epoch opened."""
    columns = ("stage", "weights in memory", "read per step", "read", "while computing", "probed", "waited")
    table = _plain_table(*columns, title="weights from disk")
    for stage in cluster.stages:
        table.add_row(
            *(str(stage.stage), f"{size(stage.resident_bytes)}, {stage.resident_share:.0%}"),
            *(_read_per_step(stage), size(stage.read_bytes), f"{size(stage.read_bytes_per_second)}/s"),
            f"{size(stage.disk_bytes_per_second)}/s" if stage.disk_bytes_per_second else "too small",
            duration(stage.stall_seconds),
        )
    return table


def cluster_view(cluster: ClusterStatus) -> Group:
    """Return what `cluster status` prints."""
    tables = [cluster_table(cluster)]
    if any(stage.streamed_bytes or stage.read_bytes for stage in cluster.stages):
        tables.append(streaming_table(cluster))
    return Group(*tables)


def cluster_table(cluster: ClusterStatus) -> Table:
    """Return state, stages and load."""
    table = _plain_table(
        *("stage", "node", "device", "blocks", "precision", "weights", "KV cache", "budget", "busy", "state"),
        title=Text(_headline(cluster), style=_COLOURS.get(cluster.state, "")),
        caption=_load(cluster),
    )
    for stage in cluster.stages:
        table.add_row(
            *(str(stage.stage), stage.node_name, stage.device, _blocks(stage), stage.numerics.precision),
            *(size(stage.resident_bytes), size(stage.kv_bytes), _budget(stage)),
            f"{stage.busy_share:.0%}",
            stage.state if stage.message in cluster.message else f"{stage.state} {stage.message}",
            style=_COLOURS.get(stage.state) if stage.state == "lost" else None,
        )
    return table


def _plain_table(*columns: str, title: str | Text, caption: str = "") -> Table:
    return Table(
        *columns,
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
    )


def _is_placed(cluster: ClusterStatus) -> bool:
    return bool(cluster.num_pages and cluster.stages)


def _plan(cluster: ClusterStatus) -> str:
    """Say what the stages' memory gives."""
    tokens = cluster.num_pages * cluster.page_size
    text = f"keys and values of {tokens} tokens at most, steps of up to {cluster.max_step_tokens}"
    if any(_is_shifting(stage) for stage in cluster.stages):
        text += "; keys and values take memory from weights as they grow"
    return f"{text}; {cluster.advice}" if cluster.advice else text


def _headline(cluster: ClusterStatus) -> str:
    model = cluster.model
    name = f"{model.name} ({model.architecture}, context {model.max_context})" if model.name else "cluster"
    return f"{name}: {cluster.state}" + (f": {cluster.message}" if cluster.message not in ("", cluster.state) else "")


def _load(cluster: ClusterStatus) -> str:
    used = cluster.num_pages - cluster.num_free_pages
    return (
        f"{cluster.num_running} running, {cluster.num_waiting} of {cluster.max_waiting} waiting, "
        f"{cluster.num_requests_finished} finished, {cluster.num_requests_failed} failed; "
        f"{cluster.output_tokens_per_second:.1f} tok/s out, {cluster.prompt_tokens_per_second:.1f} tok/s in; "
        f"{used} of {cluster.num_pages} KV pages; up {duration(cluster.uptime_seconds)}"
    )


def _place(stage: StageStatus) -> str:
    return f"on {stage.node_name}" if stage.node_name else "(no node yet)"


def _process_bytes(stage: StageStatus) -> int:
    """Return what the process takes of its budget; that of a GPU is another memory."""
    return stage.process_bytes if stage.device == "cpu" else 0


def _budget(stage: StageStatus) -> str:
    return size(stage.free_memory_bytes + _process_bytes(stage))


def _kv_cache(stage: StageStatus) -> str:
    """Where weights make room for keys and values, the two together fit and not the most of each."""
    return f"up to {size(stage.kv_bytes)}" if _is_shifting(stage) else size(stage.kv_bytes)


def _is_shifting(stage: StageStatus) -> bool:
    """Tell whether weights make room for keys and values."""
    return stage.num_streamed > 0 and stage.device == "cpu"


def _read_per_step(stage: StageStatus) -> str:
    """What experts that are cached or not chosen take is not read."""
    return f"at most {size(stage.streamed_bytes)}" if stage.expert_cache_bytes else size(stage.streamed_bytes)


def _blocks(stage: StageStatus) -> str:
    numerics = stage.numerics
    return f"{numerics.first_block}-{numerics.end_block - 1}" if numerics.end_block else ""


def _bytes_done(stage: StageStatus) -> str:
    if stage.state == "ready" or not (stage.progress_bytes or stage.progress_total_bytes):
        return ""
    total = f" of {size(stage.progress_total_bytes)}" if stage.progress_total_bytes else ""
    return f"{size(stage.progress_bytes)}{total}"
