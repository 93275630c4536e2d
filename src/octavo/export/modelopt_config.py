"""The JSON of the ModelOpt layout: ``hf_quant_config.json`` and ``quantization_config`` in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.export.modelopt_labels import Label
from octavo.spec.version import VERSION

LAYOUT_VERSION = "0.47.0"
_WITH_PRE_SCALE_KEY = ("W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ", "NVFP4_SVD")
Bits = tuple[str, int]
_INT8, _INT4, _FP8, _FP4 = ("int", 8), ("int", 4), ("float", 8), ("float", 4)
_BITS: dict[str, tuple[Bits, Bits | None]] = {  # of weights, and of inputs where they are rounded
    "FP8": (_FP8, _FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": (_FP8, _FP8),
    "FP8_PB_WO": (_FP8, _FP8),
    "W8A8_SQ_PER_CHANNEL": (_INT8, _INT8),
    "W8A16": (_INT8, None),
    "W4A16_AWQ": (_INT4, None),
    "W4A8_AWQ": (_INT4, _FP8),
    **dict.fromkeys(("NVFP4", "NVFP4_AWQ", "NVFP4_SVD"), (_FP4, _FP4)),
    "W4A16_NVFP4": (_FP4, None),
    "W4A8_NVFP4_FP8": (_FP4, _FP8),
    "MXFP4": (_FP4, _FP4),
    "W4A8_MXFP4_FP8": (_FP4, _FP8),
    "MXFP8": (_FP8, _FP8),
}
_DYNAMIC_INPUTS = ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP4", "MXFP8")
_INPUTS_IN_GROUPS = ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "MXFP4", "MXFP8")


def producer() -> dict[str, str]:
    """Who wrote it. Readers look for the layout's name (TensorRT-LLM refuses any other), so the writer stands apart."""
    return {"name": "modelopt", "version": LAYOUT_VERSION, "written_by": f"octavo {VERSION}"}


def is_octavo_modelopt(config: Mapping[str, Any]) -> bool:
    """Whether ``hf_quant_config.json`` with this content was written by octavo."""
    made_by = config.get("producer")
    return isinstance(made_by, dict) and str(made_by.get("written_by", "")).startswith("octavo ")


def hf_quant_config(labels: Mapping[str, Label], exclude: Sequence[str], cache: str | None) -> dict[str, Any]:
    """``hf_quant_config.json`` for modules with these labels, and for the format of the cache (``FP8``, ``NVFP4``)."""
    quantization = {**_summary(labels), "kv_cache_quant_algo": cache, "exclude_modules": list(exclude)}
    return {"producer": producer(), "quantization": quantization}


def quantization_config(labels: Mapping[str, Label], exclude: Sequence[str], cache: str | None) -> dict[str, Any]:
    """The same facts as they stand in ``config.json``."""
    fp8_cache = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {
        "quant_method": "modelopt",
        **_summary(labels),
        "ignore": list(exclude),
        "config_groups": _config_groups(labels),
        **({} if cache is None else {"kv_cache_scheme": fp8_cache if cache == "FP8" else cache}),
        "producer": producer(),
    }


def _summary(labels: Mapping[str, Label]) -> dict[str, Any]:
    """One algorithm for all, or ``MIXED_PRECISION`` with a list."""
    layers = {module: _algorithm(label) for module, label in labels.items()}
    first = next(iter(layers.values()))
    if all(algorithm == first for algorithm in layers.values()):
        return first
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def _algorithm(label: Label) -> dict[str, Any]:
    algorithm: dict[str, Any] = {"quant_algo": label.algorithm}
    if label.group_size is not None:
        algorithm["group_size"] = label.group_size
    if label.algorithm in _WITH_PRE_SCALE_KEY:
        algorithm |= {"has_zero_point": False, "pre_quant_scale": label.has_pre_scale}
    if label.rank:
        algorithm["lora_rank"] = label.rank
    return algorithm


def _config_groups(labels: Mapping[str, Label]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(labels.values()))
    groups: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        members = sorted(module for module, label in labels.items() if label == kind)
        groups[f"group_{number}"] = {**_group(kind), "targets": ["Linear"] if len(kinds) == 1 else members}
    return groups


def _group(label: Label) -> dict[str, Any]:
    weights, inputs = _BITS[label.algorithm]
    size = {} if label.group_size is None else {"group_size": label.group_size}
    group: dict[str, Any] = {"weights": {**_arguments(weights, is_dynamic=False), **size}}
    if inputs is not None and label.has_inputs:
        is_dynamic = label.algorithm in _DYNAMIC_INPUTS
        has_groups = label.algorithm in _INPUTS_IN_GROUPS
        group["input_activations"] = {**_arguments(inputs, is_dynamic=is_dynamic), **(size if has_groups else {})}
    return group


def _arguments(bits: Bits, *, is_dynamic: bool) -> dict[str, Any]:
    type_name, num_bits = bits
    return {"num_bits": num_bits, "type": type_name, "dynamic": is_dynamic}
