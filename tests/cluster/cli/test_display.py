import io

from rich.console import Console

from cluster.cli.console import duration, size
from cluster.cli.display import ClusterDisplay, TimeLeft, cluster_table, cluster_view, memory_table
from cluster.client.values import read_cluster
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.testing.generation import ready_status


def downloading(num_bytes, *, total=1000):
    status = ready_status(num_stages=1)
    status.state = service.CLUSTER_STATE_LOADING
    status.stages[0].state = service.STAGE_STATE_DOWNLOADING
    status.stages[0].progress_bytes = num_bytes
    status.stages[0].progress_total_bytes = total
    return status


def console_of(*, is_terminal):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=80, color_system=None)


def test_time_left_follows_from_the_rate_since_the_state_was_first_seen():
    now = [10.0]
    time_left = TimeLeft(lambda: now[0])
    assert time_left.of(read_cluster(downloading(100)).stages[0]) is None
    now[0] = 14.0
    assert time_left.of(read_cluster(downloading(300)).stages[0]) == 14.0
    assert time_left.of(read_cluster(downloading(300, total=0)).stages[0]) is None


def test_elsewhere_than_in_a_terminal_a_line_per_tenth_and_per_state():
    console = console_of(is_terminal=False)
    with ClusterDisplay(console) as display:
        for num_bytes in (0, 10, 50, 150, 190, 1000):
            display.show(downloading(num_bytes))
        display.show(ready_status(num_stages=1))
        display.show(ready_status(num_stages=1))
    told = [line for line in console.file.getvalue().splitlines() if line.startswith("stage 0")]
    lines = console.file.getvalue().splitlines()
    assert told == [
        "stage 0 on node-a: downloading 0 B of 1000 B",
        "stage 0 on node-a: downloading 150 B of 1000 B",
        "stage 0 on node-a: downloading 1000 B of 1000 B",
    ]
    assert sum("fake (bloom" in line for line in lines) == 1


def test_terminal_shows_a_table_that_goes_away_when_ready():
    console = console_of(is_terminal=True)
    now = [0.0]
    with ClusterDisplay(console, now=lambda: now[0]) as display:
        display.show(downloading(100))
        now[0] = 1.0
        display.show(downloading(200))
        loading = console.file.getvalue()
        display.show(ready_status())
    assert "200 B of 1000 B" in loading
    assert "8 s" in loading
    assert "ready" in console.file.getvalue()


def test_table_of_a_small_cluster_fits_80_columns():
    console = console_of(is_terminal=False)
    console.print(cluster_table(read_cluster(ready_status())))
    text = console.file.getvalue()
    assert "precision" in text
    assert "3.0 MiB" in text
    assert "4.0 GiB" in text


def test_failure_is_told_once_with_its_stage():
    status = ready_status()
    status.state = service.CLUSTER_STATE_FAILED
    status.message = status.stages[1].message = "stage 1 of node-b"
    status.stages[1].state = service.STAGE_STATE_LOST
    console = console_of(is_terminal=False)
    with ClusterDisplay(console) as display:
        display.show(status)
    assert console.file.getvalue().count("stage 1 of node-b") == 1
    status.message = "another failure"
    assert "lost stage 1 of node-b" in printed(cluster_table(read_cluster(status)))


def test_sizes_and_times_are_for_people():
    assert [size(n) for n in (0, 1023, 1024, 5 * 2**30, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert [duration(n) for n in (0.4, 59, 61, 3661)] == ["0 s", "59 s", "1 min 1 s", "1 h 1 min"]


def streaming():
    status = ready_status(num_stages=1)
    status.advice = "--precision int8 would fit without streaming"
    status.max_step_tokens = 2048
    stage = status.stages[0]
    stage.weight_bytes = stage.resident_bytes = 30 * 2**30
    stage.streamed_bytes, stage.num_streamed, stage.ring_bytes = 10 * 2**30, 7, 384 * 2**20
    stage.buffer_bytes, stage.read_bytes, stage.busy_seconds = 500 * 2**20, 100 * 2**30, 50.0
    stage.resident_share, stage.read_bytes_per_second = 0.75, 2 * 2**30
    stage.stall_seconds, stage.disk_bytes_per_second = 12.0, 1.5 * 2**30
    return read_cluster(status)


def printed(table):
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_memory_is_shown_as_planned_once_and_before_anything_is_loaded():
    text = printed(memory_table(streaming()))
    for part in ("30.0 GiB", "7 parts, 10.0 GiB", "384.0 MiB", "500.0 MiB", "4.0 GiB", "512 tokens at most", "2048"):
        assert part in text
    assert "--precision int8 would fit without streaming" in text
    console = console_of(is_terminal=False)
    with ClusterDisplay(console) as display:
        display.show(downloading(0))
        display.show(downloading(10))
    assert console.file.getvalue().count("memory for fake") == 1


def test_experts_on_disk_are_shown_as_the_most_that_a_step_may_read():
    status = ready_status(num_stages=1)
    stage = status.stages[0]
    stage.streamed_bytes, stage.expert_cache_bytes = 300 * 2**20, 80 * 2**20
    cluster = read_cluster(status)
    assert "at most 300.0 MiB" in printed(cluster_view(cluster))
    assert "experts of 300.0 MiB, 80.0 MiB cached" in printed(memory_table(cluster))
    assert "take memory from weights" not in printed(memory_table(cluster))
    assert "take memory from weights" in printed(memory_table(streaming()))


def test_the_parts_of_the_memory_table_fit_into_the_budget_that_was_given():
    status = ready_status(num_stages=1)
    stage = status.stages[0]
    stage.process_bytes, stage.free_memory_bytes = 404 * 2**20, 746 * 2**20  # of --memory 1150MiB
    stage.weight_bytes, stage.ring_bytes, stage.buffer_bytes = 149 * 2**20, 188 * 2**20, 354 * 2**20
    stage.kv_bytes, stage.streamed_bytes, stage.num_streamed = 201 * 2**20, 252 * 2**20, 6
    for part in ("404.0 MiB", "149.0 MiB", "188.0 MiB", "up to 201.0 MiB", "354.0 MiB", "1.1 GiB"):
        assert part in printed(memory_table(read_cluster(status)))
    assert "1.1 GiB" in printed(cluster_table(read_cluster(status)))
    stage.device = "cuda:0"  # the process takes none of its memory, and keys and values do not share theirs
    text = printed(memory_table(read_cluster(status)))
    assert "746.0 MiB" in text
    assert "404.0 MiB" not in text
    assert "up to 201" not in text


def test_status_of_a_streamed_stage_tells_share_speed_and_waiting():
    text = printed(cluster_view(streaming()))
    for part in ("30.0 GiB, 75%", "10.0 GiB", "100.0 GiB", "2.0 GiB/s", "1.5 GiB/s", "12 s"):
        assert part in text
    assert "weights from disk" not in printed(cluster_view(read_cluster(ready_status())))
