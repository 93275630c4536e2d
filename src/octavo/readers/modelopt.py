"""Reads the ModelOpt unified Hugging Face layout, written by octavo or by ModelOpt itself.

docs/formats/modelopt.md is the specification. Which axis a scale belongs to is told by shapes alone.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import UserError
from octavo.readers.checkpoint import ActivationEntry, Checkpoint, WeightEntry
from octavo.readers.decoding import sign_extend
from octavo.readers.tensor_files import StoredTensor, open_tensors, read_header, read_object

_ATTENTION = {
    "query": "q_bmm_quantizer", "key": "k_bmm_quantizer", "value": "v_bmm_quantizer",
    "softmax": "softmax_quantizer", "attention_output": "bmm2_output_quantizer",
}  # fmt: skip
_CODES = ("F8_E4M3", "I8", "U8")
_WITH_INPUT_SCALE = {"FP8": "e4m3 per tensor", "W8A8_SQ_PER_CHANNEL": "int8 per tensor"}
_PARTS = ("weight_scale_2", "pre_quant_scale")
_CACHE = {".k_scale": "k_cache_quantizer", ".v_scale": "v_cache_quantizer"}

Tensors = Mapping[str, StoredTensor]


def read(path: Path) -> Checkpoint:
    """The checkpoint ``path``, listed.

    Raises:
        UserError: not this layout, or one whose parts do not fit together.
    """
    quantization, producer = _read_config(path)
    tensors = open_tensors(path, "model")
    weights = {name: _weight(tensors[name], tensors, quantization) for name in tensors if _is_quantized(name, tensors)}
    inputs = {entry.name: entry for entry in _activation_scales(tensors, quantization)}
    attention = {entry.name: entry for entry in _attention_scales(path / "octavo_activations.safetensors")}
    claimed = {scale.name for weight in weights.values() for scale in weight.scales.values()}
    claimed |= {entry.scale.name for entry in inputs.values() if entry.scale} | set(weights)
    missing = tuple(
        name
        for name in weights
        if _label(name, quantization) in _WITH_INPUT_SCALE and _input_scale_name(name) not in tensors
    )
    return Checkpoint(
        path,
        "modelopt",
        weights,
        {name: tensor for name, tensor in tensors.items() if name not in claimed},
        {**inputs, **attention},
        missing,
        {"producer": producer, "algorithm": str(quantization.get("quant_algo"))},
    )


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    """The quantization section and who wrote it, from ``hf_quant_config.json`` or ``config.json``."""
    own = path / "hf_quant_config.json"
    data = read_object(own) if own.is_file() else read_object(path / "config.json").get("quantization_config")
    section = data.get("quantization", data) if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(section, dict) or "quant_algo" not in section:
        raise UserError(f"{path} is not a ModelOpt checkpoint: no quant_algo in hf_quant_config.json or config.json")
    made_by = data.get("producer")
    made_by = made_by if isinstance(made_by, dict) else {}
    return section, str(made_by.get("written_by") or f"{made_by.get('name', '')} {made_by.get('version', '')}").strip()


def _label(name: str, quantization: Mapping[str, Any]) -> str:
    """The algorithm of the module that ``name`` is the weight of."""
    layers = quantization.get("quantized_layers")
    if not isinstance(layers, dict):
        return str(quantization["quant_algo"])
    entry = layers.get(name.removesuffix(".weight"))
    return str(entry.get("quant_algo")) if isinstance(entry, dict) else "unknown"


def _is_quantized(name: str, tensors: Tensors) -> bool:
    if tensors[name].dtype not in _CODES or name.endswith(("_scale", "_scale_2")):
        return False
    if f"{name}_scale" in tensors:
        return True
    if name.endswith("weight"):
        raise UserError(f"weight {name!r} is {tensors[name].dtype} and has no {name}_scale beside it")
    return False


def _weight(codes: StoredTensor, tensors: Tensors, quantization: Mapping[str, Any]) -> WeightEntry:
    stem = codes.name.removesuffix("weight")
    scales = {"weight_scale": tensors[f"{codes.name}_scale"]}
    scales |= {part: tensors[stem + part] for part in _PARTS if stem + part in tensors}
    scale = scales["weight_scale"]
    if codes.dtype == "U8" or "weight_scale_2" in scales:
        return _packed_weight(codes, scales, _label(codes.name, quantization))
    element = "e4m3" if codes.dtype == "F8_E4M3" else "int8"
    granularity = "per tensor" if scale.shape == () else "per channel"
    decode = functools.partial(_decode_rows, codes, scale)
    return WeightEntry(codes.name, f"{element} {granularity}", codes.shape, codes, scales, decode)


def _decode_rows(codes: StoredTensor, scale: StoredTensor) -> np.ndarray:
    """Codes times one scale, or one for each index of the first axis or of the axis the scale's shape shows."""
    factors = _read_scale(scale)
    if factors.ndim == 1 and len(codes.shape) > 1 and factors.shape[0] == codes.shape[0]:
        factors = factors.reshape(-1, *(1 for _ in codes.shape[1:]))
    fits = factors.ndim in (0, len(codes.shape)) and all(
        size in (1, whole) for size, whole in zip(factors.shape, codes.shape, strict=False)
    )
    if not fits:
        raise UserError(
            f"weight {codes.name!r}: scales of shape {scale.shape} do not fit codes of shape {codes.shape}; "
            "(), (out_features,) or one size per axis was expected"
        )
    values: np.ndarray = codes.read().astype(np.float32) * factors
    return values


def _packed_weight(codes: StoredTensor, scales: Mapping[str, StoredTensor], label: str) -> WeightEntry:
    """INT4 packed along the output axis; other packed formats are listed and not decoded."""
    scale = scales["weight_scale"]
    axis = _packed_axis(codes.shape, scale.shape)
    if label not in ("W4A16_AWQ", "W4A8_AWQ") or axis is None or "weight_scale_2" in scales:
        return WeightEntry(
            codes.name, label, codes.shape, codes, scales, functools.partial(_refuse, codes, scale, label)
        )
    shape = tuple(2 * size if number == axis else size for number, size in enumerate(codes.shape))
    group = math.prod(shape) // math.prod(scale.shape)
    decode = functools.partial(_decode_nibbles, codes, scale, axis)
    return WeightEntry(codes.name, f"int4 groups of {group}", shape, codes, scales, decode)


def _packed_axis(codes: tuple[int, ...], scale: tuple[int, ...]) -> int | None:
    """0 for scales ``(out_features, groups)``, 1 for the transposed ``(groups, out_features)``."""
    if len(codes) < 2 or len(scale) != 2 or 0 in scale:
        return None
    if scale[0] == 2 * codes[0] and math.prod(codes[1:]) % scale[1] == 0:
        return 0
    return 1 if len(codes) == 2 and scale[1] == 2 * codes[1] and codes[0] % scale[0] == 0 else None


def _decode_nibbles(codes: StoredTensor, scale: StoredTensor, axis: int) -> np.ndarray:
    """Two rows in a byte, the even one in the low nibble, two's complement; scales over groups of inputs."""
    packed, factors = codes.read(), _read_scale(scale)
    if axis == 1:
        packed, factors = packed.T, factors.T
    rows = np.stack([packed & 15, packed >> 4], axis=1).reshape(2 * packed.shape[0], -1)
    groups = sign_extend(rows, 4).astype(np.float32).reshape(*factors.shape, -1)
    values = (groups * factors[..., None]).reshape(2 * packed.shape[0], *packed.shape[1:])
    return np.ascontiguousarray(values.T) if axis == 1 else values


def _refuse(codes: StoredTensor, scale: StoredTensor, label: str) -> np.ndarray:
    raise UserError(
        f"weight {codes.name!r}: {label}, codes {codes.dtype} {codes.shape} with scales {scale.dtype} {scale.shape}, "
        "is not read by this version"
    )


def _read_scale(scale: StoredTensor) -> np.ndarray:
    if scale.dtype != "F32":
        raise UserError(f"scale {scale.name!r} is {scale.dtype}; F32 was expected")
    return scale.read()


def _input_scale_name(weight: str) -> str:
    return weight.removesuffix("weight") + "input_scale"


def _activation_scales(tensors: Tensors, quantization: Mapping[str, Any]) -> Iterator[ActivationEntry]:
    for name, tensor in tensors.items():
        if name.endswith("input_scale"):
            stem = name.removesuffix("input_scale")
            label = _label(f"{stem}weight", quantization)
            site = stem.rstrip("._") or "(model)"
            yield ActivationEntry(f"{site}.input_quantizer", _WITH_INPUT_SCALE.get(label, label), False, tensor)
        elif name.endswith(tuple(_CACHE)):
            yield ActivationEntry(f"{name[:-8]}.{_CACHE[name[-8:]]}", "e4m3 per tensor", False, tensor)


def _attention_scales(path: Path) -> Iterator[ActivationEntry]:
    """Octavo's own file beside the weights; ModelOpt has no place for these."""
    if not path.is_file():
        return
    tensors, metadata = read_header(path)
    try:
        formats = json.loads(metadata.get("formats", "{}"))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: the metadata 'formats' is not valid JSON: {error}") from error
    for name, tensor in tensors.items():
        site, _, last = name.rpartition(".")
        slot = last.removesuffix("_scale")
        if slot not in _ATTENTION or not isinstance(formats, dict):
            raise UserError(f"{path}: {name!r} is none of <attention>.{{{','.join(_ATTENTION)}}}_scale")
        yield ActivationEntry(f"{site}.{_ATTENTION[slot]}", str(formats.get(name, "")), False, tensor)
