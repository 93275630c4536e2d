"""What the weights of the ModelOpt layout mean, label by label. docs/formats/modelopt.md is the specification.

A weight lies with its outputs first, ``(out, in, kernel ...)``, or transposed, ``(in, out)``: its scales' shape tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import ml_dtypes
import numpy as np

from octavo.errors import UserError
from octavo.readers.checkpoint import WeightEntry
from octavo.readers.decoding import sign_extend
from octavo.readers.tensor_files import StoredTensor

INT4_LABELS = ("W4A16_AWQ", "W4A8_AWQ")
NVFP4_LABELS = ("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_AWQ", "NVFP4_SVD")
MXFP4_LABELS = ("MXFP4", "W4A8_MXFP4_FP8")
_TILE = 128

Scales = Mapping[str, StoredTensor]
Shape = tuple[int, ...]
_Decode = Callable[[], np.ndarray]


def weight_entry(codes: StoredTensor, scales: Scales, label: str) -> WeightEntry:
    """How to read a weight; one that does not fit is listed, and refused when its values are asked for.

    Args:
        codes: The stored codes.
        scales: ``weight_scale`` and what else lies beside it.
        label: Its ``quant_algo``.
    """
    try:
        text, shape, decode = _meaning(codes, scales, label)
    except UserError as error:
        text, shape, decode = label, codes.shape, partial(_refuse, str(error))
    return WeightEntry(
        codes.name,
        text,
        shape,
        codes,
        scales,
        decode,
        real_scales={scale.name: partial(_read_scale, scale) for scale in scales.values()},
        has_signed_scales=label in INT4_LABELS,
    )


def _meaning(codes: StoredTensor, scales: Scales, label: str) -> tuple[str, Shape, _Decode]:
    scale = scales["weight_scale"]
    if codes.dtype == "U8":
        return _four_bits(codes, scales, label)
    if label == "MXFP8" or scale.dtype == "U8":
        _check_dtype(scale, "U8")
        group, is_transposed = _groups(codes, scale, codes.shape)
        decode = partial(_decode_groups, codes, scales, is_transposed=is_transposed)
        return f"e4m3 groups of {group}, scales e8m0", codes.shape, decode
    _check_dtype(scale, "F32")
    if label == "FP8_PB_WO":
        return f"e4m3 tiles of {_TILE}x{_TILE}", codes.shape, partial(_decode_tiles, codes, scale)
    element = "e4m3" if codes.dtype == "F8_E4M3" else "int8"
    granularity = "per tensor" if scale.shape == () else "per channel"
    return f"{element} {granularity}", codes.shape, partial(_decode_rows, codes, scale)


def _four_bits(codes: StoredTensor, scales: Scales, label: str) -> tuple[str, Shape, _Decode]:
    """Two codes in a byte: INT4 packed along the outputs, FP4 along the inputs."""
    scale = scales["weight_scale"]
    if label in INT4_LABELS:
        _check_dtype(scale, "F32")
        axis = _packed_rows_axis(codes.shape, scale)
        shape = tuple(2 * size if number == axis else size for number, size in enumerate(codes.shape))
        group = math.prod(shape) // max(1, math.prod(scale.shape))
        return f"int4 groups of {group}", shape, partial(_decode_int4, codes, scale, axis)
    if label not in NVFP4_LABELS + MXFP4_LABELS:
        raise _misfit(codes, scale, f"{label} is not read by this version")
    if not codes.shape:
        raise _misfit(codes, scale, "two axes were expected")
    widened = (*codes.shape[:-1], 2 * codes.shape[-1])
    group, is_transposed = _groups(codes, scale, widened)
    shape = (2 * codes.shape[0], *codes.shape[1:]) if is_transposed else widened
    decode = partial(_decode_groups, codes, scales, is_transposed=is_transposed)
    if label in MXFP4_LABELS:
        _check_dtype(scale, "U8")
        return f"e2m1 groups of {group}, scales e8m0", shape, decode
    _check_dtype(scale, "F8_E4M3")
    if "weight_scale_2" not in scales:
        raise _misfit(codes, scale, f"{label} has a weight_scale_2 beside it, and there is none")
    return f"e2m1 groups of {group}, scales e4m3 per tensor", shape, decode


def _groups(codes: StoredTensor, scale: StoredTensor, shape: Shape) -> tuple[int, bool]:
    """Group size, and whether inputs come first; ``shape`` is that of the values if they do not."""
    if len(codes.shape) > 1 and len(scale.shape) == 2 and 0 not in scale.shape:
        width, per_byte = math.prod(shape[1:]), shape[-1] // max(1, codes.shape[-1])
        if scale.shape[0] == codes.shape[0] and width % scale.shape[1] == 0:
            return width // scale.shape[1], False
        height = per_byte * codes.shape[0]
        if len(codes.shape) == 2 and scale.shape[1] == codes.shape[1] and height % scale.shape[0] == 0:
            return height // scale.shape[0], True
    raise _misfit(codes, scale, "(out_features, groups) was expected")


def _packed_rows_axis(codes: Shape, scale: StoredTensor) -> int:
    """0 for scales ``(out_features, groups)``, 1 for the transposed ``(groups, out_features)``."""
    groups = scale.shape
    if len(codes) > 1 and len(groups) == 2 and 0 not in groups:
        if groups[0] == 2 * codes[0] and math.prod(codes[1:]) % groups[1] == 0:
            return 0
        if len(codes) == 2 and groups[1] == 2 * codes[1] and codes[0] % groups[0] == 0:
            return 1
    raise UserError(f"int4 codes of shape {codes} do not fit scales of shape {groups}")


def _decode_rows(codes: StoredTensor, scale: StoredTensor) -> np.ndarray:
    """Codes times one scale, or one for each index of the first axis or of the axis the scale's shape shows."""
    factors = _read_scale(scale)
    if factors.ndim == 1 and len(codes.shape) > 1 and factors.shape[0] == codes.shape[0]:
        factors = factors.reshape(-1, *(1 for _ in codes.shape[1:]))
    fits = factors.ndim in (0, len(codes.shape)) and all(
        size in (1, whole) for size, whole in zip(factors.shape, codes.shape, strict=False)
    )
    if not fits:
        raise _misfit(codes, scale, "(), (out_features,) or one size per axis was expected")
    values: np.ndarray = codes.read().astype(np.float32) * factors
    return values


def _decode_tiles(codes: StoredTensor, scale: StoredTensor) -> np.ndarray:
    """One scale for every tile of 128 x 128, in the shape ``(rows, 1, columns, 1)``."""
    rows, columns = codes.shape[0] if codes.shape else 1, math.prod(codes.shape[1:])
    tall, wide = math.ceil(rows / _TILE), math.ceil(columns / _TILE)
    if len(codes.shape) < 2 or scale.shape not in ((tall, 1, wide, 1), (tall, wide)):
        raise _misfit(codes, scale, f"({tall}, 1, {wide}, 1) was expected")
    factors = _read_scale(scale).reshape(tall, wide)
    spread = np.repeat(np.repeat(factors, _TILE, axis=0)[:rows], _TILE, axis=1)[:, :columns]
    values: np.ndarray = codes.read().astype(np.float32) * spread.reshape(codes.shape)
    return values


def _decode_groups(codes: StoredTensor, scales: Scales, *, is_transposed: bool) -> np.ndarray:
    """Codes times the scale of their group of inputs; FP4 lies two to a byte, the even input in the low nibble."""
    stored, factors = codes.read(), _group_scales(scales)
    if is_transposed:
        stored, factors = stored.T, factors.T
    if codes.dtype == "U8":
        nibbles = np.stack([stored & 15, stored >> 4], axis=-1)
        stored = nibbles.reshape(*stored.shape[:-1], 2 * stored.shape[-1]).view(ml_dtypes.float4_e2m1fn)
    values = stored.astype(np.float32)
    group = math.prod(values.shape[1:]) // factors.shape[1]
    scaled = (values.reshape(*factors.shape, group) * factors[..., None]).reshape(values.shape)
    return np.ascontiguousarray(scaled.T) if is_transposed else scaled


def _group_scales(scales: Scales) -> np.ndarray:
    """Scales of groups, times the tensor's where there is one."""
    factors = _read_scale(scales["weight_scale"])
    second = scales.get("weight_scale_2")
    if second is None:
        return factors
    if second.dtype != "F32" or math.prod(second.shape) != 1:
        raise UserError(f"scale {second.name!r} is {second.dtype} {second.shape}; one F32 was expected")
    product: np.ndarray = factors * second.read().reshape(())
    return product


def _decode_int4(codes: StoredTensor, scale: StoredTensor, axis: int) -> np.ndarray:
    """Two rows in a byte, the even one in the low nibble, two's complement; scales over groups of inputs."""
    packed, factors = codes.read(), _read_scale(scale)
    if axis == 1:
        packed, factors = packed.T, factors.T
    rows = np.stack([packed & 15, packed >> 4], axis=1).reshape(2 * packed.shape[0], -1)
    groups = sign_extend(rows, 4).astype(np.float32).reshape(*factors.shape, -1)
    values = (groups * factors[..., None]).reshape(2 * packed.shape[0], *packed.shape[1:])
    return np.ascontiguousarray(values.T) if axis == 1 else values


def _read_scale(scale: StoredTensor) -> np.ndarray:
    """Real values, fp32; a scale in U8 is a power of two."""
    values = scale.read()
    return (values.view(ml_dtypes.float8_e8m0fnu) if scale.dtype == "U8" else values).astype(np.float32)


def _check_dtype(scale: StoredTensor, dtype: str) -> None:
    if scale.dtype != dtype:
        raise UserError(f"scale {scale.name!r} is {scale.dtype}; {dtype} was expected")


def _misfit(codes: StoredTensor, scale: StoredTensor, reason: str) -> UserError:
    return UserError(
        f"weight {codes.name!r}: scales {scale.dtype} of shape {scale.shape} do not fit codes {codes.dtype} of shape "
        f"{codes.shape}: {reason}"
    )


def _refuse(message: str) -> np.ndarray:
    raise UserError(message)
