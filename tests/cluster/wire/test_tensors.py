import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError
from cluster.rpc.v1 import stage_pb2
from cluster.wire.tensors import PIECE_BYTES, PayloadAssembler, pieces_of, specs_to_proto

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def received(tensors):
    """Return what arrives when `tensors` travel."""
    assembler = PayloadAssembler(specs_to_proto(tensors))
    for piece in pieces_of(tensors):
        assembler.add(stage_pb2.TensorPiece.FromString(piece.SerializeToString()))
    assert assembler.is_complete
    return assembler.tensors()


def spec(**changes):
    return stage_pb2.TensorSpec(**({"name": "hidden_states", "dtype": "float32", "shape": [2, 4]} | changes))


def piece(index, offset, size):
    return stage_pb2.TensorPiece(tensor_index=index, offset=offset, data=bytes(size))


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9), st.integers(0, 9)), max_size=4),
    st.randoms(use_true_random=False),
)
def test_tensors_arrive_bit_for_bit(shapes, random):
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    tensors = {
        str(i): torch.randn(rows, columns, generator=generator).to(dtype)
        for i, (dtype, rows, columns) in enumerate(shapes)
    }
    for name, tensor in received(tensors).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_tensor_travels_in_pieces_of_at_most_a_mebibyte(dtype):
    tensors = {"hidden_states": torch.arange(700_001).to(dtype)}
    sizes = [len(piece.data) for piece in pieces_of(tensors)]
    assert max(sizes) == PIECE_BYTES
    assert len(sizes) == -(-tensors["hidden_states"].nbytes // PIECE_BYTES)
    assert torch.equal(received(tensors)["hidden_states"], tensors["hidden_states"])


def test_a_view_of_rows_that_are_not_contiguous_arrives():
    tensors = {"hidden_states": torch.arange(24.0).reshape(4, 6)[:, ::2]}
    assert torch.equal(received(tensors)["hidden_states"], tensors["hidden_states"])


def test_nan_and_infinity_arrive():
    tensors = {"hidden_states": torch.tensor([[float("nan"), float("inf"), -0.0]])}
    arrived = received(tensors)["hidden_states"]
    assert torch.equal(arrived.view(torch.int32), tensors["hidden_states"].view(torch.int32))


@pytest.mark.parametrize("dtype", ["int8", "", "float64"])
def test_an_unknown_dtype_is_refused_by_name(dtype):
    with pytest.raises(InvalidRequestError, match="hidden_states"):
        PayloadAssembler([spec(dtype=dtype)])


def test_an_absurd_shape_is_refused_before_memory_is_taken():
    with pytest.raises(InvalidRequestError, match="larger"):
        PayloadAssembler([spec(shape=[2**31, 2**31])])


def test_many_tensors_may_not_be_absurd_together():
    with pytest.raises(InvalidRequestError, match="larger"):
        PayloadAssembler([spec(name=str(i), shape=[2**30]) for i in range(8)])


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(InvalidRequestError, match="one name"):
        PayloadAssembler([spec(), spec()])


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 4, 4)],  # a gap
        [(0, 0, 4), (0, 0, 4)],  # twice
        [(1, 0, 4)],  # no such tensor
        [(0, 0, 64)],  # too long
        [(0, 0, 0)],  # empty
        [(0, 0, 32), (0, 32, 4)],  # after the end
    ],
)
def test_a_piece_out_of_place_is_refused(pieces):
    assembler = PayloadAssembler([spec()])
    *before, last = (piece(*numbers) for numbers in pieces)
    for good in before:
        assembler.add(good)
    with pytest.raises(InvalidRequestError):
        assembler.add(last)


def test_a_payload_without_tensors_is_complete_at_once():
    assert PayloadAssembler([]).is_complete


def test_it_is_complete_only_with_the_last_byte():
    assembler = PayloadAssembler([spec()])
    assembler.add(piece(0, 0, 28))
    assert not assembler.is_complete
    assembler.add(piece(0, 28, 4))
    assert assembler.is_complete
