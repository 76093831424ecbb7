from __future__ import annotations

import subprocess
import sys

CHILD = "from cluster.parent import end_with_parent; end_with_parent(); print('watching', flush=True); input()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdin=subprocess.PIPE, stdout=sys.stdout)
child.wait()
"""


def test_process_ends_with_its_parent() -> None:
    read, write = subprocess.PIPE, subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=read, stdout=write, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "watching\n"
        parent.kill()
        assert parent.stdout.read() == ""  # its end: the last process that could write has ended
