"""The rules about the repository itself that no linter checks."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ServeConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "coordinator", "worker")
FOLDERS = (*PACKAGES, "proto", "tests", "scripts", "benchmarks", "helm", "deploy", ".ci")
TEXT_SUFFIXES = {"", ".md", ".proto", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
SHELL = (
    *("actor", "board", "bring_up", "checkpoint_server", "coordinator", "engine", "intake", "pipeline", "server"),
    *("stage_link", "streams", "tokenizer"),
)
"""Modules of the coordinator that perform: they may know sockets, clocks and tasks."""
MAX_LINES = 500
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")


def is_generated(path: Path) -> bool:
    """Tell whether nobody writes this file by hand."""
    return "_pb2" in path.name or "__pycache__" in path.parts or ROOT / "cluster/models/bloom-tiny" in path.parents


def written_files() -> list[Path]:
    """Return the text files that people write."""
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name != "LICENSE"]
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [p for p in top + below if p.is_file() and p.suffix in TEXT_SUFFIXES and not is_generated(p)]


def modules() -> list[Path]:
    """Return the Python modules of the three packages."""
    return [path for name in PACKAGES for path in (ROOT / name).rglob("*.py") if not is_generated(path)]


def contracts() -> list[dict[str, Any]]:
    """Return the import contracts."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return list(settings["tool"]["importlinter"]["contracts"])


def layers() -> set[str]:
    """Return every module that the layer contract names."""
    return {name for layer in contracts()[0]["layers"] for name in re.split(r"[ |:]+", layer)}


def test_no_file_is_long() -> None:
    assert [str(path) for path in written_files() if len(path.read_text().splitlines()) > MAX_LINES] == []


def test_nothing_is_left_unfinished() -> None:
    assert [str(path) for path in written_files() if UNFINISHED.search(path.read_text())] == []


def test_every_module_says_what_it_covers() -> None:
    silent = [path for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert [str(path) for path in silent if ROOT / "cluster/rpc" not in path.parents] == []


def test_every_module_has_a_layer() -> None:
    top = {f"cluster.{path.stem}" for path in (ROOT / "cluster").glob("*.py")} - {"cluster.__init__"}
    packages = {f"cluster.{path.parent.name}" for path in (ROOT / "cluster").glob("*/__init__.py")}
    assert top | packages | {"coordinator", "worker"} == layers()


def test_every_module_of_the_coordinator_decides_or_performs() -> None:
    """A new module that decides must be named in the contract that keeps decisions pure."""
    (deciding,) = (contract["source_modules"] for contract in contracts() if "Decisions" in contract["name"])
    names = {f"coordinator.{path.stem}" for path in (ROOT / "coordinator").glob("[a-z]*.py")}
    assert names == set(deciding) | {f"coordinator.{name}" for name in SHELL}


def test_no_package_hides_a_python_file_from_the_wheel() -> None:
    """A folder with modules but without `__init__.py` would not be packaged."""
    assert [str(path) for path in modules() if not (path.parent / "__init__.py").exists()] == []


def test_readme_tells_every_setting_of_serve() -> None:
    flags = {f"--{field.name.replace('_', '-')}" for field in fields(ServeConfig)} - {"--model"}
    readme = (ROOT / "README.md").read_text()
    assert {flag for flag in flags if f"`{flag}`" not in readme} == set()


def test_architecture_page_is_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) < 150


def test_schemas_never_hold_python() -> None:
    assert list((ROOT / "proto").rglob("*.py")) == []


@pytest.mark.slow
def test_wheel_carries_model_stubs_and_licence_and_is_made_without_a_compiler(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('..')"]
    no_compiler = os.environ | {"CC": "/nonexistent", "CXX": "/nonexistent"}
    subprocess.run(build, cwd=source, env=no_compiler, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name.replace(".dist-info", "") for name in zipfile.ZipFile(wheel).namelist()}
    expected = {str(path.relative_to(source)) for name in PACKAGES for path in (source / name).rglob("*.py")}
    model = {str(path.relative_to(source)) for path in (source / "cluster/models/bloom-tiny").iterdir()}
    assert {"cluster/models/bloom-tiny/README.md", "cluster/models/bloom-tiny/model.safetensors"} <= model
    assert expected | model | {"cluster/py.typed", "cluster/rpc/v1/stage_pb2.pyi"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert [name for name in names if name.startswith("worker/native/src")] == []
