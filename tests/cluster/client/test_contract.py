"""What users of cluster.client may rely on."""

import subprocess
import sys

import grpc
import pytest

import cluster.client
from cluster.client.failure import error_of_call
from cluster.errors import SpanwiseError


def test_public_names():
    assert cluster.client.__all__ == [
        *("AsyncClient", "BlockingGeneration", "ChatMessage", "Choice", "Client", "ClusterStatus", "Completion"),
        *("Fingerprint", "FinishReason", "GenerateOptions", "Generation", "Model", "Piece", "Progress", "Prompt"),
        *("RetryPolicy", "StageNumerics", "StageSeconds", "StageStatus", "Summary", "Timings", "TokenLogprobs"),
        "Usage",
    ]
    assert all(hasattr(cluster.client, name) for name in cluster.client.__all__)


def test_importing_it_loads_nothing_heavy():
    heavy = ("torch", "ray", "transformers", "numpy", "huggingface_hub", "psutil", "cryptography")
    program = f"import sys, cluster.client, cluster.testing.generation; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_becomes_an_error_of_ours(code):
    rpc_error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="what happened")
    error = error_of_call(rpc_error, "host:1")
    assert isinstance(error, SpanwiseError)
    assert type(error) is not SpanwiseError
    assert "what happened" in str(error)
