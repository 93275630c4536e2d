"""torchao's algorithms on CPU. See ``cell.py``; its MXFP4 wants a model in bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.peers.cell import Draw, Method, main
from torch import nn


def is_linear(module: nn.Module, name: str) -> bool:
    """Everything but the output head, which the other libraries leave alone, too."""
    return isinstance(module, nn.Linear) and "lm_head" not in name


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


def smoothquant(step: str) -> Any:
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor

    base = Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()])
    return SmoothQuantConfig(base, step, use_running_absmax=True)  # its other observer wants texts of one length


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
    "int8 smoothquant": in_steps(smoothquant, "prepare", "prepare_for_smoothquant_smoothing_factor", "convert"),
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
