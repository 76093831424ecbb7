"""What the command lines of the scripts share: defaults in the help, `--json` and `--quick`, errors in one line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cluster.config import parse_size
from cluster.errors import SpanwiseError
from peers.process import PeerError


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


class Parser(argparse.ArgumentParser):
    """Reads the command line of a script. Give defaults as they would be typed."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """Leave with one line."""
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_measurement(self, quick: str = "") -> argparse.Namespace:
        """Parse the options of a script that measures. `quick` are options that `--quick` stands for, unless given."""
        self.add_argument("--json", action="store_true", help="print JSON instead of tables")
        if not quick:
            return self.parse_args()
        self.add_argument("--quick", action="store_true", help=f"a smoke test: {quick} unless given otherwise")
        arguments = self.parse_args()
        return self.parse_args([*quick.split(), *sys.argv[1:]]) if arguments.quick else arguments


def integers(text: str) -> list[int]:
    """Read "1,8,32"."""
    return [int(part) for part in text.split(",")]


def sizes(text: str) -> list[int]:
    """Read "3GiB,1.5GiB" as bytes. Raises ConfigurationError."""
    return [parse_size("memory", part) for part in text.split(",")]


def size(text: str) -> int:
    """Read "3GiB" as bytes. Raises ConfigurationError."""
    return parse_size("memory", text)


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what reads some of the known names, separated by commas, or "-" as none."""

    def parse(text: str) -> list[str]:
        found = [] if text == "-" else text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return found

    return parse


def checkpoint(text: str) -> Path:
    """Return the folder of a checkpoint."""
    folder = Path(text).expanduser()
    if not (folder / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{folder} is not a checkpoint's folder: it has no config.json")
    return folder


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; what can be said in a line needs no traceback."""
    try:
        main()
    except (SpanwiseError, PeerError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return an error's message, whose lines may be many, as one."""
    return " ".join(str(error).split())
