"""Writes the ModelOpt unified Hugging Face layout. docs/formats/modelopt.md is its one-page description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.export.checkpoint import write_json, written_checkpoint
from octavo.export.companions import read_json
from octavo.export.modelopt_config import hf_quant_config, is_octavo_modelopt, quantization_config
from octavo.export.modelopt_labels import (
    ATTENTION_SLOTS,
    QUANTIZABLE,
    Extras,
    Label,
    cache_algorithm,
    cache_problem,
    extras_problem,
    from_decision,
    from_layer,
    label_of,
    layer_problem,
)
from octavo.export.modelopt_tensors import cache_tensors, extra_tensors, layer_tensors, static_scale, value_problem
from octavo.export.shards import ShardWriter
from octavo.numerics.snapshot import LayerSnapshot, Snapshot
from octavo.spec.facts import Slot
from octavo.spec.plan import Plan
from octavo.spec.steps import Step

ACTIVATIONS_STEM = "octavo_activations"
_WAY_OUT = "the run directory holds every format; for this layout choose another recipe or leave the layer out"


class ModelOptExporter:
    """``Exporter`` of everything that ``modelopt_rows`` lists."""

    name = "modelopt"

    def problems(self, plan: Plan) -> list[str]:
        """What the layout cannot hold of ``plan``, a sentence for each layer."""
        found = []
        for decision in plan.decisions:
            problem = layer_problem(from_decision(decision)) if decision.scheme else None
            if problem:
                found.append(_problem_text(decision.site.name, problem))
        cache = cache_problem((from_decision(decision), decision.site.slots) for decision in plan.decisions)
        if cache:
            found.append(f"{cache}; {_WAY_OUT}")
        if not any(Slot.WEIGHT in decision.scheme for decision in plan.decisions):
            found.append("no layer of the plan has a quantized weight, so there is nothing to write")
        return found

    def step_problems(self, plan: Plan, chosen: Mapping[Step, frozenset[str]]) -> list[str]:
        """Rotations at run time, and low-rank branches under other labels than ``NVFP4``."""
        found = []
        for step, sites in chosen.items():
            if step.options.leaves == "bias" and sites:
                found.append(f"step '{step.name}' may give biases to layers whose model has none; {_WAY_OUT}")
            extras = Extras(rotates=step.options.leaves == "rotation", rank=int(step.options.leaves == "low_rank"))
            for decision in plan.decisions:
                if decision.site.name in sites and decision.site.operation == "linear":
                    problem = extras_problem(replace(from_decision(decision), extras=extras))
                    found += [_problem_text(decision.site.name, f"step '{step.name}': {problem}")] if problem else []
        return found

    def folds_only(self, plan: Plan) -> frozenset[str]:
        """Layers whose label has no ``pre_quant_scale``."""
        formats = (replace(from_decision(decision), extras=Extras(has_pre_scale=True)) for decision in plan.decisions)
        return frozenset(layer.name for layer in formats if extras_problem(layer))

    def write(
        self,
        snapshot: Snapshot,
        plan: Plan,
        *,
        source_directory: Path | None,
        out: Path,
        float_dtype: torch.dtype | None,
        trust_remote_code: bool = False,
    ) -> Path:
        """Write the checkpoint ``out``; see ``Exporter.write``."""
        with written_checkpoint(
            out,
            plan,
            kind="a modelopt checkpoint",
            is_previous=_is_previous,
            source_directory=source_directory,
            trust_remote_code=trust_remote_code,
        ) as partial:
            labels, attention, attention_formats = _write_tensors(snapshot, partial, float_dtype)
            if attention:
                _write_attention(attention, attention_formats, partial)
            exclude = _excluded_modules(plan, labels)
            cache = cache_algorithm(from_decision(decision) for decision in plan.decisions)
            write_json(partial / "hf_quant_config.json", hf_quant_config(labels, exclude, cache))
            section = quantization_config(labels, exclude, cache)
            _extend_config(partial / "config.json", section, float_dtype)
        return out


def _write_tensors(
    snapshot: Snapshot, directory: Path, float_dtype: torch.dtype | None
) -> tuple[dict[str, Label], dict[str, Tensor], dict[str, str]]:
    """Weights and what stays as it is; returns labels by module, attention scales and their formats by name."""
    labels: dict[str, Label] = {}
    attention: dict[str, Tensor] = {}
    formats: dict[str, str] = {}
    with ShardWriter(directory, always_index=True) as writer:
        for layer in snapshot.layers():
            label = _checked_label(layer)
            if label is not None:
                labels[_module_of(layer)] = label
                for name, tensor in layer_tensors(layer, label):
                    writer.add(name, tensor)
                for name, tensor in extra_tensors(layer, label):
                    writer.add(name, tensor if float_dtype is None else tensor.to(float_dtype))
            for name, tensor in cache_tensors(layer):
                writer.add(name, tensor)
            for slot in ATTENTION_SLOTS:
                if slot in layer.activations:
                    name = f"{layer.name}.{slot.value}_scale"
                    attention[name] = static_scale(layer, slot)
                    formats[name] = str(layer.activations[slot].format)
        for name, tensor in snapshot.passthrough():
            should_cast = float_dtype is not None and tensor.is_floating_point()
            writer.add(name, tensor.to(float_dtype) if should_cast else tensor)
        writer.close()
    return labels, attention, formats


def _checked_label(layer: LayerSnapshot) -> Label | None:
    """The label; ``problems`` refused everything else before calibration, unless nobody asked it."""
    formats = from_layer(layer)
    problem = layer_problem(formats)
    if problem is None and layer.weight is None and (layer.pre_scale is not None or layer.input_rotation):
        problem = "the layout scales the inputs of quantized weights only"
    label = label_of(formats)
    problem = problem or (None if label is None else value_problem(layer, label))
    if problem:
        raise UserError(f"layout 'modelopt' cannot hold {_problem_text(layer.name, problem)}")
    return label


def _problem_text(layer: str, problem: str) -> str:
    return f"layer {layer!r}: {problem}; {_WAY_OUT}"


def _module_of(layer: LayerSnapshot) -> str:
    return layer.weight_name.removesuffix(".weight")


def _excluded_modules(plan: Plan, labels: Mapping[str, Label]) -> list[str]:
    """Modules that an engine would take for quantized if nobody told it."""
    kept = {
        decision.site.name.partition("#")[0]
        for decision in plan.decisions
        if decision.site.operation in QUANTIZABLE and decision.weight is None
    }
    return sorted(kept - set(labels))


def _write_attention(scales: Mapping[str, Tensor], formats: Mapping[str, str], directory: Path) -> None:
    metadata = {"formats": json.dumps(formats)}
    with ShardWriter(directory, stem=ACTIVATIONS_STEM, metadata=metadata) as writer:
        for name, scale in scales.items():
            writer.add(name, scale)
        writer.close()


def _extend_config(path: Path, section: Mapping[str, Any], float_dtype: torch.dtype | None) -> None:
    """``quantization_config`` goes into the model's configuration, where it has one."""
    if not path.is_file():
        return
    config = read_json(path)
    for key in ("dtype", "torch_dtype"):
        if key in config and float_dtype is not None:
            config[key] = str(float_dtype).removeprefix("torch.")
    write_json(path, {**config, "quantization_config": section})


def _is_previous(directory: Path) -> bool:
    path = directory / "hf_quant_config.json"
    try:
        return path.is_file() and is_octavo_modelopt(read_json(path))
    except UserError:
        return False
