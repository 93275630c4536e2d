"""Graphs held against the simulation that they were made of: weights, codes node by node, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator

from octavo.backends.saturation import as_this_machine
from octavo.errors import UserError
from octavo.numerics.arrays import array_of
from octavo.numerics.snapshot import LayerSnapshot
from octavo.onnx import tensorrt
from octavo.onnx.codes import NodeAgreement, compare_codes
from octavo.onnx.engine import Engine
from octavo.onnx.fake_quantize import ALSO, QUANTIZER
from octavo.onnx.fusion import fusion_of
from octavo.onnx.layout import MANIFEST
from octavo.onnx.lower import AXES, WEIGHT
from octavo.onnx.runners import open_runner
from octavo.onnx.stages import Stage, rounds
from octavo.sources import LoadedModel
from octavo.spec.facts import Slot
from octavo.spec.select import quantizer_name

MOST_COSINE_LOST = 0.002

Array = np.ndarray[Any, Any]
_Outputs = dict[str, Array]
_Layers = Mapping[str, LayerSnapshot]


@dataclass(slots=True)
class GraphAgreement:
    """One file against the simulation.

    Args:
        file: Its name.
        runtime: Who ran it.
        refusals: Who could not, and why.
        num_weights: Quantized weights compared; ``num_values`` values in them.
        different_weights: Name -> how many of its values differ.
        nodes: Activation quantizers.
        cosine: Of the file's outputs to the unquantized model's, mean over samples; ``None`` without data.
        simulated_cosine: Of the simulation's.
        different_outputs: Outputs behind the first whose cosine is not the simulation's: name -> how far off.
        kernels: What onnxruntime runs after fusion: operator -> how often; empty where another reader ran the file.
        unfused: Products that onnxruntime computes in float although their inputs are quantized.
        lost: Static activation quantizers of the run that no file has, told at the first file.
        engines: Of files for TensorRT, where that is installed: architecture -> what became of it.
    """

    file: str
    runtime: str = ""
    refusals: tuple[str, ...] = ()
    num_weights: int = 0
    num_values: int = 0
    different_weights: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    nodes: tuple[NodeAgreement, ...] = ()
    cosine: float | None = None
    simulated_cosine: float | None = None
    different_outputs: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    unfused: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    engines: dict[str, Engine] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Weights bit for bit, codes node by node, outputs by their cosine."""
        near = self.cosine is None or abs(self.cosine - (self.simulated_cosine or 0.0)) <= MOST_COSINE_LOST
        builds = all(engine.is_expected for engine in self.engines.values())
        same = not (self.different_weights or self.missing or self.different_outputs or self.lost)
        same = same and all(node.agrees for node in self.nodes)
        return builds and near and same

    def to_json_object(self) -> dict[str, Any]:
        """Plain JSON values; of the nodes the number and the worst."""
        worst = min(self.nodes, key=lambda node: (node.share_equal, -node.worst), default=None)
        return {
            **{name: value for name, value in asdict(self).items() if name != "nodes"},
            "agrees": self.agrees,
            "num_nodes": len(self.nodes),
            "worst_node": None if worst is None else asdict(worst),
        }


@torch.no_grad()
def check_graphs(
    directory: Path,
    loaded: LoadedModel,
    layers: Iterable[LayerSnapshot],
    batches: Iterable[Any],
    unquantized: AbstractContextManager[None],
) -> list[GraphAgreement]:
    """Every graph in ``directory`` against the simulated ``loaded``.

    Args:
        directory: What the ONNX layout wrote.
        loaded: The simulated model that it was written from.
        layers: Its snapshot.
        batches: Data to run both on; none compares weights only.
        unquantized: While open, ``loaded`` computes without quantizers.

    Raises:
        UserError: a graph is missing, or nobody can run it.
    """
    by_name = {layer.name: layer for layer in layers}
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    target = manifest["target"]
    is_deployed = target.startswith("onnxruntime")
    found = {Path(file).stem: GraphAgreement(file) for file in manifest["graphs"]}
    for stem, agreement in found.items():
        _compare_weights(directory / f"{stem}.onnx", agreement, by_name)
    next(iter(found.values())).lost = _lost([directory / file for file in manifest["graphs"]], by_name)
    data = list(batches)
    per_batch = [
        {stage.name: stage for stage in one}
        for batch in data
        for one in rounds(loaded, batch, use_cache=manifest.get("cache", False))
    ]
    with as_this_machine():
        simulated = [_outputs(named) for named in per_batch]
    with unquantized:
        references = [_outputs(named) for named in per_batch]
    for stem, agreement in found.items():
        fed = [named[stem] for named in per_batch if stem in named]
        if fed:
            agreement.nodes = compare_codes(directory / f"{stem}.onnx", fed, by_name)
            runner = open_runner(directory / f"{stem}.onnx", optimized=is_deployed)
            agreement.runtime, agreement.refusals = runner.name, runner.refusals
            if runner.is_onnxruntime and (is_deployed or not target):
                fusion = fusion_of(directory / f"{stem}.onnx")
                agreement.kernels, agreement.unfused = fusion.kernels, fusion.unfused
            if target == "tensorrt" and tensorrt.is_installed():
                shapes = {name: tuple(value.shape) for name, value in fed[-1].inputs.items()}
                agreement.engines = tensorrt.build_engines(directory / f"{stem}.onnx", shapes)
            names = [str(value.name) for value in ir.load(directory / f"{stem}.onnx").graph.outputs]
            found_outputs = [dict(zip(names, runner.run(stage.arrays), strict=True)) for stage in fed]
            own, expected = ([run[stem] for run in runs if stem in run] for runs in (simulated, references))
            _compare_outputs(agreement, found_outputs, own, expected)
    return list(found.values())


def _compare_outputs(
    agreement: GraphAgreement, found: list[_Outputs], simulated: list[_Outputs], references: list[_Outputs]
) -> None:
    """Each output's cosine to the unquantized model's beside the simulation's; the lists are of runs."""
    for index, name in enumerate(references[0]):
        if name not in found[0]:
            agreement.different_outputs[name] = 1.0
            continue
        expected = [run[name] for run in references]
        cosine = _cosine([run[name] for run in found], expected)
        of_simulation = _cosine([run[name] for run in simulated], expected)
        if not index:
            agreement.cosine, agreement.simulated_cosine = cosine, of_simulation
        elif not abs(cosine - of_simulation) <= MOST_COSINE_LOST:
            agreement.different_outputs[name] = abs(cosine - of_simulation)


def _outputs(named: Mapping[str, Stage]) -> dict[str, _Outputs]:
    """What every stage gives; a decoder is fed what its sample was made of."""
    return {
        name: {
            output: array_of(value.float())
            for output, value in zip(stage.outputs, stage.module(*stage.inputs.values()), strict=True)
        }
        for name, stage in named.items()
    }


def _cosine(found: list[Array], expected: list[Array]) -> float:
    """Mean over samples of the cosine between their outputs."""
    rows = [(_by_sample(a), _by_sample(b)) for a, b in zip(found, expected, strict=True)]
    values = [
        (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30) for a, b in rows
    ]
    return float(np.concatenate(values).mean())


def _by_sample(value: Array) -> Array:
    return value.reshape(value.shape[0] if value.ndim else 1, -1).astype(np.float64)


def _compare_weights(path: Path, agreement: GraphAgreement, layers: Mapping[str, LayerSnapshot]) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: the directory is damaged or incomplete")
    for name, order, value in stored_weights(path):
        site = name.rpartition(".")[0]
        layer = layers.get(site)
        if layer is None or layer.weight is None:
            agreement.missing = (*agreement.missing, name)
            continue
        expected = array_of(layer.weight.dequantize())
        matrix = value.transpose(np.argsort(order)).reshape(expected.shape)
        wrong = _num_different(matrix, expected)
        agreement.num_weights += 1
        agreement.num_values += expected.size
        if wrong:
            agreement.different_weights[name] = wrong


def _lost(graphs: Iterable[Path], layers: _Layers) -> tuple[str, ...]:
    """Static activation quantizers that no graph has; of layers that read one tensor one is enough."""
    notes = [node.metadata_props for path in graphs for node in ir.load(path).graph]
    there = {note.get(QUANTIZER) for note in notes} | {n for note in notes for n in note.get(ALSO, "").splitlines()}
    wanted = [
        (quantizer_name(layer.name, slot), layer.fusion_group if slot is Slot.INPUT else "")
        for layer in layers.values()
        for slot, activation in layer.activations.items()
        if not activation.is_dynamic
    ]
    groups = {group for name, group in wanted if group and name in there}
    return tuple(name for name, group in wanted if name not in there and group not in groups)


def _num_different(found: Array, expected: Array) -> int:
    """Values that differ; of a file in a narrower type those that are more than its rounding away."""
    if found.dtype == np.float32:
        return int((found != expected).sum())
    kind = ml_dtypes.finfo(found.dtype)
    allowed = abs(expected) * float(kind.eps) + float(kind.smallest_subnormal) / 2
    return int((abs(found.astype(np.float32) - expected) > allowed).sum())


def stored_weights(path: Path) -> Iterator[tuple[str, tuple[int, ...], Array]]:
    """Quantizer, order of axes and value of every stored weight, by onnx's own reading of the nodes."""
    model = ir.load(path)
    for node in model.graph:
        if WEIGHT in node.metadata_props:
            order = tuple(int(axis) for axis in node.metadata_props[AXES].split(","))
            yield node.metadata_props[WEIGHT], order, _evaluate(model, node)


def _evaluate(model: ir.Model, node: ir.Node) -> Array:
    """What a node with constant inputs gives; so may the node that makes its scales."""
    nodes = [value.producer() for value in node.inputs if value is not None and value.producer() is not None]
    copies: dict[ir.Value, ir.Value] = {}
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(model.opset_imports), name="one")

    def known(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in copies:
            return None if value is None else copies[value]
        assert value.const_value is not None
        data = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name)
        twin = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=data)
        graph.register_initializer(twin)
        copies[value] = twin
        return twin

    for one in [*nodes, node]:
        assert one is not None
        twin = ir.node(one.op_type, [known(v) for v in one.inputs], dict(one.attributes), name=one.name)
        twin.outputs[0].name = one.outputs[0].name
        twin.outputs[0].type = one.outputs[0].type
        copies[one.outputs[0]] = twin.outputs[0]
        graph.append(twin)
    graph.outputs.append(copies[node.outputs[0]])
    proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version))
    results: Any = ReferenceEvaluator(proto).run(None, {})
    return np.asarray(results[0])
