"""Quantized matrices of GGUF files in the order of the kernels: the numbers are those that `gguf` unpacks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_files import quantized, random_blocks

from dovetail_plugin.errors import InputError
from dovetail_plugin.kernels.gguf_blocks import BLOCK_TYPES, repack
from dovetail_plugin.kernels.library import packed_bytes
from dovetail_plugin.kernels.packing import unpack

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.one_environment("depends on neither transformers nor an engine")


def reference(blocks: torch.Tensor, type_name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[type_name]))


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 70),
    blocks=st.integers(1, 3),
    type_name=st.sampled_from(list(BLOCK_TYPES)),
    in_order=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_numbers_are_those_of_the_file(outputs, blocks, type_name, in_order, seed):
    torch.manual_seed(seed)
    found = BLOCK_TYPES[type_name]
    inputs = blocks * found.weights
    raw = random_blocks(type_name, outputs, inputs)
    order = None if in_order else torch.randperm(outputs)
    packed = repack(raw, type_name, order)
    assert packed.shape == (packed_bytes(outputs, inputs, found.kind),)
    right = reference(raw, type_name)
    assert torch.equal(unpack(packed, outputs, inputs, found.kind), right if order is None else right[order])


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_many_rows_are_packed_in_parts(type_name, monkeypatch):
    raw = random_blocks(type_name, 100, 256)
    whole = repack(raw, type_name)
    monkeypatch.setattr("dovetail_plugin.kernels.gguf_blocks.ROWS_AT_ONCE", 32)
    assert torch.equal(repack(raw, type_name), whole)
    order = torch.randperm(100)
    assert torch.equal(repack(raw, type_name, order), repack(raw[order], type_name))


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_blocks_of_the_tests_are_near_the_weights(type_name):
    """The tests' own encoder is an independent one: what it writes, `gguf` and the kernels read alike."""
    torch.manual_seed(0)
    weights = torch.randn(20, 512)
    blocks = torch.from_numpy(quantized(weights, type_name))
    error = (reference(blocks, type_name) - weights).std()
    assert error < {"Q8_0": 0.01, "Q6_K": 0.03, "Q4_K": 0.1, "Q4_0": 0.12}[type_name]


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_damaged_blocks_are_refused(type_name):
    raw = random_blocks(type_name, 20, 256)
    with pytest.raises(InputError, match="are not blocks"):
        repack(raw[:, :-1], type_name)
    at = 208 if type_name == "Q6_K" else 0
    raw[3, at : at + 2] = torch.tensor([torch.inf]).half().view(torch.uint8)
    with pytest.raises(InputError, match="infinite or NaN"):
        repack(raw, type_name)
