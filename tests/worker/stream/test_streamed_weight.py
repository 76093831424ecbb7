"""A weight read through the ring is the weight that was written, whatever its kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.model_spec import Precision
from tests.worker.stream.disk import PLAN
from worker.quantization.encode import encode
from worker.store.folder import BlockStore
from worker.store.layout import WeightSpec, plan_part
from worker.store.reader import PartFile
from worker.store.writer import write_part
from worker.stored_weight import hold
from worker.stream.readers import Readers
from worker.stream.ring import ReadCounters, SliceRing
from worker.stream.streamed_file import StreamedFile, slice_extents
from worker.stream.streamed_weight import StreamedWeight

SHAPES = ((192, 320), (64, 320), (320, 64))


@pytest.mark.parametrize("kind", list(Precision))
def test_pieces_are_views_of_what_was_written(tmp_path: Path, kind: Precision) -> None:
    torch.manual_seed(0)
    specs = [WeightSpec(f"w{i}", kind, shape) for i, shape in enumerate(SHAPES)]
    plan = plan_part("block-0001", kind, {}, specs, 48 << 10)
    store = BlockStore(tmp_path, "k")
    store.folder.mkdir()
    manifest = write_part(store, plan, {}, (encode(s.name, torch.randn(s.shape), kind) for s in specs))
    file = StreamedFile("block-0001", store.path("block-0001"), is_direct=False)
    extents = slice_extents(manifest, file)
    readers = Readers(PLAN)
    slot = max(extent.num_bytes for extent in extents)
    ring = SliceRing(readers, ReadCounters(), ring_bytes=3 * slot, slot_bytes=slot)
    ring.set_order(extents)
    with PartFile(store, "block-0001") as stored:
        weights = [StreamedWeight(place, stored.read_weight_small(place), extents, ring) for place in manifest.weights]
        for _ in range(3):
            for weight, place in zip(weights, manifest.weights, strict=True):
                expected = hold(stored.open_weight(place))
                assert (weight.name, weight.kind, weight.shape) == (expected.name, kind, expected.shape)
                assert weight.small.keys() == expected.small.keys()
                for piece, held in zip(weight.pieces(), expected.pieces(), strict=True):
                    assert (piece.first_row, piece.num_rows) == (held.first_row, held.num_rows)
                    assert all(torch.equal(piece.tensors[role], held.tensors[role]) for role in held.tensors)
    assert len(extents) > 1
    readers.close()
    file.close()
