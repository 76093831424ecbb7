"""Copies to an NVIDIA GPU: a stream beside the one that computes, and memory of the host that it copies from by itself.

Covers the calls only; their order is `worker.stream.device_source`'s. Never run for want of a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.errors import ConfigurationError
from worker.stream.device_source import Copier, Event


class CudaCopier:
    """The Copier of one GPU. Memory from `allocate` must not be freed before the last copy there is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, num_bytes: int) -> Tensor:
        """See Copier."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> Event:
        """See Copier."""
        return self._record(torch.cuda.current_stream(self._device))

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """See Copier."""
        after.wait(self._stream)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._record(self._stream)

    def pin(self, memory: Tensor) -> None:
        """See Copier. The memory is not allocated by CUDA, so that direct reads find it aligned and of exact size."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(code):
            raise ConfigurationError(
                f"the GPU's driver does not pin {memory.nbytes:,} bytes of this machine's memory, which weights that "
                f"do not fit the GPU pass through: {runtime.cudaGetErrorString(code)}; allow this process more locked "
                "memory, give it a GPU or a precision with which nothing is streamed, or serve with --gpus 0"
            )

    def unpin(self, memory: Tensor) -> None:
        """See Copier."""
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]

    def _record(self, stream: torch.cuda.Stream) -> Event:
        # whoever waits sleeps meanwhile: readers need the processor
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        stream.record_event(event)
        return event


def make_copier(device: torch.device) -> Copier | None:
    """Return what brings streamed weights to a device; None where they are computed with where they were read."""
    return CudaCopier(device) if device.type == "cuda" else None
