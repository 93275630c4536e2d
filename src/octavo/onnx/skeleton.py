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
    bare, weights = without_weights(model)
    bare.metadata_props[_WEIGHTS] = "\n".join(weights)
    ir.save(bare, path)


def without_weights(model: ir.Model) -> tuple[ir.Model, dict[str, ir.TensorProtocol]]:
    """A copy of ``model`` whose larger initializers are inputs behind its own, and what they hold."""
    bare = model.clone()
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(bare.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > SMALL_BYTES:
            weights[name] = value.const_value
            del bare.graph.initializers[name]
            value.const_value = None
            bare.graph.inputs.append(value)
    return bare, weights


def give_weights(model: ir.Model, weights: Mapping[str, ir.TensorProtocol]) -> None:
    """Make inputs of these names initializers again, in place."""
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        value.const_value = weights[str(value.name)]
        model.graph.register_initializer(value)


def filled(path: Path, tensors: Mapping[str, Tensor]) -> ir.Model:
    """The graph that ``write_skeleton`` wrote, with its weights.

    Raises:
        UserError: a tensor is missing.
    """
    model = ir.load(path)
    names = set(model.metadata_props.pop(_WEIGHTS, "").split("\n"))
    missing = next((name for name in sorted(names - {""}) if name not in tensors), None)
    if missing is not None:
        raise UserError(f"{path.parent}: tensor '{missing}' is missing: the directory is damaged or incomplete")
    give_weights(model, {name: ir.Tensor(array_of(tensors[name]), name=name) for name in names - {""}})
    return model
