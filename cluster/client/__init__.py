"""The client library: talk to a Spanwise server from Python. Needs neither torch nor ray.

    from cluster.client import Client

    with Client("127.0.0.1:7050") as client:
        for piece in client.generate("The capital of France is", max_tokens=20, temperature=0):
            print(piece.text, end="", flush=True)
        print(client.complete("2 + 2 =", max_tokens=5).text)

Errors are in `cluster.errors`; a fake server for tests in `cluster.testing.generation`.
"""

from cluster.client.aio import AsyncClient
from cluster.client.blocking import BlockingGeneration, Client
from cluster.client.generation import Generation
from cluster.client.options import GenerateOptions, Prompt
from cluster.client.retry import RetryPolicy
from cluster.client.values import (
    ChatMessage,
    Choice,
    ClusterStatus,
    Completion,
    Fingerprint,
    Model,
    Piece,
    Progress,
    StageNumerics,
    StageSeconds,
    StageStatus,
    Summary,
    Timings,
    Usage,
)
from cluster.request import FinishReason, TokenLogprobs

__all__ = [
    "AsyncClient",
    "BlockingGeneration",
    "ChatMessage",
    "Choice",
    "Client",
    "ClusterStatus",
    "Completion",
    "Fingerprint",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "Model",
    "Piece",
    "Progress",
    "Prompt",
    "RetryPolicy",
    "StageNumerics",
    "StageSeconds",
    "StageStatus",
    "Summary",
    "Timings",
    "TokenLogprobs",
    "Usage",
]
