"""Ending with one's parent: a worker whose node's Ray daemon was killed must not hold memory and ports for ever.

Ray's own check waits for methods under way, and ours last as long as the process.
"""

from __future__ import annotations

import logging
import os
import threading
import time

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


def end_with_parent() -> None:
    """From now on, end this process within about a second of the process that started it."""
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    logger.error("ending: process %s, which started this one, is gone", parent)
    os._exit(1)
