"""Checkpoints that are quantized already: their codes times their true scales, or a refusal with the way out.

Whoever releases a model in FP8 or MXFP4 only leaves no other weights to start from. What its codes mean is exact, so
these weights are as good as any to begin with; what the first rounding lost stays lost, and a note says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from octavo.errors import UserError

logger = logging.getLogger(__name__)

_READABLE = {
    "fp8": "FP8 in blocks",
    "mxfp8": "MXFP8",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
}
"""Methods whose files transformers turns back into plain weights, and what people call them."""


def stored_method(config: Mapping[str, Any], directory: Path) -> str:
    """How the checkpoint is quantized, as its configuration says; empty for not at all."""
    section = config.get("quantization_config") or config.get("compression_config")
    if isinstance(section, dict) and section:
        return str(section.get("quant_method", "unknown method"))
    return "modelopt" if section or (directory / "hf_quant_config.json").is_file() else ""


def check_readable(config: Mapping[str, Any], directory: Path) -> None:
    """Raise ``UserError`` when the checkpoint is quantized in a way that cannot be undone exactly."""
    method = stored_method(config, directory)
    if method and method not in _READABLE:
        raise UserError(
            f"model directory {directory} is already quantized ({method}); rounding a second time would add to the "
            "first error without showing it. Give the checkpoint it was made from (of quantized ones octavo opens "
            f"{', '.join(_READABLE)}, whose scales are in the files)"
        )


def ask_for_plain_weights(config: Any, directory: Path) -> str:
    """Make transformers multiply codes by scales while loading.

    Args:
        config: A transformers configuration, changed in place.
        directory: Where it was read from.

    Returns:
        The method, empty for a checkpoint that is not quantized.
    """
    section = getattr(config, "quantization_config", None)
    if not isinstance(section, dict) or not section.get("quant_method"):
        return ""
    method = str(section["quant_method"])
    section["dequantize"] = True
    logger.warning(
        "%s holds %s weights: they are dequantized with their own scales, and what that rounding lost stays lost",
        directory,
        _READABLE[method],
    )
    return method


def forget_quantization(model: nn.Module, directory: Path) -> None:
    """Take from a model that was dequantized while loading what says that it is quantized.

    Raises:
        UserError: some of its weights are codes still.
    """
    codes = sorted(
        name
        for name, tensor in model.state_dict().items()
        if name.endswith("weight") and not tensor.dtype.is_floating_point
    )
    narrow = sorted(name for name, p in model.named_parameters() if p.dtype.is_floating_point and p.element_size() < 2)
    if codes or narrow:
        raise UserError(
            f"model directory {directory}: the installed transformers left '{(codes + narrow)[0]}' as codes; "
            "give the checkpoint it was made from, or a newer transformers"
        )
    config: Any = model.config
    if "quantization_config" in vars(config):
        del config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
