"""The tensors of one layer in the ModelOpt layout. docs/formats/modelopt.md has the table."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.backends.codes import pack
from octavo.errors import UserError
from octavo.export.modelopt_labels import CACHE_SLOTS, Label
from octavo.export.modelopt_rows import FP4_LABELS, INT4_LABELS, TOP_IN_FP8, Rounded, is_cache_nvfp4
from octavo.export.views import channel_scale_to_parameter, to_parameter
from octavo.numerics.qtensor import QTensor
from octavo.numerics.snapshot import LayerSnapshot
from octavo.spec.facts import Slot

_CACHE_NAMES = {Slot.KEY_CACHE: "k_proj.k_scale", Slot.VALUE_CACHE: "v_proj.v_scale"}
_E2M1_MAX, _E4M3_MAX = 6.0, 448.0


def layer_tensors(layer: LayerSnapshot, label: Label) -> Iterator[tuple[str, Tensor]]:
    """A quantized weight in its parameter's shape, its scales, the scale of its input."""
    weight = layer.weight
    assert weight is not None
    yield layer.weight_name, _codes(weight, layer, label)
    for suffix, scale in _scales(weight, layer, label):
        yield f"{layer.weight_name}{suffix}", scale
    inputs = layer.activations.get(Slot.INPUT)
    if inputs is not None and not inputs.is_dynamic:
        yield layer.weight_name.removesuffix("weight") + "input_scale", static_scale(layer, Slot.INPUT)


def value_problem(layer: LayerSnapshot, label: Label) -> str | None:
    """Why the layout cannot hold the layer's values, although it holds its formats."""
    weight = layer.weight
    if label.algorithm != "W4A8_NVFP4_FP8" or weight is None or not isinstance(weight.scale, QTensor):
        return None
    largest = float(weight.scale.codes.view(torch.float8_e4m3fn).float().amax()) if weight.codes.numel() else 0.0
    if largest <= TOP_IN_FP8:
        return None
    return f"kernels unpack its weights to FP8, where the group scale {largest:g} times 6 exceeds {_E4M3_MAX:g}"


def extra_tensors(layer: LayerSnapshot, label: Label) -> Iterator[tuple[str, Tensor]]:
    """What multiplies the layer's input, and its low-rank branch."""
    stem = layer.weight_name.removesuffix("weight")
    if label.has_pre_scale:
        assert layer.weight is not None
        ones = torch.ones(layer.weight.shape[-1])
        yield f"{stem}pre_quant_scale", ones if layer.pre_scale is None else layer.pre_scale.float().reciprocal()
    if layer.low_rank is not None:
        for name, factor in zip("ab", layer.low_rank, strict=True):
            yield f"{stem}svdquant_lora_{name}", factor


def cache_tensors(layer: LayerSnapshot) -> Iterator[tuple[str, Tensor]]:
    """Scales of an attention's cache: amax / 448, be the cache in E4M3 or in NVFP4."""
    for slot in CACHE_SLOTS:
        if slot in layer.activations:
            entry = layer.activations[slot]
            scale = static_scale(layer, slot)
            factor = _E2M1_MAX if is_cache_nvfp4(Rounded(entry.format, entry.is_dynamic)) else 1.0
            yield f"{layer.name}.{_CACHE_NAMES[slot]}", scale * factor


def static_scale(layer: LayerSnapshot, slot: Slot) -> Tensor:
    """The calibrated scale of one of the layer's activations, fp32 ``()``.

    Raises:
        UserError: it was never calibrated.
    """
    scale = layer.activations[slot].scale
    if scale is None:
        raise UserError(
            f"layer {layer.name!r}: the {slot.value} quantizer is static and has no scale, because it saw no data; "
            "calibrate with data that reaches the layer, or leave it out with a rule"
        )
    return scale.float().reshape(())


def _codes(weight: QTensor, layer: LayerSnapshot, label: Label) -> Tensor:
    if label.algorithm in INT4_LABELS:
        return _packed(weight, layer, axis=1 if layer.is_transposed else 0)
    if label.algorithm in FP4_LABELS:
        return _packed(weight, layer, axis=0 if layer.is_transposed else -1)
    codes = to_parameter(weight.codes, layer)
    return codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)


def _packed(weight: QTensor, layer: LayerSnapshot, *, axis: int) -> Tensor:
    """Two neighbours of ``axis`` in a byte, the even one in the low nibble; the other axes as they are."""
    last = to_parameter(weight.codes, layer).movedim(axis, -1)
    return pack(last.contiguous(), 4).movedim(-1, axis).contiguous()


def _scales(weight: QTensor, layer: LayerSnapshot, label: Label) -> Iterator[tuple[str, Tensor]]:
    scale = weight.scale
    if isinstance(scale, QTensor):
        yield "_scale", _block_scales(_e4m3_or_e8m0(scale), layer)
        if isinstance(scale.scale, Tensor):
            yield "_scale_2", scale.scale.float().reshape(())
        return
    assert scale is not None
    if label.algorithm == "FP8_PB_WO":
        tiles = scale.T if layer.is_transposed else scale
        yield "_scale", tiles.contiguous()[:, None, :, None].contiguous()
    elif scale.ndim == 2:
        yield "_scale", _block_scales(scale, layer)
    else:
        yield "_scale", scale if scale.ndim == 0 else channel_scale_to_parameter(scale, layer)
    if label.algorithm == "W4A8_AWQ":
        yield "_scale_2", (weight.dequantize().abs().amax() / _E4M3_MAX).reshape(())


def _e4m3_or_e8m0(scale: QTensor) -> Tensor:
    """Scale codes in the dtype of the layout: E8M0 has none of its own there."""
    return scale.codes if scale.scale is None else scale.codes.view(torch.float8_e4m3fn)


def _block_scales(scale: Tensor, layer: LayerSnapshot) -> Tensor:
    """``(out_features, groups)``, or its transpose where the parameter is one."""
    return (scale.T if layer.is_transposed else scale).contiguous()
