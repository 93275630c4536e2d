"""What is in an ``.onnx`` file, read from its protobuf: stored weights, quantizers of activations, everything else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import MissingExtra, UserError

_FP4_BLOCKS = "TRT_FP4DynamicQuantize"
"""TensorRT's operator for activations in NVFP4."""


@dataclass(frozen=True, slots=True)
class GraphEntry:
    """One tensor: ``kind`` is ``weight``, ``activation`` or ``tensor``; ``scale`` its scales by name."""

    name: str
    kind: str
    format: str
    dtype: str
    shape: tuple[int, ...]
    num_values: int
    num_bytes: int
    scales: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph at a glance."""

    facts: Mapping[str, str]
    entries: tuple[GraphEntry, ...]


def is_graph(path: Path) -> bool:
    """Whether ``path`` is an ``.onnx`` file, or a directory of them that octavo wrote."""
    return path.suffix == ".onnx" or (path / "octavo_onnx.json").is_file()


def read_graphs(path: Path) -> GraphFile:
    """The file ``path``, or all graphs of a directory.

    Raises:
        UserError: no such file, or not ONNX.
    """
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    parts = [_read(file, prefix=f"{file.stem}: " if len(files) > 1 else "") for file in files]
    return GraphFile(parts[0].facts, tuple(entry for part in parts for entry in part.entries))


def _read(path: Path, prefix: str) -> GraphFile:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtra("onnx", "onnx", "reading ONNX files") from error
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf raises types of its own
        raise UserError(
            f"{path} is not an ONNX file: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    facts = {"operators": opsets, "producer": f"{model.producer_name} {model.producer_version}".strip()}
    facts |= {entry.key.removeprefix("octavo."): entry.value for entry in model.metadata_props if entry.value}
    try:
        _load_scales(model.graph, stored, path.parent)
    except (OSError, onnx.checker.ValidationError) as error:
        raise UserError(f"{path} has its weights in another file, which cannot be read: {error}") from error
    return GraphFile(facts, tuple(_entries(model.graph, stored, prefix)))


def _load_scales(graph: Any, stored: Mapping[str, Any], directory: Path) -> None:
    """Of weights that lie beside the graph only the scales are looked at."""
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in stored:
            scale = stored[node.input[1]]
            if uses_external_data(scale):
                load_external_data_for_tensor(scale, str(directory))
                scale.data_location = type(scale).DEFAULT


def _entries(graph: Any, stored: Mapping[str, Any], prefix: str) -> Iterator[GraphEntry]:
    used: set[str] = set()
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored and node.input[0] not in used:
            used.update(name for name in node.input if name in stored)
            yield _entry(node, stored, prefix, "weight", stored[node.input[0]])
        elif node.op_type in ("QuantizeLinear", _FP4_BLOCKS):
            used.update(name for name in node.input[1:] if name in stored)
            yield _entry(node, stored, prefix, "activation", None)
    for name, tensor in stored.items():
        if name not in used:
            dtype, shape = _dtype(tensor), tuple(tensor.dims)
            yield GraphEntry(f"{prefix}{name}", "tensor", dtype, dtype, shape, math.prod(shape), _bytes(tensor), {})


def _entry(node: Any, stored: Mapping[str, Any], prefix: str, kind: str, codes: Any) -> GraphEntry:
    import onnx

    parts = [stored[name] for name in node.input if name in stored]
    scale = stored.get(node.input[1])
    typed = codes if codes is not None else stored.get(node.input[2] if len(node.input) > 2 else "")
    dtype = "FLOAT4E2M1" if node.op_type == _FP4_BLOCKS else _dtype(typed) if typed is not None else ""
    scales = {} if scale is None else {scale.name: np.asarray(onnx.numpy_helper.to_array(scale)).astype(np.float32)}
    shape = tuple(codes.dims) if codes is not None else ()
    values = math.prod(shape) if codes is not None else 0
    own = (node.name or node.output[0]).removesuffix(".quantize").removesuffix("_dequantize")
    name = f"{prefix}{own.partition(f'.{_FP4_BLOCKS}')[0]}"
    size = sum(map(_bytes, parts))
    return GraphEntry(name, kind, f"{dtype.lower()} {_granularity(node, scale)}", dtype, shape, values, size, scales)


def _granularity(node: Any, scale: Any) -> str:
    attributes = {a.name: a.i for a in node.attribute}
    if attributes.get("block_size"):
        return f"blocks of {attributes['block_size']}"
    return "per channel" if scale is not None and math.prod(scale.dims) > 1 else "per tensor"


def _dtype(tensor: Any) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(tensor.data_type))


_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}


def _bytes(tensor: Any) -> int:
    import onnx

    kind = _dtype(tensor)
    bits = _BITS.get(kind) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.ceil(math.prod(tensor.dims) * bits / 8)
