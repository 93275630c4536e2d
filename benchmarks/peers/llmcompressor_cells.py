"""llm-compressor's algorithms on CPU. See ``cell.py``.

Mappings for scales that are folded are its own where it knows the architecture. A BERT's norms also feed the residual,
so that nothing can be folded into them; what is left for AWQ there are values and the output of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers.cell import Draw, Method, main
from torch import nn

_HEAD = ["lm_head"]
_INT8 = {
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"},
}
_INT4_32 = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}
_W4A8 = {
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
    "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
}


def _scheme(scheme: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(scheme, str):
        return {"targets": "Linear", "scheme": scheme, "ignore": _HEAD}
    return {"config_groups": {"all": {"targets": ["Linear"], **scheme}}, "ignore": _HEAD}


def plain(scheme: str | dict[str, Any], _: nn.Module) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(**_scheme(scheme))]


def gptq(scheme: str | dict[str, Any], _: nn.Module) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return [GPTQModifier(**_scheme(scheme))]


def awq(scheme: str | dict[str, Any], model: nn.Module) -> list[Any]:
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    is_bert = "Bert" in type(model).__name__
    values = [AWQMapping("re:.*self.value$", ["re:.*attention.output.dense$"])] if is_bert else None
    return [AWQModifier(mappings=values, duo_scaling="both"), *plain(scheme, model)]


def smoothed_gptq(scheme: str | dict[str, Any], model: nn.Module, strength: float = 0.5) -> list[Any]:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if "Bert" in type(model).__name__:
        raise ValueError("norms feed the residual, nothing can be folded")
    return [SmoothQuantModifier(smoothing_strength=strength), *gptq(scheme, model)]


def smoothed_more_gptq(scheme: str | dict[str, Any], model: nn.Module) -> list[Any]:
    return smoothed_gptq(scheme, model, 0.9)


def smoothed(scheme: str | dict[str, Any], model: nn.Module) -> list[Any]:
    return [smoothed_gptq(scheme, model)[0], *plain(scheme, model)]


def oneshot(modifiers: Callable[[Any, nn.Module], list[Any]], scheme: str | dict[str, Any]) -> Method:
    """By modifiers, one block after the other, as it does by default."""

    def quantize(model: nn.Module, draw: Draw) -> nn.Module:
        from llmcompressor import oneshot
        from torch.utils.data import DataLoader

        oneshot(
            model=model,
            tokenizer=draw.subject.tokenizer,
            dataset=DataLoader(draw.batches, batch_size=None),
            recipe=modifiers(scheme, model),
            num_calibration_samples=len(draw.batches),
        )
        return model

    return quantize


METHODS: dict[str, Method] = {
    "int8 plain": oneshot(plain, _INT8),
    "int8 smoothquant": oneshot(smoothed, _INT8),
    "int8 gptq": oneshot(gptq, _INT8),
    "int8 smoothquant+gptq": oneshot(smoothed_gptq, _INT8),
    "int8 smoothquant .9+gptq": oneshot(smoothed_more_gptq, _INT8),
    "int4-group128 awq": oneshot(awq, "W4A16"),
    "int4-group128 gptq": oneshot(gptq, "W4A16"),
    "int4-group32 awq": oneshot(awq, _INT4_32),
    "int4-group32 gptq": oneshot(gptq, _INT4_32),
    "nvfp4-weight-only gptq": oneshot(gptq, "NVFP4A16"),
    "nvfp4-weight-only plain": oneshot(plain, "NVFP4A16"),
    "nvfp4 plain": oneshot(plain, "NVFP4"),
    "nvfp4 awq": oneshot(awq, "NVFP4"),
    "nvfp4 gptq": oneshot(gptq, "NVFP4"),
    "mxfp4 plain": oneshot(plain, "MXFP4"),
    "mxfp4 gptq": oneshot(gptq, "MXFP4"),
    "w4a8 awq": oneshot(awq, _W4A8),
    "w4a8 gptq": oneshot(gptq, _W4A8),
}

if __name__ == "__main__":
    main("llmcompressor", METHODS)
