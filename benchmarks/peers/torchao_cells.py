"""torchao's algorithms on CPU. See ``cell.py``; its MXFP4 wants a model in bf16.

Its other observer for SmoothQuant (``use_running_absmax``) fails with static INT8: it asks options of a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.peers.cell import Draw, Method, main
from torch import nn


def is_linear(module: nn.Module, name: str) -> bool:
    """Everything but the output head, which others leave alone, too, and the pooler, which no embedding needs."""
    return isinstance(module, nn.Linear) and not {"lm_head", "pooler"} & set(name.split("."))


def plain(config: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Method:
    """Without data."""

    def quantize(model: nn.Module, draw: Draw) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(model.to(dtype), config(), filter_fn=is_linear)
        return model

    return quantize


def in_steps(make: Callable[[str], Any], *steps: str) -> Method:
    """By observers that are inserted, fed before every further step, and converted."""

    def quantize(model: nn.Module, draw: Draw) -> nn.Module:
        from torchao.quantization import quantize_

        for step in steps:
            if step != steps[0]:
                draw.run(model)
            quantize_(model, make(step), filter_fn=is_linear)
        return model

    return quantize


def static_int8(alpha: float | None) -> Method:
    """One range for the inputs of a layer, after SmoothQuant where ``alpha`` is given."""

    def quantize(model: nn.Module, draw: Draw) -> nn.Module:
        from torchao.prototype.smoothquant import SmoothQuantConfig
        from torchao.prototype.smoothquant.core import SmoothQuantObserver
        from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_

        base = Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()])
        quantize_(model, SmoothQuantConfig(base, "prepare", alpha), filter_fn=is_linear)
        draw.run(model)
        for module in model.modules():
            if isinstance(module, SmoothQuantObserver):  # it joins its inputs, so that they need one length
                module.inputs = [seen.reshape(-1, 1, seen.shape[-1]) for seen in module.inputs]
        quantize_(model, SmoothQuantConfig(base, "convert", alpha), filter_fn=is_linear)
        return model

    return quantize


def intx(group_size: int, **options: Any) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(torch.int4, PerGroup(group_size), **options)


def hqq(group_size: int) -> Any:
    return intx(group_size, intx_choose_qparams_algorithm="hqq_scale_only")


def awq(group_size: int) -> Callable[[str], Any]:
    def make(step: str) -> Any:
        from torchao.prototype.awq import AWQConfig

        return AWQConfig(intx(group_size), step)

    return make


def gptq(step: str) -> Any:
    from torchao.prototype.gptq import GPTQConfig
    from torchao.quantization import Int4WeightOnlyConfig

    return GPTQConfig(step, Int4WeightOnlyConfig(group_size=128))


def nvfp4(step: str) -> Any:
    from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

    return NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False, step=step)


def nvfp4_weights() -> Any:
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    return NVFP4WeightOnlyConfig()


def mxfp4() -> Any:
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.quantization.quantize_.common import KernelPreference

    fp4 = torch.float4_e2m1fn_x2
    return MXDynamicActivationMXWeightConfig(
        activation_dtype=fp4, weight_dtype=fp4, kernel_preference=KernelPreference.EMULATED
    )


def w4a8() -> Any:
    from torchao.quantization import Float8DynamicActivationInt4WeightConfig

    return Float8DynamicActivationInt4WeightConfig()


METHODS: dict[str, Method] = {
    "int8 plain": static_int8(None),
    "int8 smoothquant": static_int8(0.5),
    "int8 smoothquant alpha .75": static_int8(0.75),
    "int8 smoothquant alpha 1": static_int8(1.0),
    "int4-group128 plain": plain(lambda: intx(128)),
    "int4-group128 hqq": plain(lambda: hqq(128)),
    "int4-group128 awq": in_steps(awq(128), "prepare", "convert"),
    "int4-group128 gptq": in_steps(gptq, "observe", "convert"),
    "int4-group32 plain": plain(lambda: intx(32)),
    "int4-group32 hqq": plain(lambda: hqq(32)),
    "int4-group32 awq": in_steps(awq(32), "prepare", "convert"),
    "nvfp4-weight-only plain": plain(nvfp4_weights),
    "nvfp4 plain": in_steps(nvfp4, "prepare", "convert"),
    "mxfp4 plain": plain(mxfp4, torch.bfloat16),
    "w4a8 plain": plain(w4a8),
}

if __name__ == "__main__":
    main("torchao", METHODS)
