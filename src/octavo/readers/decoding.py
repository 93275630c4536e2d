"""From stored codes to values, in numpy: a second opinion on what the formats mean, written without the first."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from octavo.errors import UserError

_FLOATS = {
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn, "e2m1": ml_dtypes.float4_e2m1fn, "e8m0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
_FLOAT_BITS = {"e4m3": 8, "e5m2": 8, "e8m0": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4}
_WIDE = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_INTEGER = re.compile(r"(u?)int([2-8])(-narrow)?")
_NF4 = np.array(  # QLoRA, arXiv:2305.14314, appendix E
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def _dynamic8() -> np.ndarray:
    """Dettmers, arXiv:1511.04561: each decade below 1 in twice as many equal parts as the one before, their middles."""
    edges = [np.linspace(0.1, 1, 2**decade + 1) * 10.0 ** (decade - 6) for decade in range(7)]
    middles = np.concatenate([(parts[:-1] + parts[1:]) / 2 for parts in edges])
    return np.sort(np.concatenate([-middles, middles, [0.0, 1.0]])).astype(np.float32)


_CODEBOOKS = {"nf4": _NF4, "dynamic8": _dynamic8()}


Element = str | Mapping[str, Any]
"""A known element's name, or a user's codebook: ``{"name": ..., "values": [...]}``."""


def decode_element(stored: np.ndarray, element: Element, shape: tuple[int, ...]) -> np.ndarray:
    """Values of packed codes, fp32, of ``shape``.

    Args:
        stored: Rows of codes as a little-endian bit stream, uint8; 16 and 32 bit elements as they are.
        element: Which element format.
        shape: What the codes become.

    Raises:
        UserError: an unknown element, or another amount of codes than ``shape`` needs.
    """
    if not isinstance(element, str):
        codes = unpack_bits(stored, element_bits(element), shape)
        if codes.max(initial=0) >= len(element["values"]):
            raise UserError(f"a code beyond the {len(element['values'])} values of codebook {element_name(element)!r}")
        return np.asarray(element["values"], np.float32)[codes]
    if element in _WIDE:
        if stored.dtype != _WIDE[element] or stored.shape != shape:
            raise UserError(f"{stored.dtype} {stored.shape} where {element} {shape} was expected")
        return stored.astype(np.float32)
    bits = element_bits(element)
    codes = unpack_bits(stored, bits, shape)
    if element in _FLOATS:
        return codes.view(_FLOATS[element]).astype(np.float32)
    if element in _CODEBOOKS:
        return np.asarray(_CODEBOOKS[element][codes])
    unit = np.float32(2.0**-6 if element == "mxint8-element" else 1)
    integers = codes if element.startswith("u") else sign_extend(codes, bits)
    return integers.astype(np.float32) * unit


def element_name(element: Element) -> str:
    """What messages call it."""
    return element if isinstance(element, str) else str(element["name"])


def element_bits(element: Element) -> int:
    """Bits of one code.

    Raises:
        UserError: an unknown element.
    """
    if not isinstance(element, str):
        if not 2 <= len(element["values"]) <= 256:
            raise UserError(f"codebook {element_name(element)!r} has {len(element['values'])} values")
        return (len(element["values"]) - 1).bit_length()
    integer = _INTEGER.fullmatch(element)
    if integer is not None:
        return int(integer[2])
    known = {**_FLOAT_BITS, "nf4": 4, "dynamic8": 8, "mxint8-element": 8, "fp32": 32, "fp16": 16, "bf16": 16}
    if element not in known:
        raise UserError(f"unknown element format {element!r}")
    return known[element]


def unpack_bits(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Codes of ``shape`` from rows of bytes: bit ``k * bits`` of a row is the lowest of code ``k``."""
    width = shape[-1] if shape else 1
    expected = (*shape[:-1], math.ceil(width * bits / 8)) if shape else ()
    if packed.dtype != np.uint8 or packed.shape != expected:
        raise UserError(
            f"{packed.dtype} {packed.shape} where uint8 {expected} was expected, codes of {bits} bits for {shape}"
        )
    if bits == 8:
        return packed
    stream = np.unpackbits(np.atleast_1d(packed), axis=-1, bitorder="little")[..., : width * bits]
    return np.packbits(stream.reshape(*stream.shape[:-1], width, bits), axis=-1, bitorder="little").reshape(shape)


def sign_extend(codes: np.ndarray, bits: int) -> np.ndarray:
    """Two's complement of ``bits`` bits, as int8."""
    shifted = (codes << (8 - bits)).view(np.int8)
    return np.right_shift(shifted, 8 - bits, dtype=np.int8)


def scale_shape(granularity: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a tensor of ``shape``.

    Raises:
        UserError: an unknown granularity.
    """
    match granularity:
        case {"kind": "tensor"}:
            return ()
        case {"kind": "channel", "axis": int(axis)}:
            return shape[: axis % len(shape) + 1] if len(shape) > 1 else shape
        case {"kind": "token"} if shape:
            return shape[:-1]
        case {"kind": "group", "size": int(size)} if size > 0 and shape:
            return (*shape[:-1], math.ceil(shape[-1] / size))
        case {"kind": "tile", "rows": int(rows), "cols": int(cols)} if rows > 0 and cols > 0 and len(shape) > 1:
            return (*shape[:-2], math.ceil(shape[-2] / rows), math.ceil(shape[-1] / cols))
        case {"kind": "flat-group", "size": int(size)} if size > 0:
            return (math.ceil(math.prod(shape) / size),)
        case _:
            raise UserError(f"unknown granularity {dict(granularity)!r}")


def spread_scale(scale: np.ndarray, granularity: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """``scale`` so that it multiplies a tensor of ``shape``: each block's scale beside each of its values."""
    expected = scale_shape(granularity, shape)
    if scale.shape != expected:
        raise UserError(f"scales of shape {scale.shape} where {expected} was expected for values of {shape}")
    match granularity["kind"]:
        case "group":
            return np.repeat(scale, granularity["size"], axis=-1)[..., : shape[-1]]
        case "tile":
            tall = np.repeat(scale, granularity["rows"], axis=-2)[..., : shape[-2], :]
            return np.repeat(tall, granularity["cols"], axis=-1)[..., : shape[-1]]
        case "flat-group":
            return np.repeat(scale, granularity["size"])[: math.prod(shape)].reshape(shape)
        case _:
            return scale.reshape(*scale.shape, *(1 for _ in shape[scale.ndim :]))
