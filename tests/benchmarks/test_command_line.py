"""The command lines of the benchmarks, and what their README says of them."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import command_line
import measures
from peers.environment import variables
from peers.process import Peer, PeerError

BENCHMARKS = Path(measures.__file__).parent
ROWS = re.findall(r"^\| `(\w+)\.py`", (BENCHMARKS / "README.md").read_text(), re.MULTILINE)
STARTED_BY_OTHERS = {"stage", "local_model", "linear_kernels"}


def call(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Run a script, which leaves; return its status."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as left:
        command_line.run_script(importlib.import_module(script).main)
    return left.value.code


def test_every_script_that_people_run_has_a_row_in_the_readme() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if "\ndef main(" in path.read_text()}
    assert scripts == set(ROWS) | STARTED_BY_OTHERS


@pytest.mark.parametrize("script", sorted({*ROWS} - {"make_checkpoint"}))
def test_every_script_that_measures_prints_json(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(script, ["--help"], monkeypatch) == 0
    assert "--json " in capsys.readouterr().out


def test_help_shows_defaults_as_they_would_be_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("serve", ["--help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "requests at once (default: 1,8,32)" in shown
    assert "default: None" not in shown
    assert "default: False" not in shown


@pytest.mark.parametrize(
    ("script", "arguments", "reason"),
    [
        ("streamed", ["--peers", "nonsense"], "argument --peers: nonsense: not one of airllm, accelerate"),
        ("resident", ["--systems", "nonsense"], "argument --systems: nonsense: not one of "),
        ("ceiling", ["--precisions", "nonsense", "--memory", "1GiB"], "argument --precisions: nonsense: not one of "),
        ("streamed", ["--model", "/nowhere"], "argument --model: /nowhere is not a checkpoint's folder"),
        ("quality", ["--model", "/nowhere"], "argument --model: /nowhere is not a checkpoint's folder"),
    ],
)
def test_unknown_names_and_folders_are_refused_in_one_line_before_anything_is_measured(
    script: str,
    arguments: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(script, arguments, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}.py: {reason}")


@pytest.mark.parametrize(
    ("script", "arguments", "reason"),
    [
        ("ceiling", ["--model", "/nowhere", "--memory", "1GiB"], "there is no folder /nowhere"),
        ("ceiling", ["--model", "/nowhere", "--memory", "1GiB,much"], "memory must be a size"),
    ],
)
def test_what_spanwise_refuses_is_one_line(
    script: str, arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(call(script, arguments, monkeypatch)).startswith(f"{script}.py: {reason}")


def test_options_win_over_those_that_quick_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = command_line.Parser("")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    monkeypatch.setattr(sys, "argv", ["script.py", "--quick", "--rounds", "2"])
    arguments = parser.parse_measurement(quick="--rounds 1 --tokens 8")
    assert (arguments.rounds, arguments.tokens) == (2, 8)


def test_why_a_process_refuses_to_load_reaches_the_benchmark() -> None:
    program = "import peers.process as p\ndef load(): raise KeyError('too small')\np.answer(load, (KeyError,))"
    with pytest.raises(PeerError, match="too small"):
        Peer([sys.executable, "-c", program], variables(None, 1))
