"""The JSON of the ModelOpt layout: ``hf_quant_config.json`` and ``quantization_config`` in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.export.modelopt_labels import Label
from octavo.spec.version import VERSION

LAYOUT_VERSION = "0.47.0"
_GROUP = {
    "FP8": {"weights": ("float", 8), "input_activations": ("float", 8)},
    "FP8_PER_CHANNEL_PER_TOKEN": {"weights": ("float", 8), "input_activations": ("float", 8)},
    "W8A8_SQ_PER_CHANNEL": {"weights": ("int", 8), "input_activations": ("int", 8)},
    "W8A16": {"weights": ("int", 8)},
    "W4A16_AWQ": {"weights": ("int", 4)},
}


def producer() -> dict[str, str]:
    """Who wrote it. Readers look for the layout's name (TensorRT-LLM refuses any other), so the writer stands apart."""
    return {"name": "modelopt", "version": LAYOUT_VERSION, "written_by": f"octavo {VERSION}"}


def is_octavo_modelopt(config: Mapping[str, Any]) -> bool:
    """Whether ``hf_quant_config.json`` with this content was written by octavo."""
    made_by = config.get("producer")
    return isinstance(made_by, dict) and str(made_by.get("written_by", "")).startswith("octavo ")


def hf_quant_config(labels: Mapping[str, Label], exclude: Sequence[str]) -> dict[str, Any]:
    """``hf_quant_config.json`` for modules with these labels."""
    quantization = {**_summary(labels), "kv_cache_quant_algo": None, "exclude_modules": list(exclude)}
    return {"producer": producer(), "quantization": quantization}


def quantization_config(labels: Mapping[str, Label], exclude: Sequence[str]) -> dict[str, Any]:
    """The same facts as they stand in ``config.json``."""
    summary = _summary(labels)
    return {
        "quant_method": "modelopt",
        **summary,
        "ignore": list(exclude),
        "config_groups": _config_groups(labels),
        "producer": producer(),
    }


def _summary(labels: Mapping[str, Label]) -> dict[str, Any]:
    """One algorithm for all, or ``MIXED_PRECISION`` with a list."""
    kinds = set(labels.values())
    if len(kinds) == 1:
        return _algorithm(kinds.pop())
    layers = {module: _algorithm(label) for module, label in labels.items()}
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def _algorithm(label: Label) -> dict[str, Any]:
    if label.group_size is None:
        return {"quant_algo": label.algorithm}
    more = {"group_size": label.group_size, "has_zero_point": False, "pre_quant_scale": False}
    return {"quant_algo": label.algorithm, **more}


def _config_groups(labels: Mapping[str, Label]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(labels.values()))
    groups: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        members = sorted(module for module, label in labels.items() if label == kind)
        group: dict[str, Any] = {part: _arguments(kind, part) for part in _GROUP[kind.algorithm]}
        groups[f"group_{number}"] = {**group, "targets": ["Linear"] if len(kinds) == 1 else members}
    return groups


def _arguments(label: Label, part: str) -> dict[str, Any]:
    type_name, num_bits = _GROUP[label.algorithm][part]
    is_dynamic = part == "input_activations" and label.algorithm == "FP8_PER_CHANNEL_PER_TOKEN"
    arguments: dict[str, Any] = {"num_bits": num_bits, "type": type_name, "dynamic": is_dynamic}
    return arguments if label.group_size is None else {**arguments, "group_size": label.group_size}
