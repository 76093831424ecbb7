from dataclasses import replace

import pytest

from cluster.errors import InvalidRequestError
from cluster.load_order import LoadedReport, LoadOrder, LoadProgress
from cluster.microbatch import Epoch
from cluster.model_spec import CheckpointFile, FolderSource, HubSource, ModelSizes, Precision, WeightCount
from cluster.placement import WorkerId, WorkerInfo
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.span import Span
from cluster.version import PROTOCOL_VERSION
from cluster.wire.workers import (
    load_order_from_proto,
    load_order_to_proto,
    load_progress_from_proto,
    load_progress_to_proto,
    loaded_report_from_proto,
    loaded_report_to_proto,
    model_sizes_from_proto,
    model_sizes_to_proto,
    worker_info_from_proto,
    worker_info_to_proto,
)

EPOCH = Epoch(5, 2)
ORDER = LoadOrder(
    stage=1,
    num_stages=3,
    span=Span(4, 9),
    config={"model_type": "bloom", "n_layer": 24, "layer_norm_epsilon": 1e-05},
    source=HubSource("bigscience/bloom-560m", "a" * 40, "https://hub.example"),
    checkpoint_service="",
    weight_files=(CheckpointFile("model-00001-of-00002.safetensors", 5_000_000_000),),
    weight_map={"h.0.weight": "model-00001-of-00002.safetensors"},
    precision=Precision.BF16,
    kv_dtype="auto",
    wire_dtype="fp32",
    num_pages=17,
    page_size=64,
    max_context=2048,
    is_exact=True,
    token="hf_secret",
)


def test_an_order_to_load_from_the_hub_survives_the_wire():
    assert load_order_from_proto(load_order_to_proto(ORDER, EPOCH)) == ORDER


def test_an_order_to_load_from_a_folder_survives_the_wire():
    order = replace(ORDER, source=FolderSource("/models/x", "digest"), checkpoint_service="10.0.0.1:99", token="")
    assert load_order_from_proto(load_order_to_proto(order, EPOCH)) == order


def test_an_order_does_not_print_its_token():
    assert "hf_secret" not in repr(ORDER)


@pytest.mark.parametrize("field", [{"precision": "int3"}, {"end_block": 0}, {"config_json": "{"}])
def test_a_malformed_order_is_refused(field):
    message = load_order_to_proto(ORDER, EPOCH)
    for name, value in field.items():
        setattr(message, name, value)
    with pytest.raises(InvalidRequestError):
        load_order_from_proto(message)


def test_what_a_worker_says_about_itself_survives_the_wire():
    versions = (("spanwise", "0.1.0"), ("torch", "2.13.0"))
    info = WorkerInfo(WorkerId("w3"), "node-a", "10.0.0.3:7100", "cpu", "Xeon", 8, 1, 2**40, "AVX512", 77, versions)
    message = worker_info_to_proto(info)
    assert message.protocol_version == PROTOCOL_VERSION
    assert worker_info_from_proto(message) == info


def test_sizes_survive_the_wire():
    block, head = WeightCount(2_470_000_000, 100_000, 5, 7), WeightCount(num_linear=4)
    sizes = ModelSizes((block, head), (WeightCount(), block), 8, 3, head, (28672, 5), 14336, 186_368)
    assert model_sizes_from_proto(model_sizes_to_proto(sizes)) == sizes


@pytest.mark.parametrize("phase", ["downloading", "converting", "verifying", "loading"])
def test_progress_survives_the_wire(phase):
    progress = LoadProgress(phase, 1, 2**40)
    assert load_progress_from_proto(load_progress_to_proto(progress)) == progress


def test_a_report_survives_the_wire_and_is_marked_as_the_last_message():
    report = LoadedReport(1, 2, "fp32", "bf16", "fp16", 3, 4.0, is_exact=True)
    message = loaded_report_to_proto(report)
    assert isinstance(message, service.LoadSpanResponse)
    assert message.is_loaded
    assert loaded_report_from_proto(message) == report
