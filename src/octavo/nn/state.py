"""Ranges into a prepared model from elsewhere than calibration: from a run's files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.block_layers import BlockLayer, block_layers
from octavo.nn.extras import InputTransform
from octavo.nn.layers import layer_kind
from octavo.nn.originals import give_bias
from octavo.nn.parametrized import make_plain_for_good, sources_of
from octavo.nn.quantizer import ActivationQuantizer, Mode
from octavo.nn.surgery import quantizers
from octavo.nn.ties import names_of, untie
from octavo.numerics.snapshot import LayerSnapshot
from octavo.spec.select import quantizer_name


@torch.no_grad()
def restore_layers(model: nn.Module, layers: Iterable[LayerSnapshot]) -> None:
    """Give quantizers their ranges, weights their codes, and layers what algorithms had left beside them.

    Args:
        model: Prepared with the plan of the run, its tensors loaded.
        layers: What was stored; read one at a time. A static quantizer that is not among them stays off.
    """
    activations = {q.name: q for q in quantizers(model) if isinstance(q, ActivationQuantizer)}
    for quantizer in activations.values():
        quantizer.mode = Mode.QUANTIZE if quantizer.spec.is_dynamic else Mode.OFF
    weights = block_layers(model, list(quantizers(model)))
    transforms: dict[object, InputTransform] = {}
    for stored in layers:
        for slot, activation in stored.activations.items():
            if activation.scale is not None:
                activations[quantizer_name(stored.name, slot)].set_range(activation.scale, activation.zero_point)
        if stored.weight is not None:
            layer = weights[stored.name]
            layer.quantizer.fix(layer.parameter, stored.weight)
            layer.quantizer.mode = Mode.QUANTIZE
            _restore_extras(stored, layer, transforms)


def _restore_extras(stored: LayerSnapshot, layer: BlockLayer, shared: dict[object, InputTransform]) -> None:
    """Put the scale or rotation of the input, and the low-rank branch, where they were."""
    if stored.pre_scale is not None or stored.input_rotation:
        layer.set_transform(_transform(stored, layer, shared))
    if stored.low_rank is not None:
        a, b = (part.to(layer.parameter.device) for part in stored.low_rank)
        layer.set_branch(a, b)


def _transform(stored: LayerSnapshot, layer: BlockLayer, shared: dict[object, InputTransform]) -> InputTransform:
    """One for all modules that read the same tensor alike, and so divide and rotate it; one for a function's call."""
    group = (stored.fusion_group, layer.geometry) if layer.caller is None and stored.fusion_group else None
    found = shared.get(group) if group else None
    if found is not None:
        found.memory.num_readers += 1
        return found
    device = layer.parameter.device
    channels = layer.quantizer.view.matrix_shape[-1] if stored.pre_scale is None else len(stored.pre_scale)
    transform = InputTransform(channels, layer.transform_axis, 1)
    if stored.pre_scale is not None:
        transform.divide(stored.pre_scale.to(device))
    if stored.input_rotation:
        transform.rotate(stored.input_rotation, device)
    if group:
        shared[group] = transform
    return transform


def simulated_extras(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``<site>.<part>`` and value of what the simulation does to inputs beside rounding, and of low-rank branches.

    Parts: ``pre_scale``, ``input_rotation``, ``low_rank.a``, ``low_rank.b``.
    """
    for layer in block_layers(model, list(quantizers(model))).values():
        transform, branch = layer.transform, layer.branch
        if transform is not None and transform.pre_scale is not None:
            yield f"{layer.name}.pre_scale", transform.pre_scale
        if transform is not None and transform.rotation:
            yield f"{layer.name}.input_rotation", torch.tensor(transform.rotation)
        if branch is not None:
            yield f"{layer.name}.low_rank.a", branch.a
            yield f"{layer.name}.low_rank.b", branch.b


@torch.no_grad()
def replace_extras(model: nn.Module, extras: Mapping[str, Tensor]) -> None:
    """Other values for some of what ``simulated_extras`` names."""
    for name, tensor in simulated_extras(model):
        if name in extras:
            tensor.copy_(extras[name])


@torch.no_grad()
def replace_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Other scales for some of the quantizers of a calibrated model, by full name."""
    for quantizer in quantizers(model):
        if quantizer.name in scales and quantizer.scale is not None:
            quantizer.scale.copy_(scales[quantizer.name])


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a complete state dict, in place.

    Raises:
        UserError: names or shapes are not the model's.
    """
    for first, names in names_of(model).items():
        untie(model, [name for name in names[1:] if tensors.get(name) is not tensors.get(first)])
    for path, module in model.named_modules():
        if sources_of(module) and f"{path}.weight".strip(".") in tensors:
            make_plain_for_good(module)
        bias = tensors.get(f"{path}.bias".strip("."))
        if bias is not None and layer_kind(module) is not None and module._parameters.get("bias", bias) is None:
            give_bias(module, bias, next(module.parameters(recurse=False)))
    try:
        result: Any = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"the run's tensors do not fit a {type(model).__name__}: {error}") from error
    missing = [key for key in result.missing_keys if not key.rpartition(".")[0].endswith("_quantizer")]
    if missing or result.unexpected_keys:
        raise UserError(
            f"the run's tensors are not those of a {type(model).__name__}: "
            f"missing {missing[:3]}, unknown {list(result.unexpected_keys)[:3]}"
        )
