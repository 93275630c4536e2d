"""Reads the ModelOpt unified Hugging Face layout, written by octavo or by ModelOpt itself.

docs/formats/modelopt.md is the specification. Which axis a scale belongs to is told by shapes alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from octavo.errors import UserError
from octavo.readers.checkpoint import ActivationEntry, Checkpoint, ExtraEntry, WeightEntry
from octavo.readers.modelopt_weights import weight_entry
from octavo.readers.tensor_files import StoredTensor, open_tensors, read_header, read_object

_ATTENTION = {
    "query": "q_bmm_quantizer", "key": "k_bmm_quantizer", "value": "v_bmm_quantizer",
    "softmax": "softmax_quantizer", "attention_output": "bmm2_output_quantizer",
}  # fmt: skip
_CODES = ("F8_E4M3", "I8", "U8")
_E4M3, _INT8, _NVFP4 = "e4m3 per tensor", "int8 per tensor", "e2m1 groups of 16, scales e4m3 per tensor"
_WITH_INPUT_SCALE = {
    "FP8": _E4M3, "W4A8_AWQ": _E4M3, "W4A8_NVFP4_FP8": _E4M3, "W4A8_MXFP4_FP8": _E4M3,
    "W8A8_SQ_PER_CHANNEL": _INT8, "NVFP4": _NVFP4, "NVFP4_AWQ": _NVFP4, "NVFP4_SVD": _NVFP4,
}  # fmt: skip
_EXTRAS = {"pre_quant_scale": "pre_scale", "svdquant_lora_a": "low_rank.a", "svdquant_lora_b": "low_rank.b"}
_CACHE = {".k_proj.k_scale": "k_cache_quantizer", ".v_proj.v_scale": "v_cache_quantizer"}
_CACHE_FORMATS = {"FP8": (_E4M3, 1.0), "NVFP4": (_NVFP4, 6.0)}  # and what its scale is multiplied by in the file

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
    extras = {entry.name: entry for name in weights for entry in _extras(name, tensors)}
    claimed |= {entry.stored.name for entry in extras.values()}
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
        extras,
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
    scales = {"weight_scale": tensors[f"{codes.name}_scale"]}
    second = f"{codes.name}_scale_2"
    scales |= {"weight_scale_2": tensors[second]} if second in tensors else {}
    return weight_entry(codes, scales, _label(codes.name, quantization))


def _extras(weight: str, tensors: Tensors) -> Iterator[ExtraEntry]:
    """What lies beside a weight and belongs to its input or output; ``pre_quant_scale`` multiplies."""
    stem = weight.removesuffix("weight")
    for stored, part in _EXTRAS.items():
        if stem + stored in tensors:
            site = stem.rstrip("._") or "(model)"
            yield ExtraEntry(f"{site}.{part}", tensors[stem + stored], is_reciprocal=stored == "pre_quant_scale")


def _input_scale_name(weight: str) -> str:
    return weight.removesuffix("weight") + "input_scale"


def _activation_scales(tensors: Tensors, quantization: Mapping[str, Any]) -> Iterator[ActivationEntry]:
    for name, tensor in tensors.items():
        if name.endswith("input_scale"):
            stem = name.removesuffix("input_scale")
            label = _label(f"{stem}weight", quantization)
            site = stem.rstrip("._") or "(model)"
            yield ActivationEntry(f"{site}.input_quantizer", _WITH_INPUT_SCALE.get(label, label), False, tensor)
    algorithm = str(quantization.get("kv_cache_quant_algo"))
    fmt, factor = _CACHE_FORMATS.get(algorithm, (algorithm, 1.0))
    for ending, quantizer in _CACHE.items():
        for name, tensor in tensors.items():
            if name.endswith(ending):
                site = name.removesuffix(ending)
                yield ActivationEntry(f"{site}.{quantizer}", fmt, False, tensor, stored_factor=factor)


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
