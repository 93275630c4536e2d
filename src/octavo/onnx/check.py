"""Graphs held against the simulation that they were made of: weights, codes node by node, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator

from octavo.backends.saturation import as_this_machine
from octavo.errors import UserError
from octavo.numerics.arrays import array_of, tensor_of
from octavo.numerics.qtensor import quantize
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot
from octavo.onnx import tensorrt
from octavo.onnx.fake_quantize import QUANTIZER
from octavo.onnx.fusion import fusion_of
from octavo.onnx.layout import MANIFEST
from octavo.onnx.lower import AXES, WEIGHT
from octavo.onnx.runners import Runner, open_runner
from octavo.onnx.stages import Stage, rounds
from octavo.sources import LoadedModel
from octavo.spec.element import IntFormat
from octavo.spec.facts import QUANTIZER_NAMES, Slot
from octavo.spec.select import quantizer_name

MOST_CODES_OFF = 0.001
MOST_COSINE_LOST = 0.002

Array = np.ndarray[Any, Any]
_Outputs = dict[str, Array]
_Layers = Mapping[str, LayerSnapshot]


@dataclass(frozen=True, slots=True)
class NodeAgreement:
    """One QuantizeLinear, fed what the runtime fed it.

    Args:
        quantizer: Its full name.
        num_values: How many codes were compared.
        share_equal: Share of them that equal octavo's.
        worst: Largest distance, in codes.
    """

    quantizer: str
    num_values: int
    share_equal: float
    worst: int

    @property
    def agrees(self) -> bool:
        """At least 99.9 % equal, and none off by more than one code."""
        return self.share_equal >= 1 - MOST_CODES_OFF and self.worst <= 1


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
        engines: Of files for TensorRT, where that is installed: architecture -> bytes of an engine, or why not.
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
    engines: dict[str, int | str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Weights bit for bit, codes node by node, outputs by their cosine."""
        near = self.cosine is None or abs(self.cosine - (self.simulated_cosine or 0.0)) <= MOST_COSINE_LOST
        builds = all(isinstance(size, int) for size in self.engines.values())
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
            _compare_codes(directory / f"{stem}.onnx", agreement, fed, by_name)
            runner = open_runner(directory / f"{stem}.onnx", optimized=is_deployed)
            agreement.runtime, agreement.refusals = runner.name, runner.refusals
            if runner.is_onnxruntime and (is_deployed or not target):
                fusion = fusion_of(directory / f"{stem}.onnx")
                agreement.kernels, agreement.unfused = fusion.kernels, fusion.unfused
            if target == "tensorrt" and tensorrt.is_installed():
                shapes = {name: tuple(value.shape) for name, value in fed[-1].inputs.items()}
                agreement.engines = tensorrt.build_engines(directory / f"{stem}.onnx", shapes)
            names = [str(value.name) for value in ir.load(directory / f"{stem}.onnx").graph.outputs]
            found_outputs = [dict(zip(names, _run(runner, stage), strict=True)) for stage in fed]
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


def _run(runner: Runner, stage: Stage) -> list[Array]:
    return runner.run({name: array_of(value) for name, value in stage.inputs.items()})


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
    there = {node.metadata_props.get(QUANTIZER) for path in graphs for node in ir.load(path).graph}
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
    return int((abs(found.astype(np.float32) - expected) > abs(expected) * 2.0**-7).sum())


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
        twin = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
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


def _compare_codes(
    path: Path, agreement: GraphAgreement, fed: list[Stage], layers: Mapping[str, LayerSnapshot]
) -> None:
    """Run node by node, and quantize what each QuantizeLinear was fed."""
    graph = ir.load(path).graph
    own = [str(value.name) for value in graph.outputs]
    pairs = {
        node.metadata_props[QUANTIZER]: (str(node.inputs[0].name), str(node.outputs[0].name))
        for node in graph
        if QUANTIZER in node.metadata_props and node.inputs[0] is not None
    }
    given = {str(value.name) for value in graph.inputs}
    inside = [n for n in dict.fromkeys(n for pair in pairs.values() for n in pair) if n not in own and n not in given]
    if not pairs:
        return
    runner = open_runner(path, inside, optimized=False)
    tallies: dict[str, list[tuple[int, int, int]]] = {name: [] for name in pairs}
    for stage in fed:
        found = dict(zip([*own, *inside], _run(runner, stage), strict=True))
        found |= {name: array_of(value) for name, value in stage.inputs.items()}
        for name, (source, codes) in pairs.items():
            tallies[name].append(_off(found[source], found[codes], _scale_of(name, layers)))
    agreement.nodes = tuple(_node_agreement(name, rows) for name, rows in tallies.items())


def _node_agreement(name: str, rows: list[tuple[int, int, int]]) -> NodeAgreement:
    count, off = sum(row[0] for row in rows), sum(row[1] for row in rows)
    return NodeAgreement(name, count, 1 - off / max(1, count), max(row[2] for row in rows))


def _scale_of(quantizer: str, layers: Mapping[str, LayerSnapshot]) -> ActivationScale:
    site, _, kind = quantizer.rpartition(".")
    slot = next((slot for slot, name in QUANTIZER_NAMES.items() if name == kind), None)
    if slot is None or site not in layers or slot not in layers[site].activations:
        raise UserError(
            f"the file has a quantizer '{quantizer}' that the run does not have: it was made of another run"
        )
    return layers[site].activations[slot]


def _off(x: Array, codes: Array, activation: ActivationScale) -> tuple[int, int, int]:
    """Codes compared, codes that differ, and the largest distance."""
    values = tensor_of(x).float()
    scale, zero_point = (None if part is None else part.cpu() for part in (activation.scale, activation.zero_point))
    ours = array_of(quantize(values, activation.format, scale=scale, zero_point=zero_point).codes)
    if isinstance(activation.format.element, IntFormat):
        shift = 128 if codes.dtype == np.uint8 and ours.dtype == np.int8 else 0
        distance = np.abs(ours.astype(np.int32) - (codes.astype(np.int32) - shift))
    else:
        distance = np.abs(_order(ours) - _order(codes.view(np.uint8)))
    return distance.size, int((distance > 0).sum()), int(distance.max(initial=0))


def _order(bits: Array) -> Array:
    """Sign-magnitude bit patterns as integers in the order of their values."""
    wide = bits.astype(np.int32)
    return np.where(wide & 0x80, -(wide & 0x7F), wide & 0x7F)
