"""A graph's float parts in fp16 or bf16, with Casts where an operator has no such type.

What follows from integers and constants alone (positions, masks, tables of sines) stays in fp32 until it meets what the
model computes: fp16 counts to 2048 and no further.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import onnx_ir as ir

import onnx
from octavo.errors import UserError
from octavo.onnx.fake_quantize import is_fake_quantize
from octavo.onnx.storage import BASE_OPSET

_FLOAT = ir.DataType.FLOAT
_NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
_ONNX_NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


def narrow(model: ir.Model, dtype: ir.DataType) -> ir.Model:
    """``model``, changed in place: inputs, outputs, weights and what is computed of them are in ``dtype``.

    Quantizers stay, and so do their scales. Constants that ``dtype`` cannot hold become its largest value.

    Args:
        model: In fp32, perhaps with ``octavo.FakeQuantize``.
        dtype: FLOAT16 or BFLOAT16; FLOAT leaves a graph in fp32 as it is.

    Raises:
        UserError: the graph has control flow, whose inside would need other types, too; or it is in a narrow type
            already and fp32 is asked for.
    """
    if dtype is _FLOAT:
        other = next((v.dtype for v in model.graph.initializers.values() if v.dtype in _NUMPY), None)
        if other is not None:
            raise UserError(f"the graph is in {other.name.lower()} and is not made wider: leave --float-dtype out")
        return model
    if any(graph is not model.graph for graph in model.graph.subgraphs()):
        raise UserError(
            f"the graph has control flow, whose branches keep their types: it cannot be written in "
            f"{dtype.name.lower()}; leave --float-dtype out"
        )
    opsets = {**model.opset_imports, "": max(BASE_OPSET, model.opset_imports.get("", BASE_OPSET))}
    _Narrowing(model.graph, dtype, opsets).run()
    return model


class _Narrowing:
    def __init__(self, graph: ir.Graph, dtype: ir.DataType, opsets: dict[str, int]) -> None:
        self.graph = graph
        self.dtype = dtype
        self.opsets = opsets
        self.limit = float(ml_dtypes.finfo(_NUMPY[dtype]).max)
        self.large: set[ir.Value] = set()  # fp32 values that ``dtype`` may not hold
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        """Inputs, then every node as its inputs ask for; a constant of which one type is left keeps its name."""
        self.graph.sort()
        for value in self.graph.inputs:
            self._retype(value)
        for node in list(self.graph):
            if is_fake_quantize(node):
                self._quantizer(node)
            elif any(self._is_narrow(value) or _is_weight(value) for value in node.inputs):
                self._convert(node)
            elif any(value in self.large or self._is_large(value) for value in node.inputs):
                self.large.update(node.outputs)
        self._rename_constants()

    def _quantizer(self, node: ir.Node) -> None:
        if self._is_narrow(node.inputs[0]) or _is_weight(node.inputs[0]):
            node.replace_input_with(0, self._as(self.dtype, node.inputs[0], node))
            self._retype(node.outputs[0])

    def _convert(self, node: ir.Node) -> None:
        """Everything that goes in and may be narrow is; what comes out follows."""
        takes, gives = _types(node.op_type, node.domain, self.opsets.get(node.domain, 1), _ONNX_NAMES[self.dtype])
        for index, value in enumerate(node.inputs):
            if value is not None and (value.dtype is _FLOAT or self._is_narrow(value)):
                node.replace_input_with(index, self._as(self.dtype if _at(takes, index) else _FLOAT, value, node))
        to = node.attributes.get("to") if node.op_type == "Cast" else None
        if to is not None and to.as_int() == int(_FLOAT) and self._is_narrow(node.inputs[0]):
            node.attributes["to"] = ir.AttrInt64("to", int(self.dtype))
        for index, value in enumerate(node.outputs):
            if _at(gives, index):
                self._retype(value)
            elif value.dtype is _FLOAT:
                self._cast_behind(value, node)

    def _is_narrow(self, value: ir.Value | None) -> bool:
        return value is not None and value.dtype is self.dtype

    def _is_large(self, value: ir.Value | None) -> bool:
        data = value.const_value if value is not None and value.dtype is _FLOAT else None
        return data is not None and bool((np.abs(data.numpy()) > self.limit).any())

    def _retype(self, value: ir.Value) -> None:
        if value.dtype is _FLOAT:
            value.type = ir.TensorType(self.dtype)

    def _as(self, dtype: ir.DataType, value: ir.Value | None, before: ir.Node) -> ir.Value:
        """``value`` in ``dtype``: itself, a constant converted, or a Cast in front of ``before``."""
        assert value is not None
        if value.dtype is dtype:
            return value
        if (value, dtype) not in self._casts:
            is_constant = value.is_initializer() and value.const_value is not None
            self._casts[value, dtype] = self._constant(value) if is_constant else self._cast(value, dtype, before)
        return self._casts[value, dtype]

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy()
        held = np.where(np.isfinite(array), np.clip(array, -self.limit, self.limit), array)
        name = f"{value.name}_{self.dtype.name.lower()}"
        data = ir.Tensor(held.astype(_NUMPY[self.dtype]), dtype=self.dtype, name=name)
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self.dtype), const_value=data)
        self.graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        if value in self.large and dtype is not _FLOAT:
            value = self._put(before, "Clip", value, _FLOAT, *(self._number(end) for end in (-self.limit, self.limit)))
        return self._put(before, "Cast", value, dtype, to=int(dtype))

    def _cast_behind(self, value: ir.Value, node: ir.Node) -> None:
        """What an operator gives in fp32 alone is narrow for who reads it."""
        users = list(value.uses())
        follower = next((user for user, _ in users), None)
        if follower is None:
            return
        made = ir.node("Cast", [value], {"to": int(self.dtype)}, name=f"{value.name}_cast")
        made.outputs[0].name, made.outputs[0].shape = f"{value.name}_narrow", value.shape
        made.outputs[0].type = ir.TensorType(self.dtype)
        self.graph.insert_after(node, made)
        for user, index in users:
            user.replace_input_with(index, made.outputs[0])

    def _number(self, number: float) -> ir.Value:
        name = f"octavo.limit.{'low' if number < 0 else 'high'}"
        if name not in self.graph.initializers:
            data = ir.Tensor(np.float32(number), name=name)
            value = ir.Value(name=name, shape=data.shape, type=ir.TensorType(_FLOAT), const_value=data)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _put(
        self, before: ir.Node, kind: str, value: ir.Value, dtype: ir.DataType, *more: ir.Value, **to: int
    ) -> ir.Value:
        node = ir.node(kind, [value, *more], to, name=f"{value.name}_{kind.lower()}_{dtype.name.lower()}")
        node.outputs[0].name, node.outputs[0].shape = f"{node.name}_output", value.shape
        node.outputs[0].type = ir.TensorType(dtype)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _rename_constants(self) -> None:
        for (old, _), new in self._casts.items():
            if old.is_initializer() and not old.uses() and not old.is_graph_output():
                name = str(old.name)
                del self.graph.initializers[name]
                self.graph.initializers.pop(str(new.name))
                new.name = name
                self.graph.register_initializer(new)


def _is_weight(value: ir.Value | None) -> bool:
    """A constant with more than one axis of more than one value; others are numbers, or tables of frequencies."""
    data = value.const_value if value is not None and value.is_initializer() and value.dtype is _FLOAT else None
    return data is not None and sum(size > 1 for size in data.shape.numpy()) > 1


def _at(flags: tuple[bool, ...], index: int) -> bool:
    """Of a parameter; the last one stands for all that follow."""
    return bool(flags) and flags[min(index, len(flags) - 1)]


@cache
def _types(op_type: str, domain: str, version: int, name: str) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For every input and output of an operator, whether it may have the type ``name``; nothing for unknown ones."""
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return (), ()
    allowed = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}

    def flags(parameters: list[onnx.defs.OpSchema.FormalParameter]) -> tuple[bool, ...]:
        return tuple(name in allowed.get(one.type_str, [one.type_str]) for one in parameters)

    return flags(list(schema.inputs)), flags(list(schema.outputs))
