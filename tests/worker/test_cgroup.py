"""Limits of control groups around a process, from files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

from worker.cgroup import memory_limits

UNLIMITED_V1 = 9223372036854771712


def unified(folder: Path, limit: str, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile 999\nactive_file {cache}\ninactive_file 0\n")


def version_1(folder: Path, limit: int, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 7\ntotal_cache 999\ntotal_inactive_file {cache}\ntotal_active_file 0\n")


def limits(tmp_path: Path, membership: str) -> list[tuple[int, int]]:
    (tmp_path / "cgroup").write_text(membership)
    return list(memory_limits(tmp_path / "cgroup", tmp_path / "fs"))


def test_every_group_up_to_the_root_counts_and_pages_of_files_do_not(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    unified(root / "a/b", "max", 100)
    unified(root / "a", "1000", 400, cache=150)
    assert limits(tmp_path, "0::/a/b\n") == [(1000, 250)]
    unified(root / "a/b", "500", 100)
    assert limits(tmp_path, "0::/a/b\n") == [(500, 100), (1000, 250)]


def test_version_1_and_a_hybrid_machine(tmp_path: Path) -> None:
    version_1(tmp_path / "fs/memory", UNLIMITED_V1, 5000)
    version_1(tmp_path / "fs/memory/job", 2000, 700, cache=200)
    unified(tmp_path / "fs/unified/job", "max", 1)
    assert limits(tmp_path, "5:cpu,cpuacct:/job\n4:memory:/job\n0::/job\n") == [(2000, 500)]


def test_a_container_that_sees_the_machines_path_reads_its_own_root(tmp_path: Path) -> None:
    version_1(tmp_path / "fs/memory", 3000, 100)
    assert limits(tmp_path, "4:memory:/docker/0123\n") == [(3000, 100)]
    unified(tmp_path / "fs", "800", 10)
    assert limits(tmp_path, "0::/\n") == [(800, 10)]


def test_other_systems_have_none(tmp_path: Path) -> None:
    assert list(memory_limits(tmp_path / "none", tmp_path)) == []
    assert limits(tmp_path, "0::/gone\n") == []
