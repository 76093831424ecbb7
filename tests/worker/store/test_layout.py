from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigurationError
from cluster.model_spec import Precision
from worker.store.layout import TensorSpec, WeightSpec, piece_specs, plan_part, small_specs
from worker.store.manifest import ALIGNMENT, SLICE_BYTES, SMALL_ALIGNMENT, PartManifest
from worker.store.part_bytes import tensors_of

TEST_SLICE_BYTES = 64 << 10

shapes = st.tuples(st.integers(1, 700), st.integers(1, 90))
weights = st.lists(st.tuples(shapes, st.sampled_from([None, None, 0, 1, 2])), max_size=7).map(
    lambda found: [WeightSpec(f"w{n}", Precision.INT8, shape, expert) for n, (shape, expert) in enumerate(found)]
)
smalls = st.dictionaries(
    st.text("abc", min_size=1), st.builds(TensorSpec, st.sampled_from(["F32", "BF16"]), st.tuples(st.integers(0, 99)))
)


def with_kind(specs: list[WeightSpec], kind: Precision) -> list[WeightSpec]:
    return [WeightSpec(spec.name, kind, spec.shape, spec.expert) for spec in specs]


def check_bytes(plan: PartManifest) -> None:
    """Nothing overlaps or leaves the file; everything is aligned; slices tile what follows the leading segment."""
    places = sorted((place.offset, place.offset + place.num_bytes) for _, place in tensors_of(plan) if place.num_bytes)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert all(end <= plan.file_bytes for _, end in places)
    bounds = [(place.offset, place.offset + place.num_bytes) for place in plan.slices]
    ends = [plan.small_bytes, *(end for _, end in bounds)]
    assert [start for start, _ in bounds] == ends[:-1]
    assert ends[-1] == plan.file_bytes
    assert all(bound % ALIGNMENT == 0 for bound in ends)
    assert all(0 < place.num_bytes <= TEST_SLICE_BYTES for place in plan.slices)


def check_weights(plan: PartManifest, specs: list[WeightSpec]) -> None:
    """Every row is in one piece; each piece in one slice, in order of use; a slice has pieces of one expert."""
    assert [(place.name, place.shape) for place in plan.weights] == [(spec.name, spec.shape) for spec in specs]
    pieces = [(spec, piece) for place, spec in zip(plan.weights, specs, strict=True) for piece in place.pieces]
    offsets = [place.offset for _, piece in pieces for place in piece.tensors.values()]
    assert offsets == sorted(offsets)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    for place in plan.weights:
        rows = [row for piece in place.pieces for row in range(piece.first_row, piece.first_row + piece.num_rows)]
        assert rows == list(range(place.shape[0]))
    for spec, piece in pieces:
        home = plan.slices[piece.slice_index]
        assert home.expert == spec.expert
        for found in piece.tensors.values():
            assert home.offset <= found.offset
            assert found.offset + found.num_bytes <= home.offset + home.num_bytes


@given(smalls, weights, st.sampled_from(list(Precision)))
def test_tensors_tile_the_file(small: dict[str, TensorSpec], specs: list[WeightSpec], kind: Precision) -> None:
    specs = with_kind(specs, kind)
    plan = plan_part("block-0000", kind, small, specs, TEST_SLICE_BYTES)
    check_bytes(plan)
    check_weights(plan, specs)
    assert set(plan.small) == set(small)
    assert all(place.offset % SMALL_ALIGNMENT == 0 for place in plan.small.values())
    assert all(place.offset + place.num_bytes <= plan.small_bytes for place in plan.small.values())


@given(shapes, st.sampled_from(list(Precision)))
def test_pieces_together_hold_what_the_whole_weight_does(shape: tuple[int, int], kind: Precision) -> None:
    (weight,) = plan_part("head", kind, {}, [WeightSpec("w", kind, shape)], TEST_SLICE_BYTES).weights
    for role, whole in piece_specs(kind, *shape).items():
        assert sum(piece.tensors[role].num_bytes for piece in weight.pieces) == whole.num_bytes
    if kind is Precision.NF4:
        assert all(piece.num_rows * shape[1] % 64 == 0 for piece in weight.pieces[:-1])


def test_small_tensors_lie_in_the_order_of_their_names_whatever_the_order_given() -> None:
    small = {"b": TensorSpec("F32", (3,)), "a": TensorSpec("BF16", (5,))}
    plans = [plan_part("head", Precision.BF16, dict(order), []) for order in (small.items(), reversed(small.items()))]
    assert plans[0] == plans[1]


def test_a_large_weight_is_cut_into_few_pieces_of_nearly_equal_size() -> None:
    """BLOOM-176B's largest weight."""
    (weight,) = plan_part("b", Precision.INT8, {}, [WeightSpec("mlp", Precision.INT8, (57344, 14336))]).weights
    rows = [piece.num_rows for piece in weight.pieces]
    assert len(rows) == -(-57344 * 14336 // SLICE_BYTES)
    assert max(rows) - min(rows) <= 64
    assert all(count % 64 == 0 for count in rows)


def test_an_experts_slices_are_its_own_and_lie_together() -> None:
    specs = [WeightSpec(f"e{number}.{name}", Precision.INT8, (64, 64), number) for number in (0, 1) for name in "abc"]
    plan = plan_part("b", Precision.INT8, {}, [WeightSpec("q", Precision.INT8, (64, 64)), *specs])
    assert [place.expert for place in plan.slices] == [None, 0, 1]


def test_nf4_has_its_absmax_in_the_slice_of_its_codes() -> None:
    plan = plan_part("b", Precision.NF4, {}, [WeightSpec("q", Precision.NF4, (4096, 64))], TEST_SLICE_BYTES)
    for piece in plan.weights[0].pieces:
        assert set(piece.tensors) == {"weight", "absmax"}
    assert len(plan.slices) == len(plan.weights[0].pieces) > 1


def test_the_scales_of_a_weight_are_small_tensors() -> None:
    assert small_specs(Precision.INT8, (7, 5)) == {"scale": TensorSpec("F32", (7,))}
    assert small_specs(Precision.NF4, (1024, 64))["nested_absmax"].shape == (4,)
    assert small_specs(Precision.BF16, (7, 5)) == {}


def test_a_row_longer_than_a_slice_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"mlp\.up has rows of 70,000 parameters"):
        plan_part("b", Precision.INT8, {}, [WeightSpec("mlp.up", Precision.INT8, (2, 70_000))], TEST_SLICE_BYTES)
