"""A graph without its weights, as a run directory keeps it, and with them again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from octavo.errors import UserError
from octavo.numerics.arrays import array_of
from octavo.onnx.snapshot import SMALL_BYTES

_WEIGHTS = "octavo.weights"


def write_skeleton(model: ir.Model, path: Path) -> None:
    """Write ``model`` with its larger initializers as inputs; their values are the run's tensors."""
    bare = model.clone()
    names = []
    for name, value in list(bare.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > SMALL_BYTES:
            del bare.graph.initializers[name]
            value.const_value = None
            bare.graph.inputs.append(value)
            names.append(name)
    bare.metadata_props[_WEIGHTS] = "\n".join(names)
    ir.save(bare, path)


def filled(path: Path, tensors: Mapping[str, Tensor]) -> ir.Model:
    """The graph that ``write_skeleton`` wrote, with its weights.

    Raises:
        UserError: a tensor is missing.
    """
    model = ir.load(path)
    names = set(model.metadata_props.pop(_WEIGHTS, "").split("\n"))
    for value in list(model.graph.inputs):
        if value.name not in names:
            continue
        if value.name not in tensors:
            raise UserError(f"{path.parent}: tensor '{value.name}' is missing: the directory is damaged or incomplete")
        model.graph.inputs.remove(value)
        value.const_value = ir.Tensor(array_of(tensors[value.name]), name=value.name)
        model.graph.register_initializer(value)
    return model
