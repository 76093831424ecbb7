"""What a part's file holds and where: the versioned manifest that is written after it.

A part is a block ("block-0007"), the head with the final norm ("head"), or the embedding with what follows it
("embedding"). Its file begins with a segment of all small tensors; then come slices, each of pieces of weights in order
of use, every tensor 4096-aligned. A slice is what the ring reads at once: pieces of one weight or of several, at most
SLICE_BYTES, and never of two experts. The same checkpoint, precision and version give the same bytes on every machine.

Covers values and their JSON; `worker.store.layout` decides where tensors lie.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from cluster.errors import ConfigurationError, StorageError
from cluster.load_order import SLICE_BYTES as SLICE_BYTES  # the coordinator plans with it

FORMAT_VERSION = 1
ALIGNMENT = 4096
SMALL_ALIGNMENT = 64  # of tensors in the leading segment, which is read whole


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor's bytes in the part's file."""

    dtype: str  # "F32", "BF16", "F16", "I8" or "U8", as safetensors names them
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file
    num_bytes: int
    checksum: str  # XXH3-128 of these bytes, in hexadecimal; empty in a plan


@dataclass(frozen=True, slots=True)
class PiecePlace:
    """Adjacent rows of a weight. All of its tensors lie in one slice."""

    first_row: int
    num_rows: int
    slice_index: int
    tensors: Mapping[str, TensorPlace]  # by role, see worker.stored_weight


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """One linear layer's weight."""

    name: str  # within the part, like "self_attn.q_proj"
    kind: str  # a Precision's value
    shape: tuple[int, int]  # (out, in)
    small: Mapping[str, TensorPlace]  # by role, in the leading segment
    pieces: tuple[PiecePlace, ...]


@dataclass(frozen=True, slots=True)
class SlicePlace:
    """Adjacent bytes that are read at once. `expert` is the number of the expert they belong to, or None."""

    offset: int
    num_bytes: int  # a multiple of ALIGNMENT: the file is padded
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class PartManifest:
    """One part."""

    part: str
    precision: str
    file_bytes: int
    small_bytes: int  # of the leading segment, a multiple of ALIGNMENT
    small: Mapping[str, TensorPlace]  # norms and other small tensors of the part, by their names in it
    weights: tuple[WeightPlace, ...]  # in order of use
    slices: tuple[SlicePlace, ...] = field(default=())
    version: int = FORMAT_VERSION

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a pass reads when the part is streamed."""
        return sum(place.num_bytes for place in self.slices)

    def weight(self, name: str) -> WeightPlace:
        """Return a weight by its name. Raises StorageError."""
        for place in self.weights:
            if place.name == name:
                return place
        raise StorageError(f"{self.part} of the block store holds no weight {name}: it belongs to another model")


def to_json(manifest: PartManifest) -> bytes:
    """Return the manifest's file: equal manifests give equal bytes."""
    body = asdict(manifest)
    version = body.pop("version")
    document = {"version": version, "checksum": _checksum(body, version), "manifest": body}
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def from_json(text: bytes, label: str) -> PartManifest:
    """Parse a manifest's file, which `label` names in messages.

    Raises ConfigurationError for another version, StorageError for anything that no version's `to_json` wrote.
    """
    try:
        document = json.loads(text)
        version, body = document["version"], document["manifest"]
        if document["checksum"] != _checksum(body, version):
            raise StorageError(f"{label} is damaged: its checksum is wrong")
        require_version(version, label)
        return _manifest(body, version)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{label} is damaged: it is empty, cut short or no manifest") from error


def require_version(version: int, label: str) -> None:
    """Raise ConfigurationError unless this program reads `version`: nothing is converted again unasked."""
    if version != FORMAT_VERSION:
        raise ConfigurationError(
            f"{label} was made by another version of Spanwise (its format is {version}, this one reads "
            f"{FORMAT_VERSION}): convert again with `cluster convert`, or prune it with `cluster store prune`"
        )


def _checksum(body: Mapping[str, Any], version: int) -> str:
    """Return the checksum of a manifest, whose seed is its version's: another version with it is damage."""
    return xxhash.xxh3_128_hexdigest(json.dumps(body, separators=(",", ":")).encode(), seed=version - 1)


def _manifest(body: dict[str, Any], version: int) -> PartManifest:
    body["small"] = _tensors(body["small"])
    body["weights"] = tuple(_weight(weight) for weight in body["weights"])
    body["slices"] = tuple(SlicePlace(**place) for place in body["slices"])
    return PartManifest(**body, version=version)


def _weight(fields: dict[str, Any]) -> WeightPlace:
    num_rows, num_columns = fields.pop("shape")
    pieces = tuple(PiecePlace(**piece | {"tensors": _tensors(piece["tensors"])}) for piece in fields.pop("pieces"))
    small = _tensors(fields.pop("small"))
    return WeightPlace(**fields, shape=(num_rows, num_columns), small=small, pieces=pieces)


def _tensors(fields: Mapping[str, dict[str, Any]]) -> dict[str, TensorPlace]:
    return {name: TensorPlace(**place | {"shape": tuple(place["shape"])}) for name, place in fields.items()}
