"""One worker in a process of its own: says where it listens, on one line of JSON, and serves until its stdin ends."""

from __future__ import annotations

import asyncio
import json
import sys

from tests.integration.local_cluster import new_stage_server


async def main(number: int) -> None:
    server = new_stage_server(number)
    print(json.dumps({"address": await server.start()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
