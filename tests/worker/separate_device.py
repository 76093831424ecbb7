"""A process in which torch has a second device, so that stages for GPUs run without one.

Its tensors are a CPU's inside, but whatever mixes them with tensors of the CPU fails, as on a GPU; copies are as late
as they may be. Run it with a name of `tests.checkpoints` and a precision: it compares a streamed stage with a resident
one, bit for bit. A process of its own, since torch's registration of devices holds for all of it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.utils.backend_registration
from torch import Tensor
from torch.utils._pytree import tree_map

torch.utils.backend_registration._setup_privateuseone_for_python_backend("separate")  # type: ignore[attr-defined]
torch.inference_mode = torch.no_grad  # type: ignore[misc,assignment]  # tensors with content elsewhere know no other
DEVICE = torch.device("separate:0")
MOVES = ("aten::copy_", "aten::_to_copy")


class SeparateTensor(Tensor):
    """A tensor of the device."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> SeparateTensor:
        places = {"strides": content.stride(), "storage_offset": content.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, content.size(), **places, dtype=content.dtype, device=DEVICE)
        made.content = content
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        return self.content.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator: Any, _: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return compute(operator, arguments, keywords or {})


def compute(operator: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
    """Compute on contents; the result is the device's, unless it was to be moved away or is a number."""
    name = operator._schema.name
    if name not in MOVES:
        check_devices(name, arguments, keywords)
    target = keywords.get("device")
    inner, inner_keywords = tree_map(content_of, arguments), tree_map(content_of, keywords)
    if target is not None:
        inner_keywords["device"] = torch.device("cpu")
    result = operator(*inner, **inner_keywords)
    if operator._schema.is_mutable and result is inner[0]:
        return arguments[0]
    if target is not None and torch.device(target).type == "cpu":
        return result
    return tree_map(lambda out: SeparateTensor(out) if isinstance(out, Tensor) else out, result)


def check_devices(name: str, *values: Any) -> None:
    """Raise for tensors of the CPU, except numbers and indices, which a GPU's operators take too."""

    def check(value: Any) -> None:
        is_foreign = isinstance(value, Tensor) and not isinstance(value, SeparateTensor) and value.dim() > 0
        if is_foreign and not (name.startswith("aten::index") and value.dtype == torch.int64):
            raise RuntimeError(f"{name} mixes devices: {value.dtype} {tuple(value.shape)} is on the CPU")

    tree_map(check, values)


def content_of(value: Any) -> Any:
    return value.content if isinstance(value, SeparateTensor) else value


def register() -> torch.library.Library:
    """Let torch make tensors on the device."""
    library = torch.library.Library("aten", "IMPL")

    def make(operator: Any) -> Any:
        def allocate(*arguments: Any, **keywords: Any) -> SeparateTensor:
            given = {key: value for key, value in keywords.items() if value is not None}
            return SeparateTensor(operator(*arguments, **given | {"device": torch.device("cpu"), "pin_memory": False}))

        return allocate

    library.impl("empty.memory_format", make(torch.ops.aten.empty.memory_format), "PrivateUse1")
    library.impl("empty_strided", make(torch.ops.aten.empty_strided.default), "PrivateUse1")
    original = torch.tensor

    def tensor(*arguments: Any, device: Any = None, **keywords: Any) -> Tensor:
        made = original(*arguments, **keywords)
        return made if device is None else made.to(device)

    torch.tensor = tensor  # type: ignore[assignment]  # it would leave out the device's operators
    return library


def main(folder: Path, name: str, precision: str) -> None:
    """Raise AssertionError where streaming changes a bit."""
    from cluster.load_order import StoreOptions
    from cluster.model_spec import Precision
    from tests.checkpoints import make_checkpoint
    from tests.worker.pipeline_driver import outputs
    from tests.worker.stream.simulated_device import SimulatedDevice
    from tests.worker.test_stage_on_device import CACHE_BYTES, RING_BYTES, Loads

    class Device(SimulatedDevice):
        def allocate(self, num_bytes: int) -> Tensor:
            return super().allocate(num_bytes).to(DEVICE)

    checkpoint = make_checkpoint(folder / name, name)
    loads = Loads(checkpoint, StoreOptions(store_folder=str(folder / "store")), DEVICE, lambda _: Device())
    changes = (
        {"expert_cache_bytes": CACHE_BYTES} if name == "mixtral" else {"num_streamed": 4, "ring_bytes": RING_BYTES}
    )
    numerics: dict[str, Any] = {"precision": Precision(precision), "compute_dtype": "bf16"}
    (tokens, logits), (streamed_tokens, streamed_logits) = (
        outputs(loads.stage(**numerics, **more)) for more in ({}, changes)
    )
    assert tokens == streamed_tokens
    assert all(isinstance(one, SeparateTensor) for one in logits)
    assert all(torch.equal(content_of(a), content_of(b)) for a, b in zip(logits, streamed_logits, strict=True))
    loads.close()


if __name__ == "__main__":
    kept = register()
    with tempfile.TemporaryDirectory() as made:
        main(Path(made), sys.argv[1], sys.argv[2])
