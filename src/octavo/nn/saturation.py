"""Layers whose target sums products of bytes in 16 bits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from octavo.backends import saturation
from octavo.nn.quantizer import ActivationQuantizer, Mode, WeightQuantizer
from octavo.numerics.windows import Geometry
from octavo.spec.facts import QUANTIZER_NAMES, Slot


def saturated(module: nn.Module, x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """The output ``y`` of a linear layer or a convolution less what its sums lose, where its target loses any.

    Args:
        module: The layer.
        x: Its rounded input.
        weight: Its rounded weight, ``(out, in, ...)``.
        y: Its exact output.
    """
    own, given = (module._modules.get(QUANTIZER_NAMES[slot]) for slot in (Slot.WEIGHT, Slot.INPUT))
    if not isinstance(own, WeightQuantizer) or not own.saturates or not saturation.is_simulated():
        return y
    assert isinstance(given, ActivationQuantizer)
    if own.mode is not Mode.QUANTIZE or given.mode is not Mode.QUANTIZE:
        return y
    if given.spec.is_dynamic and x.ndim == 2 and module._parameters.get("bias") is not None:
        return y  # onnxruntime computes a Gemm whose range is found per call in float
    assert own.steps is not None
    geometry = _geometry(module) if isinstance(module, _ConvNd) else None
    known = given.scale, given.zero_point
    return saturation.saturated(y, x, weight, given.spec.format, known, own.steps, geometry)


def _geometry(conv: _ConvNd) -> Geometry:
    ends = conv._reversed_padding_repeated_twice
    padding = tuple(zip(ends[::2], ends[1::2], strict=True))[::-1]
    return Geometry(padding, tuple(conv.stride), tuple(conv.dilation), conv.groups)
