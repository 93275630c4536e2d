"""Codes of 1 to 8 bits as a dense stream of bytes.

A row (the last axis) is one little-endian bit stream: the first code sits in the lowest bits of the first
byte, and each row is padded with zero bits to whole bytes. Of two 4-bit codes the even column is the low nibble.
docs/formats/packing.md is the one-page description.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes that hold ``codes``.

    Args:
        codes: ``(..., n)`` int8 or uint8; only the low ``bits`` bits of each count.
        bits: 1 to 8; 8 reinterprets the codes without a copy.

    Returns:
        ``(..., ceil(n * bits / 8))`` uint8.

    >>> pack(torch.tensor([1, -2, 7], dtype=torch.int8), 4).tolist()
    [225, 7]
    """
    _check(bits)
    if bits == 8:
        return codes.view(torch.uint8)
    n, (per_cycle, cycle_bytes) = codes.shape[-1], _cycle(bits)
    filled = pad(codes.view(torch.uint8), (0, -n % per_cycle))
    lanes = filled.reshape(*codes.shape[:-1], filled.shape[-1] // per_cycle, per_cycle)
    out = lanes.new_zeros((*lanes.shape[:-1], cycle_bytes))
    mask = (1 << bits) - 1
    for lane in range(per_cycle):
        byte, shift = divmod(lane * bits, 8)
        # uint8: what does not fit falls off the top, so the lane that ends a byte needs no mask
        code = lanes[..., lane] if shift + bits == 8 else lanes[..., lane].bitwise_and(mask)
        out[..., byte] |= code << shift
        if shift + bits > 8:
            out[..., byte + 1] |= code >> (8 - shift)
    return out.flatten(-2)[..., : math.ceil(n * bits / 8)]


def unpack(packed: Tensor, bits: int, n: int, *, signed: bool) -> Tensor:
    """The codes that ``pack`` packed.

    Args:
        packed: ``(..., ceil(n * bits / 8))`` uint8.
        bits: 1 to 8.
        n: Number of codes in a row.
        signed: Sign-extend to int8; otherwise uint8.

    Returns:
        ``(..., n)`` int8 or uint8.

    >>> unpack(torch.tensor([225, 7], dtype=torch.uint8), 4, 3, signed=True).tolist()
    [1, -2, 7]
    """
    _check(bits)
    if packed.shape[-1] != math.ceil(n * bits / 8):
        raise ValueError(f"{n} codes of {bits} bits take {math.ceil(n * bits / 8)} bytes, not {packed.shape[-1]}")
    if bits == 8:
        return packed.view(torch.int8) if signed else packed
    per_cycle, cycle_bytes = _cycle(bits)
    filled = pad(packed, (0, -packed.shape[-1] % cycle_bytes))
    cycles = filled.reshape(*packed.shape[:-1], filled.shape[-1] // cycle_bytes, cycle_bytes)
    out = cycles.new_empty((*cycles.shape[:-1], per_cycle))
    for lane in range(per_cycle):
        byte, shift = divmod(lane * bits, 8)
        out[..., lane] = cycles[..., byte] >> shift
        if shift + bits > 8:
            out[..., lane] |= cycles[..., byte + 1] << (8 - shift)
    codes = out.flatten(-2)[..., :n].bitwise_and((1 << bits) - 1)
    if not signed:
        return codes
    sign = 1 << (bits - 1)
    return codes.bitwise_xor(sign).sub(sign).view(torch.int8)  # wraps in uint8: two's complement


def _cycle(bits: int) -> tuple[int, int]:
    """After how many codes the stream meets a byte border again, and how many bytes those are."""
    return 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"cannot pack {bits} bits: a code has 1 to 8")
