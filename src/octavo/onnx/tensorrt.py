"""TensorRT for RTX as a check: it parses a graph and builds engines on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ARCHITECTURES = {"Ada (SM89)": "SM89", "Blackwell (SM120)": "SM120"}
"""The compute capabilities that engines are built for; FP4 needs the second."""


def is_installed() -> bool:
    """Whether the extra ``tensorrt`` is there."""
    return find_spec("tensorrt_rtx") is not None


def build_engines(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | str]:
    """Build an engine of the graph ``path`` for every architecture.

    Args:
        path: An ``.onnx`` file.
        shapes: Shape of every input, for the optimization profile.

    Returns:
        Architecture -> bytes of its engine, or why there is none.
    """
    import tensorrt_rtx as trt

    return {name: _build(trt, path, shapes, capability) for name, capability in ARCHITECTURES.items()}


def _build(trt: Any, path: Path, shapes: Mapping[str, tuple[int, ...]], capability: str) -> int | str:
    messages: list[str] = []

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(message)

    listener = Listener()
    builder = trt.Builder(listener)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, listener)
    if not parser.parse_from_file(str(path)):
        return str(parser.get_error(0)).splitlines()[0]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.__members__[capability], 0)
    profile = builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, (1, *shape[1:]), shape, shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return int(engine.nbytes) if engine is not None else (messages or ["no engine, and no message"])[-1].splitlines()[0]
