from dataclasses import fields, replace

import pytest

from cluster.config import ServeConfig, parse_node_sizes, parse_port_range, parse_size
from cluster.errors import ConfigurationError


def test_defaults_are_valid_and_every_setting_is_described():
    ServeConfig(model="bloom-tiny").validate()
    assert all(field.metadata["about"] for field in fields(ServeConfig))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers must be above 0, not 0"),
        ({"step_timeout": -1.0}, "step_timeout must be above 0"),
        ({"inter_token_target": float("nan")}, "inter_token_target must be above 0, not nan"),
        ({"memory": "-1"}, "memory must be a size like 12GiB"),
        ({"gpu_memory": "lots"}, "gpu_memory must be a size like 12GiB"),
        ({"store_quota": -1}, "store_quota must not be negative"),
        ({"outlier_threshold": 0.0}, "outlier_threshold must be above 0"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of auto, fp32, bf16, fp16, not 'int8'"),
        ({"max_context": -5}, "max_context must not be negative"),
        ({"port": 70000}, "port must be between 0 and 65535, not 70000"),
        ({"precision": "int3"}, "precision must be one of auto, fp32, bf16, fp16, int8, nf4, not 'int3'"),
        ({"kv_dtype": "float"}, "kv_dtype must be one of"),
        ({"internal_tls": "yes"}, "internal_tls must be one of auto, on, off"),
        ({"stage_ports": "7100-"}, None),
        ({"stage_ports": "a-b"}, "stage_ports must look like 7100-7110, not 'a-b'"),
        ({"stage_ports": "7110-7100"}, "within 1-65535"),
        ({"stage_ports": "0-10"}, "within 1-65535"),
    ],
)
def test_impossible_value_is_named(changes, message):
    config = replace(ServeConfig(model="m"), **changes)
    if message is None:
        config.validate()
    else:
        with pytest.raises(ConfigurationError, match=message):
            config.validate()


def test_port_ranges():
    assert list(parse_port_range("")) == []
    assert list(parse_port_range("7100")) == [7100]
    assert list(parse_port_range("7100-7102")) == [7100, 7101, 7102]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * 2**30),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("1.5T", 1_500_000_000_000),
        ("2Ki", 2048),
        ("4096", 4096),
        ("0", 0),
        (4096, 4096),
    ],
)
def test_sizes(text, size):
    assert parse_size("memory", text) == size


@pytest.mark.parametrize("text", ["", "lots", "12 XB", "-1GB", "1e9", "GiB", "12GiBs"])
def test_text_that_is_no_size_is_refused_with_examples(text):
    with pytest.raises(ConfigurationError, match="memory must be a size like 12GiB"):
        parse_size("memory", text)


def test_sizes_by_node():
    sizes = parse_node_sizes("memory", "12GiB, bignode=48GiB,10.0.0.7=1GiB")
    assert (sizes.on("other", "10.0.0.1"), sizes.on("bignode", "10.0.0.2")) == (12 * 2**30, 48 * 2**30)
    assert sizes.on("small", "10.0.0.7") == 2**30
    assert parse_node_sizes("memory", "").on("any") == 0
    assert parse_node_sizes("memory", "big=2GiB").on("small") == 0


@pytest.mark.parametrize("text", ["12GiB,13GiB", "big=1GiB,big=2GiB", "=12GiB", "big=", "big=lots", "big"])
def test_sizes_by_node_that_mean_nothing_are_refused(text):
    with pytest.raises(ConfigurationError, match="memory must be a size"):
        parse_node_sizes("memory", text)


@pytest.mark.parametrize("text", ["0", "0.0001KiB", "12GiB,big=0"])
def test_no_memory_at_all_is_refused_instead_of_meaning_the_default(text):
    with pytest.raises(ConfigurationError, match="memory must be above 0"):
        ServeConfig("m", memory=text).validate()
