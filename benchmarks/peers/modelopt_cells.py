"""ModelOpt's algorithms on CPU. See ``cell.py``; the inputs of norms are left alone, as the other libraries do."""

from __future__ import annotations

import copy
from typing import Any

from benchmarks.peers.cell import Draw, Method, main
from torch import nn

_NORMS = {"quantizer_name": "*LayerNorm*", "enable": False}


def config(name: str, algorithms: str | None = None, *, block: int | None = None) -> Method:
    """By one of its configurations, with other algorithms one after another (``a+b``), or other groups for weights."""

    def quantize(model: nn.Module, draw: Draw) -> nn.Module:
        import modelopt.torch.quantization as mtq

        chosen: dict[str, Any] = copy.deepcopy(getattr(mtq, name))
        chosen["quant_cfg"] = [*chosen["quant_cfg"], _NORMS]
        if block is not None:
            for entry in chosen["quant_cfg"]:
                if "weight" in entry.get("quantizer_name", "") and "block_sizes" in (entry.get("cfg") or {}):
                    entry["cfg"]["block_sizes"] = {-1: block}
        if algorithms is not None:
            chosen["algorithm"] = [_algorithm(part, model) for part in algorithms.split("+")]
        mtq.quantize(model, chosen, draw.run)
        return model

    return quantize


def _algorithm(method: str, model: nn.Module) -> dict[str, Any]:
    """GPTQ goes block by block where ModelOpt finds blocks, which it does not in a BERT."""
    by_block = method == "gptq" and "Bert" not in type(model).__name__
    return {"method": method, **({"layerwise": {"enable": True}} if by_block else {})}


METHODS: dict[str, Method] = {
    "int8 plain": config("INT8_DEFAULT_CFG"),
    "int8 smoothquant": config("INT8_SMOOTHQUANT_CFG"),
    "int8 smoothquant+gptq": config("INT8_SMOOTHQUANT_CFG", "smoothquant+gptq"),
    **{
        f"int4-group{block} {algorithm}": config("INT4_AWQ_CFG", algorithm, block=block)
        for block in (128, 32)
        for algorithm in ("awq_lite", "awq_clip", "awq_full", "gptq", "awq_lite+gptq")
    },
    "nvfp4-weight-only plain": config("W4A16_NVFP4_CFG"),
    "nvfp4 plain": config("NVFP4_DEFAULT_CFG"),
    "nvfp4 awq_lite": config("NVFP4_AWQ_LITE_CFG"),
    "nvfp4 svdquant": config("NVFP4_SVDQUANT_DEFAULT_CFG"),
    "mxfp4 plain": config("MXFP4_DEFAULT_CFG"),
    "w4a8 awq": config("W4A8_AWQ_BETA_CFG"),
    "w4a8 gptq": config("W4A8_AWQ_BETA_CFG", "gptq"),
}

if __name__ == "__main__":
    main("nvidia-modelopt", METHODS)
