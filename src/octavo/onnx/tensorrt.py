"""TensorRT for RTX as a check: it parses a graph and builds engines on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir

from octavo.onnx.engine import Engine, judge

ARCHITECTURES = {"Ada (SM89)": "SM89", "Blackwell (SM120)": "SM120"}
"""The compute capabilities that engines are built for; FP4 needs the second."""
Sizes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Input -> its smallest and its largest shape."""
_WITHOUT_FP4 = frozenset(("SM89",))


def is_installed() -> bool:
    """Whether the extra ``tensorrt`` is there."""
    return find_spec("tensorrt_rtx") is not None


def build_engines(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    architectures: Iterable[str] = ARCHITECTURES,
    *,
    one_length: bool = True,
) -> dict[str, Engine]:
    """Build an engine of the graph ``path`` for every one of ``architectures``.

    Args:
        path: An ``.onnx`` file.
        shapes: Largest shape of every input. A batch that the graph leaves open goes down to 1.
        architectures: Keys of ``ARCHITECTURES``.
        one_length: Other sizes that the graph leaves open (a sequence) are those of ``shapes``, not 1 and more:
            TensorRT for RTX 1.7 fuses attention in FP8 only then.

    Returns:
        Architecture -> its engine, or why there is none.
    """
    graph = ir.load(path).graph
    smallest = {name: (1, *shape[1:]) if one_length else (1,) * len(shape) for name, shape in shapes.items()}
    profile = {name: (smallest[name], shape) for name, shape in shapes.items()}
    return {name: _engine(path, graph, profile, ARCHITECTURES[name]) for name in architectures}


def _engine(path: Path, graph: ir.Graph, sizes: Sizes, capability: str) -> Engine:
    kinds = {value.dtype for value in graph.initializers.values()} | {v.dtype for node in graph for v in node.outputs}
    if capability in _WITHOUT_FP4 and ir.DataType.FLOAT4E2M1 in kinds:
        return Engine(needs="FP4 needs Blackwell")
    messages: list[str] = []
    engine = serialized(path, sizes, capability, messages)
    if engine is None:
        return Engine(problem=(messages or ["no engine, and no message"])[-1].splitlines()[0])
    return judge(graph, engine.nbytes, messages)


def serialized(path: Path, sizes: Sizes, capability: str, messages: list[str]) -> memoryview | None:
    """An engine as TensorRT writes it; ``None`` without one, and ``messages`` then ends with why.

    Args:
        path: An ``.onnx`` file.
        sizes: Of every input.
        capability: A value of ``ARCHITECTURES``.
        messages: What the builder says is put here.
    """
    import tensorrt_rtx as trt

    errors: list[str] = []

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            (errors if severity <= trt.ILogger.ERROR else messages).append(message)

    listener = Listener()
    builder = trt.Builder(listener)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, listener)
    if not parser.parse_from_file(str(path)):
        messages.append(str(parser.get_error(0)))
        return None
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.__members__[capability], 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.add_optimization_profile(_profile(builder, network, sizes))
    engine = builder.build_serialized_network(network, config)
    messages += errors if engine is None else []
    return None if engine is None else memoryview(engine)


def _profile(builder: Any, network: Any, sizes: Sizes) -> Any:
    """Sizes that the graph leaves open; the largest are the likeliest, too."""
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        smallest, largest = sizes[tensor.name]
        sizes_there = zip(tensor.shape, smallest, largest, strict=True)
        lowest = tuple(low if is_open < 0 else high for is_open, low, high in sizes_there)
        profile.set_shape(tensor.name, lowest, largest, largest)
    return profile
