"""A graph from a file, ready to be looked at: constants as initializers, norms folded, names unique."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

import onnx
from octavo.errors import UserError
from octavo.onnx.skeleton import give_weights, without_weights
from octavo.onnx.storage import BASE_OPSET

_log = logging.getLogger(__name__)
_RULES = (fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule)


def open_graph(path: Path) -> ir.Model:
    """The graph in ``path``; it computes what the file computes.

    Raises:
        UserError: not an ONNX file, or its weights are not beside it.
    """
    try:
        model = ir.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: {error.strerror}: {error.filename}") from error
    except Exception as error:  # protobuf raises types of its own
        raise UserError(
            f"{path} is not an ONNX file: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    try:
        _map_weights(model)
    except OSError as error:
        raise UserError(f"{path} has its weights in another file, which cannot be read: {error}") from error
    model = _raised(model, path)
    common.LiftConstantsToInitializersPass(lift_all_constants=False)(model)
    if any(node.op_type == "BatchNormalization" for node in model.graph):
        model = rewrite(model, pattern_rewrite_rules=_RULES)
        common.RemoveUnusedNodesPass()(model)
    _name_nodes(model.graph)
    if any(value.type is None for node in model.graph for value in node.outputs if value.name):
        common.ShapeInferencePass()(model)  # a piece of a graph says what goes into it
    return model


def _map_weights(model: ir.Model) -> None:
    """Weights in a file beside the graph become arrays that are read where they are used, wherever the graph goes."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            data = value.const_value
            if isinstance(data, ir.ExternalTensor):
                value.const_value = ir.Tensor(data.numpy(), dtype=data.dtype, name=name)


def _raised(model: ir.Model, path: Path) -> ir.Model:
    """The graph in the operator set that has INT4 and blocks; as it is where it cannot be converted."""
    opset = model.opset_imports.get("", BASE_OPSET)
    if opset >= BASE_OPSET:
        return model
    bare, weights = without_weights(model)  # the converter takes no more than a protobuf holds
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(bare), BASE_OPSET)
    except Exception as error:  # what the converter does not know
        _log.warning("%s stays at operator set %d: %s", path.name, opset, str(error).splitlines()[0])
        return model
    raised = ir.from_proto(proto)
    give_weights(raised, weights)
    told = {str(node.name): node.metadata_props for node in model.graph if node.name}
    for node in raised.graph:  # the converter drops what exporters tell of nodes: where they were traced
        node.metadata_props.update(told.get(str(node.name), {}))
    return raised


def _name_nodes(graph: ir.Graph) -> None:
    seen: set[str] = set()
    for index, node in enumerate(graph):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_{index}"
        seen.add(node.name)
