"""The command with Ray on weights in 8 and 4 bits: converted ahead or on first use, in memory or partly on the disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.integration.local_cluster import local_cluster
from tests.integration.serve_command import CALL_SECONDS, COMMAND, END_SECONDS, Server, environment, running

PROMPT = "My fellow Americans, tonight"
EXACT = ("--exact", "--threads", "1")
NUM_TOKENS = 12
MEMORY = "625MiB"  # of which the process takes about 400; the weights of `large` take 175 in 8 bits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.skipif(sys.platform != "linux", reason="knows processes by /proc"),
]


@pytest.fixture(scope="module")
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "state"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that a process of MEMORY cannot hold in 8 bits."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    return make_checkpoint(tmp_path_factory.mktemp("large"), "llama", sizes | heads, dtype=torch.bfloat16)


def serving(state_home: Path, *arguments: str) -> Iterator[Server]:
    server = Server([*arguments, *EXACT], environment(state_home))
    with running(server):
        server.wait_ready()
        yield server


async def text_in_memory(model: str | Path, prompt: str, num_tokens: int, num_stages: int, **settings: Any) -> str:
    """Return what workers of this process generate, which hold all weights in memory."""
    async with local_cluster(model, num_stages, exact=True, **settings) as cluster, cluster.client() as client:
        status = await client.describe()
        assert not any(stage.streamed_bytes for stage in status.stages)
        return (await client.complete(prompt, max_tokens=num_tokens, ignore_eos=True, temperature=0)).text


def convert(state_home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "convert", *arguments],
        env=environment(state_home),
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
    )


async def test_a_folder_converted_ahead_is_served_by_two_workers(state_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bloom-tiny-nf4"
    converted = convert(state_home, "bloom-tiny", "--precision", "nf4", "--output", str(folder))
    assert converted.returncode == 0, converted.stderr
    assert converted.stdout.endswith(f"serve it with: cluster serve {folder}\n")
    for server in serving(state_home, str(folder), "--workers", "2"):
        assert [stage["numerics"]["precision"] for stage in server.status()["stages"]] == ["nf4", "nf4"]
        served = server.generate(PROMPT, NUM_TOKENS, "--ignore-eos")
    assert served == await text_in_memory(folder, PROMPT, NUM_TOKENS, 2, precision="auto") + "\n"


async def test_a_stage_that_reads_weights_from_disk_generates_the_tokens_of_one_that_holds_them(
    state_home: Path, tmp_path: Path, large: Path
) -> None:
    store = str(tmp_path / "store")
    limits = ("--memory", MEMORY, "--max-context", "256", "--max-step-tokens", "64", "--max-running", "4")
    arguments = (str(large), "--precision", "int8", "--store-dir", store, *limits)
    for server in serving(state_home, *arguments):
        assert re.search(r"stage 0 on \S+: converting", server.output)
        assert re.search(r"0 +\S+ +0-13 +int8 .* \d+ parts, [\d.]+ MiB", server.output), server.output
        served = server.generate("Call me", NUM_TOKENS, "--ignore-eos")
        (stage,) = server.status()["stages"]
        assert 0 < stage["streamed_bytes"] <= stage["read_bytes"]
        assert stage["stall_seconds"] > 0
        assert 0 < stage["resident_share"] < 1
        os.kill(stage["process_id"], signal.SIGKILL)
        assert server.wait(END_SECONDS) == 1
        assert server.are_all_gone(1.0), server.processes()
    settings = {"precision": "int8", "store_dir": store, "max_context": 256, "max_running": 4}
    assert served == await text_in_memory(large, "Call me", NUM_TOKENS, 1, **settings) + "\n"
