from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.model_spec import FolderSource, HubSource, Precision
from worker.store.key import (
    EMBEDDING,
    HEAD,
    all_parts,
    block_part,
    default_store_folder,
    order_parts,
    part_block,
    store_key,
)

HUB = HubSource("bigscience/bloom-176b", "a" * 40, "https://huggingface.co")


def test_a_key_can_be_read() -> None:
    assert store_key(HUB, Precision.INT8).startswith("bigscience--bloom-176b-int8-")
    assert store_key(FolderSource("/models/my model", "d"), Precision.NF4).startswith("my_model-nf4-")


def test_all_that_decides_the_bytes_decides_the_key() -> None:
    keys = {
        store_key(HUB, Precision.INT8),
        store_key(HUB, Precision.NF4),
        store_key(HubSource(HUB.repo_id, "b" * 40, HUB.endpoint), Precision.INT8),
        store_key(HUB, Precision.INT8, version=2),
        store_key(FolderSource("/m", "a" * 40), Precision.INT8),
    }
    assert len(keys) == 5


def test_a_mirror_of_the_hub_gives_the_same_key() -> None:
    mirrored = HubSource(HUB.repo_id, HUB.commit, "https://mirror.example")
    assert store_key(mirrored, Precision.INT8) == store_key(HUB, Precision.INT8)


def test_the_default_folder_is_in_the_users_cache() -> None:
    assert default_store_folder({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/spanwise/store")
    assert default_store_folder({}) == Path.home() / ".cache/spanwise/store"


def test_parts_have_the_order_of_a_pass() -> None:
    assert order_parts({HEAD, block_part(10_000), block_part(9), EMBEDDING, block_part(10)}) == [
        *(EMBEDDING, "block-0009", "block-0010", "block-10000", HEAD)
    ]
    assert all_parts(2) == [EMBEDDING, "block-0000", "block-0001", HEAD]
    assert [part_block(part) for part in ("block-0012", HEAD)] == [12, None]


def test_what_lists_verifies_and_prunes_needs_no_torch() -> None:
    program = "import sys, worker.store.inventory, worker.store.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
