"""Reads octavo's run directory without any of the code that wrote it. docs/formats/run.md is the specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import UserError
from octavo.readers.checkpoint import ActivationEntry, Checkpoint, ExtraEntry, WeightEntry
from octavo.readers.decoding import decode_element, element_name, scale_shape, spread_scale
from octavo.readers.tensor_files import StoredTensor, open_tensors, read_object

_QUANTIZERS = {
    "input": "input_quantizer", "output": "output_quantizer", "query": "q_bmm_quantizer", "key": "k_bmm_quantizer",
    "value": "v_bmm_quantizer", "softmax": "softmax_quantizer", "attention_output": "bmm2_output_quantizer",
    "key_cache": "k_cache_quantizer", "value_cache": "v_cache_quantizer", "left": "left_quantizer",
    "right": "right_quantizer",
}  # fmt: skip
_LOW_RANK = ("low_rank.a", "low_rank.b")

Tensors = Mapping[str, StoredTensor]


def read(path: Path) -> Checkpoint:
    """The run directory ``path``, listed.

    Raises:
        UserError: not a run directory, or one whose parts do not fit together.
    """
    layout = read_object(path / "layout.json")
    if layout.get("schema") != "octavo.layout/1":
        raise UserError(f"{path / 'layout.json'}: schema {layout.get('schema')!r}, this reader knows 'octavo.layout/1'")
    tensors = open_tensors(path, "quantized")
    try:
        weights = {
            layer["weight"]["key"]: _weight(layer["weight"], tensors) for layer in layout["layers"] if layer["weight"]
        }
        activations = {entry.name: entry for layer in layout["layers"] for entry in _activations(layer, tensors)}
        extras = {entry.name: entry for layer in layout["layers"] for entry in _extras(layer, tensors)}
        rotations = {
            layer["name"]: int(layer["input_rotation"]) for layer in layout["layers"] if layer["input_rotation"]
        }
        claimed = _claimed(layout["layers"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path / 'layout.json'} is damaged ({type(error).__name__}: {error})") from error
    return Checkpoint(
        path,
        "run",
        weights,
        {name: tensor for name, tensor in tensors.items() if not name.startswith(claimed) and name not in extras},
        activations,
        tuple(
            entry.name.rpartition(".")[0]
            for entry in activations.values()
            if entry.scale is None and not entry.is_dynamic and entry.name.endswith(".input_quantizer")
        ),
        _facts(path),
        extras,
        rotations,
    )


def describe(fmt: Mapping[str, Any]) -> str:
    """A tensor format in words."""
    if fmt["scale"] is None:
        return element_name(fmt["element"])
    text = f"{element_name(fmt['element'])} {_describe_granularity(fmt['granularity'])}"
    if fmt["zero_point"]:
        text += ", asymmetric"
    if fmt["offset"]:
        text += ", centred"
        if fmt.get("offset_granularity"):
            text += f" {_describe_granularity(fmt['offset_granularity'])}"
    if fmt["scale_rule"] != "amax":
        text += f", {fmt['scale_rule']}"
    if fmt.get("top"):
        text += f", amax at {fmt['top']:g}"
    if fmt.get("min_scale"):
        text += f", scales from {fmt['min_scale']:g}"
    scales = describe(fmt["scale"])
    return text if scales == "fp32" else f"{text}, scales {scales}"


def dequantize(key: str, fmt: Mapping[str, Any], shape: tuple[int, ...], tensors: Tensors) -> np.ndarray:
    """``scale * (value - zero_point) + offset`` of the tensor called ``key``, fp32, of ``shape``."""
    try:
        values: np.ndarray = decode_element(_part(f"{key}.codes", tensors).read(), fmt["element"], shape)
        if fmt["scale"] is None:
            return values
        granularity = fmt["granularity"]
        blocks = scale_shape(granularity, shape)
        if fmt["zero_point"]:
            stored = _part(f"{key}.zero_point", tensors).read()
            values = values - spread_scale(decode_element(stored, fmt["zero_point"], blocks), granularity, shape)
        values = values * spread_scale(_scales(f"{key}.scale", fmt["scale"], blocks, tensors), granularity, shape)
        if fmt["offset"]:
            centre = fmt.get("offset_granularity") or granularity
            offset = _scales(f"{key}.offset", fmt["offset"], scale_shape(centre, shape), tensors)
            values = values + spread_scale(offset, centre, shape)
        return values
    except UserError as error:
        raise UserError(f"weight {key!r}: {error}") from error


def _scales(key: str, fmt: Mapping[str, Any], shape: tuple[int, ...], tensors: Tensors) -> np.ndarray:
    """Scales are a tensor: plain ones lie under ``key`` itself, others are dequantized in turn."""
    if fmt["scale"] is None and fmt["element"] == "fp32":
        return decode_element(_part(key, tensors).read(), "fp32", shape)
    return dequantize(key, fmt, shape, tensors)


def _weight(layout: Mapping[str, Any], tensors: Tensors) -> WeightEntry:
    key, fmt = layout["key"], layout["format"]
    shape, parameter_shape = _shapes(layout)
    scales = {name.removeprefix(f"{key}."): _part(name, tensors) for name in _scale_names(key, fmt)}

    def decode() -> np.ndarray:
        matrix = dequantize(key, fmt, shape, tensors)
        if not layout["is_transposed"]:
            return matrix.reshape(parameter_shape)
        stack = len(shape) - 2  # axes that number matrices of their own
        first, second, *rest = parameter_shape[stack:]
        matrix = matrix.reshape(*parameter_shape[:stack], second, first, *rest)
        return np.ascontiguousarray(matrix.swapaxes(stack, stack + 1))

    return WeightEntry(
        key,
        describe(fmt),
        parameter_shape,
        _part(f"{key}.codes", tensors),
        scales,
        decode,
        real_scales=dict(_real_scales(key, fmt, shape, tensors)),
        has_signed_scales=fmt["scale_rule"] == "full-range",
    )


def _real_scales(
    key: str, fmt: Mapping[str, Any], shape: tuple[int, ...], tensors: Tensors
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Scales of every level by their names; offsets may be anything."""
    if fmt["scale"] is None:
        return
    blocks = scale_shape(fmt["granularity"], shape)
    yield f"{key}.scale", partial(_scales, f"{key}.scale", fmt["scale"], blocks, tensors)
    yield from _real_scales(f"{key}.scale", fmt["scale"], blocks, tensors)


def _shapes(layout: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape as a matrix and shape of the parameter, which must hold as many values."""
    shape, parameter_shape = tuple(layout["shape"]), tuple(layout["parameter_shape"])
    if not all(type(size) is int and size >= 0 for size in shape + parameter_shape):
        raise ValueError(f"the shapes of {layout['key']!r} are {shape} and {parameter_shape}")
    if math.prod(shape) != math.prod(parameter_shape) or (
        layout["is_transposed"] and not 2 <= len(shape) <= len(parameter_shape)
    ):
        raise ValueError(f"{layout['key']!r}: a matrix of shape {shape} cannot be a parameter of {parameter_shape}")
    return shape, parameter_shape


def _scale_names(key: str, fmt: Mapping[str, Any]) -> Iterator[str]:
    for role in ("scale", "offset"):
        inner = fmt[role]
        if inner and inner["scale"] is None and inner["element"] == "fp32":
            yield f"{key}.{role}"
        elif inner:
            yield f"{key}.{role}.codes"
            yield from _scale_names(f"{key}.{role}", inner)
    if fmt["zero_point"]:
        yield f"{key}.zero_point"


def _activations(layer: Mapping[str, Any], tensors: Tensors) -> Iterator[ActivationEntry]:
    for slot, entry in layer["activations"].items():
        name = f"{layer['name']}.{_QUANTIZERS[slot]}"
        scale = _part(f"{name}.scale", tensors) if entry["has_scale"] else None
        zero_point = _part(f"{name}.zero_point", tensors) if entry["has_zero_point"] else None
        yield ActivationEntry(name, describe(entry["format"]), bool(entry["is_dynamic"]), scale, zero_point)


def _claimed(layers: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """Beginnings of the names of tensors that belong to a quantizer."""
    weights = [f"{layer['weight']['key']}." for layer in layers if layer["weight"]]
    quantizers = [f"{layer['name']}.{_QUANTIZERS[slot]}." for layer in layers for slot in layer["activations"]]
    return (*weights, *quantizers)


def _extras(layer: Mapping[str, Any], tensors: Tensors) -> Iterator[ExtraEntry]:
    parts = (["pre_scale"] if layer["has_pre_scale"] else []) + (list(_LOW_RANK) if layer["has_low_rank"] else [])
    for part in parts:
        name = f"{layer['name']}.{part}"
        yield ExtraEntry(name, _part(name, tensors))


def _part(name: str, tensors: Tensors) -> StoredTensor:
    if name not in tensors:
        raise UserError(f"tensor {name!r} is missing from the files; copy the directory again")
    return tensors[name]


def _describe_granularity(granularity: Mapping[str, Any]) -> str:
    match granularity:
        case {"kind": "group", "size": size}:
            return f"groups of {size}"
        case {"kind": "flat-group", "size": size}:
            return f"flat groups of {size}"
        case {"kind": "tile", "rows": rows, "cols": cols}:
            return f"tiles of {rows}x{cols}"
        case {"kind": kind}:
            return f"per {kind}"
        case _:
            raise UserError(f"unknown granularity {dict(granularity)!r}")


def _facts(path: Path) -> dict[str, str]:
    record = read_object(path / "run.json")
    facts = {
        "producer": f"octavo {record.get('version', '')}".strip(),
        "model": record.get("model"),
        "recipe": record.get("recipe"),
    }
    return {name: str(value) for name, value in facts.items() if value}
