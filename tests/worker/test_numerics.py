"""Which dtype a device computes in, and how machines are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.model_spec import Precision
from worker.native.library import library
from worker.numerics import DTYPES, choose_compute_dtype, has_native_bf16, isa


@pytest.mark.parametrize(
    ("precision", "device", "is_bf16_native", "expected"),
    [
        (Precision.FP32, "cpu", True, torch.float32),
        (Precision.BF16, "cpu", False, torch.float32),
        (Precision.BF16, "cpu", True, torch.bfloat16),
        (Precision.FP16, "cpu", True, torch.float32),
        (Precision.FP16, "cuda", False, torch.float16),
        (Precision.BF16, "cuda", False, torch.bfloat16),
        (Precision.FP32, "cuda", False, torch.float32),
        (Precision.NF4, "cpu", True, torch.bfloat16),
        (Precision.NF4, "cpu", False, torch.float32),
        (Precision.INT8, "cpu", True, torch.float32),
        (Precision.NF4, "cuda", False, torch.bfloat16),
        (Precision.INT8, "cuda", False, torch.bfloat16),
    ],
)
def test_compute_dtype_follows_what_the_device_does_well(
    precision: Precision, device: str, is_bf16_native: bool, expected: torch.dtype
) -> None:
    assert choose_compute_dtype(precision, torch.device(device), is_bf16_native=is_bf16_native) == expected


def test_the_setting_decides_the_compute_dtype() -> None:
    for asked, expected in DTYPES.items():
        chosen = choose_compute_dtype(Precision.NF4, torch.device("cpu"), is_bf16_native=True, asked=asked)
        assert chosen == expected


def test_isa_names_instructions_and_vendor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nvendor_id : GenuineIntel\nvendor_id : GenuineIntel\n")
    words = isa(torch.device("cpu"), cpuinfo).split()
    assert words[0] == torch.backends.cpu.get_cpu_capability().lower()
    assert words[-1] == "GenuineIntel"
    assert ("bf16" in words) == has_native_bf16()
    assert ("kernels" in words) == (library() is not None)


def test_isa_falls_back_on_the_machine_type_where_no_vendor_is_named(tmp_path: Path) -> None:
    assert isa(torch.device("cpu"), tmp_path / "absent").split()[-1]
