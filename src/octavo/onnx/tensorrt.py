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
_WITHOUT_FP4 = frozenset(("SM89",))


def is_installed() -> bool:
    """Whether the extra ``tensorrt`` is there."""
    return find_spec("tensorrt_rtx") is not None


def build_engines(
    path: Path, shapes: Mapping[str, tuple[int, ...]], architectures: Iterable[str] = ARCHITECTURES
) -> dict[str, Engine]:
    """Build an engine of the graph ``path`` for every one of ``architectures``.

    Args:
        path: An ``.onnx`` file.
        shapes: Largest shape of every input; sizes that the graph leaves open go down to 1.
        architectures: Keys of ``ARCHITECTURES``.

    Returns:
        Architecture -> its engine, or why there is none.
    """
    import tensorrt_rtx as trt

    graph = ir.load(path).graph
    return {name: _engine(trt, path, graph, shapes, ARCHITECTURES[name]) for name in architectures}


def _engine(trt: Any, path: Path, graph: ir.Graph, shapes: Mapping[str, tuple[int, ...]], capability: str) -> Engine:
    if capability in _WITHOUT_FP4 and any(v.dtype is ir.DataType.FLOAT4E2M1 for v in graph.initializers.values()):
        return Engine(needs="FP4 needs Blackwell")
    messages: list[str] = []
    size = _build(trt, path, shapes, capability, messages)
    if not size:
        return Engine(problem=(messages or ["no engine, and no message"])[-1].splitlines()[0])
    return judge(graph, size, messages)


def _build(trt: Any, path: Path, shapes: Mapping[str, tuple[int, ...]], capability: str, messages: list[str]) -> int:
    """Bytes of an engine; 0 without one, and ``messages`` then ends with why."""
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
        return 0
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.__members__[capability], 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.add_optimization_profile(_profile(builder, network, shapes))
    engine = builder.build_serialized_network(network, config)
    messages += errors if engine is None else []
    return 0 if engine is None else int(engine.nbytes)


def _profile(builder: Any, network: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Sizes that the graph leaves open, from 1 to those of ``shapes``, which are the likeliest, too."""
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        largest = shapes[tensor.name]
        smallest = tuple(1 if open_size < 0 else size for open_size, size in zip(tensor.shape, largest, strict=True))
        profile.set_shape(tensor.name, smallest, largest, largest)
    return profile
