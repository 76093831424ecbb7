"""`cluster convert` says where the result is, how to serve it, and what is wrong with what it was asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from cluster.hub.resolve import resolve
from cluster.model_spec import Precision

Run = Callable[..., Result]


def test_a_model_goes_to_the_block_store(run: Run, tmp_path: Path) -> None:
    result = run("convert", "bloom-tiny", "--precision", "int8", "--store-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert "8 of 8 parts" in result.stdout
    assert f"cluster serve bloom-tiny --precision int8 --store-dir {tmp_path}" in result.stdout
    assert "converting" in result.stderr


def test_a_span_is_converted_and_the_next_run_adds_the_rest(run: Run, tmp_path: Path) -> None:
    arguments = ("convert", "bloom-tiny", "--precision", "nf4", "--store-dir", tmp_path)
    assert "3 of 8 parts" in run(*arguments, "--blocks", "0:2").stdout
    assert "8 of 8 parts" in run(*arguments, "--jobs", 2).stdout


def test_a_folder_of_its_own_is_a_model(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("convert", "bloom-tiny", "--precision", "nf4", "--output", output)
    assert f"cluster serve {output}" in result.stdout
    spec = resolve(str(output))
    assert spec.stored_precision is Precision.NF4
    assert spec.max_context == resolve("bloom-tiny").max_context
    assert {file.name for file in spec.weight_files} >= {"block-0000.weights", "block-0000.json", "head.weights"}
    assert run("convert", "bloom-tiny", "--precision", "nf4", "--output", output).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "int5"), "must be one of int8, nf4, bf16, fp16, fp32"),
        (("--precision", "int8", "--blocks", "4:2"), "--blocks must be A:B for blocks A to B-1, of 0 to 5"),
        (("--precision", "int8", "--blocks", "2:2"), "--blocks must be A:B"),
        (("--precision", "int8", "--blocks", "5"), "--blocks must be A:B"),
        (("--precision", "int8", "--blocks", "first"), "--blocks must be A:B"),
        (("--precision", "int8", "--store-quota", "1kB"), "raise --store-quota"),
        (("--precision", "int8", "--disk-reserve", "4000TB"), "--disk-reserve"),
        (("--precision", "int8", "--store-quota", "some"), "store_quota must be a size like 12GiB"),
        (("--precision", "int8", "--blocks", "0:7"), "has blocks 0 to 5"),
    ],
)
def test_what_cannot_be_converted_is_said(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("convert", "bloom-tiny", "--store-dir", tmp_path, *arguments)
    assert result.exit_code != 0
    assert message in result.stderr


def test_limits_come_from_the_environment_too(run: Run, tmp_path: Path) -> None:
    arguments = ("convert", "bloom-tiny", "--precision", "int8", "--store-dir", tmp_path)
    for variable in ({"SPANWISE_STORE_QUOTA": "1kB"}, {"SPANWISE_DISK_RESERVE": "4000TB"}):
        assert run(*arguments, env=variable).exit_code == 1
    assert run(*arguments).exit_code == 0


def test_what_serves_the_result_can_be_pasted_into_a_shell(run: Run, tmp_path: Path) -> None:
    arguments = ("convert", "bloom-tiny", "--precision", "int8", "--blocks", "1:2")
    out, store = tmp_path / "out dir", tmp_path / "store dir"
    assert f"cluster serve '{out}'" in run(*arguments, "--output", out).stdout
    assert f"--store-dir '{store}'" in run(*arguments, "--store-dir", store).stdout


def test_a_folder_that_holds_something_else_is_not_written_to(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = run("convert", "bloom-tiny", "--precision", "int8", "--output", tmp_path)
    assert result.exit_code == 1
    assert "holds something else" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "state"] == ["notes.txt"]


def test_a_converted_folder_is_not_converted_again(run: Run, tmp_path: Path) -> None:
    run("convert", "bloom-tiny", "--precision", "int8", "--output", tmp_path / "out")
    result = run("convert", tmp_path / "out", "--precision", "nf4")
    assert result.exit_code == 1
    assert "is converted already, to int8" in result.stderr
