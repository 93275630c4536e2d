"""onnxruntime sessions of graphs in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from octavo.onnx.write import fits_inline
from octavo.sources.graphs import open_session


def session_of(model: ir.Model) -> Any:
    """A session of ``model``, which is handed over in memory, or through a file where a protobuf cannot hold it."""
    if fits_inline(model):
        return open_session(ir.to_proto(model).SerializeToString())
    with tempfile.TemporaryDirectory(prefix="octavo-graph-") as place:
        ir.save(model, Path(place, "graph.onnx"), external_data="weights")
        return open_session(Path(place, "graph.onnx"))
