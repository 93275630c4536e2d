"""From a simulated model to files: trace, spell in standard operators, save."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

import onnx
from octavo.numerics.snapshot import LayerSnapshot
from octavo.onnx.from_torch import graph_of
from octavo.onnx.layout import MANIFEST
from octavo.onnx.lower import Style, lower
from octavo.onnx.narrow import narrow
from octavo.onnx.norms import keep_sums_apart
from octavo.onnx.queries import scale_queries
from octavo.onnx.stages import can_cache, stages
from octavo.sources import LoadedModel
from octavo.sources.graphs import GraphModule
from octavo.spec.facts import Slot
from octavo.spec.plan import Plan
from octavo.spec.select import quantizer_name
from octavo.spec.targets import target_named
from octavo.spec.version import VERSION

_FLOATS = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
MAX_INLINE_BYTES = 1_900_000_000
"""Weights beyond this go into a file beside the graph: a protobuf holds at most 2 GiB."""
TARGET = "octavo.target"
MANIFEST_SCHEMA = "octavo.onnx/1"


def write_graphs(
    directory: Path,
    loaded: LoadedModel,
    plan: Plan,
    layers: Iterable[LayerSnapshot],
    sample: Any,
    *,
    opset: int,
    float_dtype: torch.dtype | None,
    use_cache: bool,
) -> None:
    """One ``.onnx`` file for each part of ``loaded``; see ``OnnxLayout.fill``."""
    target = target_named(plan.target)
    is_for_onnxruntime = not target.name or target.name.startswith("onnxruntime")
    style = Style(
        target.unsigned_codes,
        target.integer_biases,
        spells_relu=is_for_onnxruntime,
        plain_block_scales=target.plain_block_scales,
    )
    stored = {quantizer_name(layer.name, Slot.WEIGHT): layer.weight for layer in layers if layer.weight is not None}
    written = []
    use_cache = use_cache and can_cache(loaded, sample)
    for name, model in _graphs(loaded, sample, float_dtype, use_cache=use_cache):
        if target.scales_queries:
            scale_queries(model.graph)
        lower(model, style, opset=opset, stored=stored)
        if target.sums_apart:
            keep_sums_apart(model.graph)
        model.producer_name, model.producer_version = "octavo", VERSION
        model.metadata_props[TARGET] = plan.target
        written.append(f"{name}.onnx")
        save(model, directory / written[-1])
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "recipe": plan.recipe,
        "target": plan.target,
        "cache": use_cache,
        "graphs": written,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _graphs(
    loaded: LoadedModel, sample: Any, float_dtype: torch.dtype | None, *, use_cache: bool
) -> Iterator[tuple[str, ir.Model]]:
    """Names and graphs with their quantizers still in one node each."""
    if isinstance(loaded.model, GraphModule):
        assert loaded.model.marked is not None
        model = loaded.model.marked()
        yield "model", model if float_dtype is None else narrow(model, _FLOATS[float_dtype])
        return
    if float_dtype is not None:
        loaded = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model).to(float_dtype))
        sample = _cast(sample, float_dtype)
    for stage in stages(loaded, sample, use_cache=use_cache):
        yield stage.name, graph_of(stage)


def save(model: ir.Model, path: Path) -> None:
    """Write a graph, its weights beside it where a protobuf cannot hold them."""
    ir.save(model, path, external_data=None if fits_inline(model) else f"{path.name}.data")


def fits_inline(model: ir.Model) -> bool:
    """Whether a protobuf holds the graph with its weights."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    return size <= MAX_INLINE_BYTES


def external_file(graph: Path) -> Path | None:
    """The file with the weights of ``graph``, if they are not inside."""
    file = graph.with_name(f"{graph.name}.data")
    return file if file.is_file() else None


def refer(graph: Path, name: str) -> None:
    """Make a graph look for its weights in a file called ``name`` beside it."""
    proto = onnx.load(graph, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    graph.write_bytes(proto.SerializeToString())


def _cast(sample: Any, dtype: torch.dtype) -> Any:
    match sample:
        case Tensor():
            return sample.to(dtype) if sample.is_floating_point() else sample
        case Mapping():
            return {key: _cast(value, dtype) for key, value in sample.items()}
        case tuple() | list():
            return tuple(_cast(value, dtype) for value in sample)
    return sample
