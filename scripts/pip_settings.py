"""Print pip's own settings as shell exports that uv understands, so that both install from the same places.

Covers where packages come from and how to reach it. A setting that uv finds in its own environment variable stays.
"""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping

UV_VARIABLES = {
    "cert": ("SSL_CERT_FILE", ""),
    "default-timeout": ("UV_HTTP_TIMEOUT", ""),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "index-url": ("UV_DEFAULT_INDEX", ""),
    "no-index": ("UV_NO_INDEX", ""),
    "proxy": ("ALL_PROXY", ""),
    "timeout": ("UV_HTTP_TIMEOUT", ""),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}
"""pip's setting → uv's variable, and what stands between several values of it."""


def parse_settings(listing: str) -> dict[str, str]:
    """Read the output of `pip config list`: lines like `global.find-links='/a /b'`. The environment's come last."""
    lines = sorted(listing.splitlines(), key=lambda line: line.startswith(":env:"))
    settings = {}
    for line in lines:
        name, separator, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if separator and section in ("global", "install", ":env:"):
            settings[key] = str(ast.literal_eval(value))
    return settings


def exports(settings: Mapping[str, str], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield `export NAME=value` lines."""
    for key, (variable, separator) in UV_VARIABLES.items():
        if key in settings and variable not in environment:
            values = settings[key].split()
            yield f"export {variable}={shlex.quote(separator.join(values))}"
    if "extra-index-url" in settings and "UV_INDEX_STRATEGY" not in environment:
        yield "export UV_INDEX_STRATEGY=unsafe-best-match"  # pip's rule: the best version of all indexes


def main() -> None:
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    print("\n".join(exports(parse_settings(listing), os.environ)))


if __name__ == "__main__":
    main()
