"""The ONNX layout: one graph for each part of a model, with standard QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from octavo.numerics.door import Door
from octavo.numerics.snapshot import Agreement, LayerSnapshot
from octavo.onnx.storage import opset_of, problems_of
from octavo.sources import LoadedModel
from octavo.sources.extras import require
from octavo.sources.graphs import GraphModule
from octavo.spec.plan import Plan
from octavo.spec.steps import Step

MANIFEST = "octavo_onnx.json"
"""Lies beside the graphs: which they are, of which recipe and for which target."""


def rename_graph(graph: Path, path: Path) -> int:
    """Give a written graph, and the weights beside it, their final names, each in one step.

    Returns:
        Bytes of both.
    """
    from octavo.onnx.write import external_file, refer

    size = graph.stat().st_size
    weights = external_file(graph)
    if weights is not None:
        size += weights.stat().st_size
        refer(graph, f"{path.name}.data")
        os.replace(weights, path.with_name(f"{path.name}.data"))
    os.replace(graph, path)
    return size


def open_graph_door(model: GraphModule, source: str, sample: Any) -> Door:
    """The door of a graph in a file."""
    for package in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        require(package, needed_for="quantizing ONNX files", extra="onnx")
    from octavo.onnx.door import OnnxDoor

    return OnnxDoor(model, source, sample)


class OnnxLayout:
    """``export.base.ModelExporter``: ``model.onnx``, or a file for each tower or stage."""

    name = "onnx"

    def problems(self, plan: Plan) -> list[str]:
        """What standard operators cannot say of ``plan``, a sentence for each quantizer."""
        return problems_of(plan)

    def step_problems(self, plan: Plan, chosen: Mapping[Step, frozenset[str]]) -> list[str]:
        """None: what steps leave beside layers becomes nodes like any other."""
        return []

    def folds_only(self, plan: Plan) -> frozenset[str]:
        """None, for the same reason."""
        return frozenset()

    def is_previous(self, directory: Path) -> bool:
        """Whether ``directory`` holds such files."""
        return (directory / MANIFEST).is_file()

    def fill(
        self,
        directory: Path,
        loaded: LoadedModel,
        plan: Plan,
        layers: Iterable[LayerSnapshot],
        sample: Any,
        *,
        float_dtype: torch.dtype | None,
        use_cache: bool = True,
    ) -> None:
        """Write the graphs of a quantized model into ``directory``.

        Args:
            directory: There already.
            loaded: The model in simulated precision.
            plan: What was asked for, and for which target.
            layers: Its snapshot.
            sample: One batch for the traced forward.
            float_dtype: Type of everything that is not quantized; ``None``: as it is.
            use_cache: A decoder's file takes the keys and values of earlier tokens, and gives those of all.

        Raises:
            UserError: the model cannot be traced or written.
        """
        for package in ("onnx", "onnx_ir", "onnxscript"):
            require(package, needed_for="writing ONNX files", extra="onnx")
        from octavo.onnx.write import write_graphs

        opset = opset_of(plan)
        write_graphs(directory, loaded, plan, layers, sample, opset=opset, float_dtype=float_dtype, use_cache=use_cache)

    def check(
        self,
        directory: Path,
        loaded: LoadedModel,
        layers: Iterable[LayerSnapshot],
        batches: Iterable[Any],
        unquantized: AbstractContextManager[None],
    ) -> list[Agreement]:
        """Hold the graphs in ``directory`` against the simulation; see ``export.base.ModelExporter``."""
        for package in ("onnx", "onnx_ir", "onnxruntime"):
            require(package, needed_for="running ONNX files", extra="onnx")
        from octavo.onnx.check import check_graphs

        return list(check_graphs(directory, loaded, layers, batches, unquantized))
