"""A simulated torch model as a graph, through torch's own exporter."""

from __future__ import annotations

import ast
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.backends import simulate
from octavo.backends.saturation import exact_sums
from octavo.errors import UserError
from octavo.onnx.fake_quantize import ALSO, QUANTIZER, fake_quantize, is_fake_quantize
from octavo.onnx.stages import INNER, Stage
from octavo.onnx.storage import BASE_OPSET
from octavo.spec.facts import QUANTIZER_NAMES, Slot


@torch.no_grad()
def graph_of(stage: Stage) -> ir.Model:
    """The graph of ``stage`` with an ``octavo.FakeQuantize`` for every quantizer.

    Raises:
        UserError: torch cannot export the model; the message carries its reason.
    """
    dynamic = tuple(dict.fromkeys(stage.axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in stage.inputs)
    module = stage.module.eval()
    try:
        with _eager_attention(module), _quiet(), exact_sums():
            program = torch.onnx.export(
                module,
                tuple(value.clone() for value in stage.inputs.values()),  # one tensor under two names is traced as one
                input_names=list(stage.inputs),
                output_names=list(stage.outputs),
                dynamo=True,
                opset_version=BASE_OPSET,
                dynamic_shapes={"inputs": dynamic},
                custom_translation_table={simulate.OPERATOR: fake_quantize},
                verbose=False,
            )
            alike = _alike(module, stage)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = " ".join([line.strip() for line in str(cause).splitlines() if line.strip()][:2])
        raise UserError(f"torch.onnx.export cannot write '{stage.name}': {reason or type(cause).__name__}") from error
    assert program is not None
    model = program.model
    _tidy(model, stage, alike)
    return model


class _Roundings(TorchDispatchMode):
    """Names of quantizers by what they round and how."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[Any, list[str]] = {}
        self.running = ""
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is simulate.OPERATOR:
            x, scale, zero_point, key = args
            self._alive.append(x)  # or its memory may be given to another tensor
            place = x.data_ptr(), x.shape, x.stride(), -1 if x.is_inference() else x._version
            values = [None if value is None else value.tolist() for value in (scale, zero_point)]
            self.names.setdefault((place, str(values), key), []).append(self.running)
        return func(*args, **(kwargs or {}))


def _alike(module: nn.Module, stage: Stage) -> dict[str, tuple[str, ...]]:
    """Name of a quantizer -> those that round the same tensor alike: the exporter keeps one of them."""
    watch = _Roundings()

    def enter(quantizer: Any, inputs: Any) -> None:
        watch.running = str(quantizer.name)

    endings = tuple(QUANTIZER_NAMES.values())
    hooks = [m.register_forward_pre_hook(enter) for path, m in module.named_modules() if path.endswith(endings)]
    try:
        with watch:
            module(*stage.inputs.values())
    finally:
        for hook in hooks:
            hook.remove()
    groups = [tuple(dict.fromkeys(names)) for names in watch.names.values()]
    return {name: names for names in groups if len(names) > 1 for name in names}


def _tidy(model: ir.Model, stage: Stage, alike: Mapping[str, Sequence[str]]) -> None:
    """Names as the torch model has them, axes as the stage calls them, and no trace of where it was traced."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.name and value.name.startswith(f"{INNER}."):
            value.name = value.name.removeprefix(f"{INNER}.")
    for node in graph:
        if is_fake_quantize(node):
            name = _quantizer_name(node, stage.module)
            node.metadata_props[QUANTIZER] = name
            if others := [other for other in alike.get(name, ()) if other != name]:
                node.metadata_props[ALSO] = "\n".join(others)
    _name_axes(graph, stage)
    _name_nodes(graph)
    for node in graph.all_nodes():
        kept = {key: node.metadata_props[key] for key in (QUANTIZER, ALSO) if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(kept)


def _name_nodes(graph: ir.Graph) -> None:
    """Nodes get the name of the module that they were traced in, and their operator's."""
    seen: dict[str, int] = {}
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        scope = str(scopes[-2]).removeprefix(INNER).strip(".") if len(scopes) > 1 else ""
        name = f"{scope}.{node.op_type}".strip(".")
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"


def _name_axes(graph: ir.Graph, stage: Stage) -> None:
    """The exporter's names of sizes (``s72``) become those of the stage, wherever they are."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in stage.axes.get(value.name or "", {}).items():
            size = value.shape[axis] if value.shape is not None else None
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names[str(size.value)] = name
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None and any(isinstance(size, ir.SymbolicDim) for size in value.shape):
            value.shape = ir.Shape(
                [_renamed(size, names) if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
            )


def _renamed(size: ir.SymbolicDim, names: dict[str, str]) -> str | None:
    """A size, or a sum of sizes, in the stage's names."""
    if size.value is None:
        return None
    return re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), str(size.value))


def _quantizer_name(node: ir.Node, module: nn.Module) -> str:
    """The full name of the quantizer whose forward called the operator."""
    scopes = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
    quantizer: Any = module.get_submodule(scopes[-2])
    return str(quantizer.name)


@contextmanager
def _eager_attention(module: nn.Module) -> Iterator[None]:
    """transformers' attention spelled as products and softmax while exporting: engines match that, not ``sdpa``.

    Where the probabilities are rounded the call was written out for that; another one would not round them.
    """
    transformers: Any = sys.modules.get("transformers")
    configs = []
    if transformers is not None:
        parts = [part for part in module.modules() if isinstance(part, transformers.PreTrainedModel)]
        configs = [part.config for part in parts if not _rounds_probabilities(part)]
    changed = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, kind in reversed(changed):
            config._attn_implementation = kind


def _rounds_probabilities(module: nn.Module) -> bool:
    ending = QUANTIZER_NAMES[Slot.SOFTMAX]
    return any(name.endswith(ending) for name, _ in module.named_modules())


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter logs what it skipped among its own operators, and warns of what it does itself."""
    talkative = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in talkative]
    for logger in talkative:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(talkative, levels, strict=True):
            logger.setLevel(level)
