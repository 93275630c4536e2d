"""Ranges into a prepared model from elsewhere than calibration: from a run's files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.parametrized import make_plain_for_good, sources_of
from octavo.nn.quantizer import ActivationQuantizer, Mode
from octavo.nn.surgery import quantizers
from octavo.numerics.qtensor import QTensor
from octavo.numerics.snapshot import LayerSnapshot
from octavo.spec.facts import Slot
from octavo.spec.select import quantizer_name


def set_ranges(model: nn.Module, ranges: Callable[[str], tuple[Tensor | QTensor, Tensor | None] | None]) -> None:
    """Give every static quantizer its range.

    Args:
        model: Prepared with the plan of the run.
        ranges: Quantizer name -> scale and zero point; ``None`` for one that stayed off.
    """
    for quantizer in quantizers(model):
        if quantizer.spec.is_dynamic or quantizer.spec.format.is_plain:
            quantizer.mode = Mode.QUANTIZE
            continue
        known = ranges(quantizer.name)
        if known is None:
            assert isinstance(quantizer, ActivationQuantizer)
            quantizer.mode = Mode.OFF
        else:
            quantizer.set_range(*known)


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
    for path, module in model.named_modules():
        if sources_of(module) and f"{path}.weight".strip(".") in tensors:
            make_plain_for_good(module)
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


def ranges_of(layers: Iterable[LayerSnapshot]) -> dict[str, tuple[Tensor | QTensor, Tensor | None]]:
    """Quantizer name -> scale and zero point, of every static quantizer that was on."""
    ranges: dict[str, tuple[Tensor | QTensor, Tensor | None]] = {}
    for layer in layers:
        if layer.weight is not None and layer.weight.scale is not None:
            ranges[quantizer_name(layer.name, Slot.WEIGHT)] = layer.weight.scale, layer.weight.zero_point
        for slot, activation in layer.activations.items():
            if activation.scale is not None:
                ranges[quantizer_name(layer.name, slot)] = activation.scale, activation.zero_point
    return ranges
