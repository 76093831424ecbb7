"""Which build of the kernels is loaded, and when none is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from worker.native import library as native
from worker.native.library import library

is_built = pytest.mark.skipif(library() is None, reason="the kernels are not built here")


@is_built
def test_a_build_of_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "int8.cpp").write_text("// edited since")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    assert library.__wrapped__() is None
    assert "older than their sources" in caplog.text


@is_built
def test_an_installed_package_without_sources_trusts_its_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SOURCES", tmp_path / "absent")
    assert library.__wrapped__() is not None


def test_without_a_build_the_way_out_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(native, "_builds", lambda: ("avx2",))
    with caplog.at_level(logging.WARNING):
        assert library.__wrapped__() is None
    assert "apt install g++" in caplog.text


def test_a_cpu_that_no_build_is_for_is_told_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_builds", lambda: ())
    assert library.__wrapped__() is None
    assert not caplog.text
