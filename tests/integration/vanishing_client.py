"""A client in a process of its own, to be killed: asks for a long text and prints a line for every piece."""

from __future__ import annotations

import asyncio
import sys

from cluster.client import AsyncClient


async def main(address: str) -> None:
    async with AsyncClient(address) as client:
        async for piece in client.generate("The state of the Union", max_tokens=2000, ignore_eos=True):
            print(piece.text.encode(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
