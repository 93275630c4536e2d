"""The state of a settled block of a torch model: what steps and ranges have changed, and the way back into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.nn.block_layers import BlockLayer
from octavo.nn.extras import InputTransform, LowRank
from octavo.nn.packed import PackedTensor
from octavo.nn.quantizer import Mode, Quantizer, WeightQuantizer
from octavo.numerics.block_state import BlockState, from_parts, named_parts

Layers = Mapping[str, BlockLayer]


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that the model had before it was quantized."""
    ours = tuple(f"{p}." for p, m in model.named_modules() if isinstance(m, (Quantizer, InputTransform, LowRank)))
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not key.startswith(ours or ("\0",)):
            yield key, tensor


def versions(model: nn.Module) -> dict[str, int]:
    """What tells later which tensors were written to."""
    return {key: tensor._version for key, tensor in own_tensors(model)}


def state_of(
    model: nn.Module, quantizers: Sequence[Quantizer], layers: Layers, before: Mapping[str, int]
) -> BlockState:
    """Everything that differs from the block as it was handed out.

    Args:
        model: The whole model; scales may have been folded into any part of it.
        quantizers: Of the block.
        layers: Of the block.
        before: ``versions`` as they were then.
    """
    changed = {key: tensor.detach() for key, tensor in own_tensors(model) if before.get(key) != tensor._version}
    tensors = {f"model.{key}": tensor for key, tensor in changed.items()}
    for quantizer in quantizers:
        tensors |= dict(_ranges(quantizer))
    facts: dict[str, Any] = {
        "modes": {quantizer.name: quantizer.mode.value for quantizer in quantizers},
        "fixed": [q.name for q in quantizers if isinstance(q, WeightQuantizer) and q.is_fixed],
    }
    shared: dict[int, dict[str, Any]] = {}
    for name, layer in layers.items():
        transform, branch = layer.transform, layer.branch
        if transform is not None and id(transform) not in shared:
            shared[id(transform)] = {"layers": [], "channels": transform.num_channels, "rotation": transform.rotation}
            if transform.pre_scale is not None:
                tensors[f"pre_scale.{name}"] = transform.pre_scale
        if transform is not None:
            shared[id(transform)]["layers"].append(name)
        if branch is not None:
            tensors |= {f"low_rank.{name}.a": branch.a, f"low_rank.{name}.b": branch.b}
    return BlockState(tensors, {**facts, "transforms": list(shared.values())})


def _ranges(quantizer: Quantizer) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in quantizer.named_buffers():
        if not name.startswith("fixed."):
            yield f"range.{quantizer.name}.{name}", buffer
    if isinstance(quantizer, WeightQuantizer) and quantizer.fixed is not None:
        yield from named_parts(f"codes.{quantizer.name}", quantizer.fixed.tensor())


@torch.no_grad()
def bring_back(model: nn.Module, quantizers: Sequence[Quantizer], layers: Layers, state: BlockState) -> None:
    """Make a block that was just handed out what it was when ``state_of`` looked at it."""
    _write_tensors(model, layers, state)
    fixed = set(state.facts["fixed"])
    for quantizer in quantizers:
        for name, buffer in quantizer.named_buffers():
            buffer.copy_(state.tensors[f"range.{quantizer.name}.{name}"])
        if isinstance(quantizer, WeightQuantizer):
            quantizer.is_fixed = quantizer.name in fixed
            if f"codes.{quantizer.name}.codes" in state.tensors:
                quantizer.fixed = _codes(quantizer, state)
        quantizer.mode = Mode(state.facts["modes"][quantizer.name])
    for entry in state.facts["transforms"]:
        _add_transform(entry, layers, state)
    for name, layer in layers.items():
        if f"low_rank.{name}.a" in state.tensors:
            a, b = (state.tensors[f"low_rank.{name}.{part}"].to(layer.parameter.device) for part in "ab")
            layer.set_branch(a, b)


def _write_tensors(model: nn.Module, layers: Layers, state: BlockState) -> None:
    for layer in layers.values():
        added = state.tensors.get(f"model.{layer.quantizer.key.rpartition('.')[0]}.bias")
        if added is not None and layer.takes_bias:
            layer.add_bias(added)
    for key, tensor in own_tensors(model):
        if f"model.{key}" in state.tensors:
            tensor.copy_(state.tensors[f"model.{key}"])


def _codes(quantizer: WeightQuantizer, state: BlockState) -> PackedTensor:
    shape, device = quantizer.view.matrix_shape, next(iter(quantizer.buffers())).device
    return PackedTensor(from_parts(f"codes.{quantizer.name}", quantizer.spec.format, shape, state.tensors)).to(device)


def _add_transform(entry: Mapping[str, Any], layers: Layers, state: BlockState) -> None:
    readers = [layers[name] for name in entry["layers"]]
    device = readers[0].parameter.device
    transform = InputTransform(entry["channels"], readers[0].transform_axis, len(readers))
    scale = state.tensors.get(f"pre_scale.{readers[0].name}")
    if scale is not None:
        transform.divide(scale.to(device))
    if entry["rotation"]:
        transform.rotate(entry["rotation"], device)
    for layer in readers:
        layer.set_transform(transform)
