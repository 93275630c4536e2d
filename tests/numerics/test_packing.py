"""Packed codes: dense, little-endian, and nothing lost."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.numerics.packing import pack, unpack

every_width = pytest.mark.parametrize("bits", range(1, 9))


def random_codes(shape, bits: int, *, signed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int8 if signed else torch.uint8)


@given(st.integers(1, 8), st.booleans(), st.lists(st.integers(0, 9), max_size=2), st.integers(0, 70))
def test_unpacking_gives_back_what_was_packed(bits, signed, lead, n):
    codes = random_codes((*lead, n), bits, signed=signed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, math.ceil(n * bits / 8))
    assert torch.equal(unpack(packed, bits, n, signed=signed), codes)


@every_width
def test_bytes_are_the_little_endian_bit_stream_of_numpy(bits):
    codes = random_codes((3, 21), bits, signed=False).numpy()
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(3, -1)
    theirs = np.packbits(stream, axis=-1, bitorder="little")
    assert np.array_equal(pack(torch.from_numpy(codes), bits).numpy(), theirs)


def test_of_two_nibbles_the_even_column_is_low_as_in_torchao():
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    codes = random_codes((4, 32), 4, signed=False)
    assert torch.equal(pack(codes, 4), kernels.pack_uint4(codes))


@pytest.mark.parametrize("bits", range(2, 9))
def test_int32_words_of_compressed_tensors_hold_the_same_stream(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors")
    codes = random_codes((4, 64), bits, signed=True)
    theirs = helpers.pack_to_int32(codes, bits, packed_dim=1)
    offset = (codes.int() + (1 << (bits - 1))).to(torch.uint8)  # compressed-tensors stores unsigned codes
    assert torch.equal(pack(offset, bits), theirs.contiguous().view(torch.uint8))


@every_width
def test_only_the_low_bits_count(bits):
    codes = random_codes((2, 11), 8, signed=True)
    low = codes.view(torch.uint8) & ((1 << bits) - 1)
    assert torch.equal(pack(codes, bits), pack(low, bits))


@every_width
def test_views_pack_like_their_copies_and_stay_as_they_are(bits):
    codes = random_codes((9, 6), bits, signed=True)
    before = codes.clone()
    assert torch.equal(pack(codes.T, bits), pack(codes.T.contiguous(), bits))
    packed = pack(codes.T, bits)
    assert torch.equal(unpack(packed, bits, 9, signed=True), codes.T)
    assert torch.equal(codes, before)


def test_widths_and_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="1 to 8"):
        pack(torch.zeros(3, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="take 2 bytes, not 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 3, signed=False)
