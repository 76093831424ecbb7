"""The committed stubs run on every protobuf that pyproject.toml allows, oldest and newest of each major version."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROUND_TRIP = """
import sys
import google.protobuf
from cluster.rpc.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc
from cluster.rpc.v1 import stage_pb2, stage_service_pb2, stage_service_pb2_grpc

assert google.protobuf.__version__.startswith(sys.argv[1]), google.protobuf.__version__

request = generation_service_pb2.GenerateRequest(
    request_id="r",
    token_ids=generation_pb2.TokenIds(ids=[1, 2, 3]),
    sampling=generation_pb2.SamplingParams(temperature=0.0, logit_bias={7: -1.5}),
)
copy = generation_service_pb2.GenerateRequest.FromString(request.SerializeToString())
assert copy == request and copy.WhichOneof("prompt") == "token_ids"
assert copy.sampling.HasField("temperature") and not copy.sampling.HasField("top_k")
assert dict(copy.sampling.logit_bias) == {7: -1.5}

header = stage_pb2.StepHeader(
    epoch=stage_pb2.Epoch(generation=1, number=2), step_id=2**63, is_sampled=[True, False], lengths=[1, 511]
)
step = stage_service_pb2.ForwardRequest(header=header, piece=stage_pb2.TensorPiece(data=bytes(1024)))
copy = stage_service_pb2.ForwardRequest.FromString(step.SerializeToString())
assert copy == step and list(copy.header.is_sampled) == [True, False] and copy.header.step_id == 2**63
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.26.", "5.", "6.", "7."])
def test_stubs_import_and_round_trip(version: str, tmp_path: Path) -> None:
    """Warnings are errors: a runtime that dislikes the generated code says so at import."""
    target = tmp_path / "protobuf"
    install = [ROOT / "scripts/install.sh", sys.prefix, "--quiet", "--target", target, f"protobuf=={version}*"]
    subprocess.run(install, check=True)
    subprocess.run(
        [sys.executable, "-W", "error", "-c", ROUND_TRIP, version],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(target)},
        check=True,
    )
