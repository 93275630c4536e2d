"""Block formats as ModelOpt writes them, on CPU: ``PEER_PYTHON -m benchmarks.peers.modelopt_blocks DIR``.

It calls the functions that ModelOpt 0.47's export calls for one weight, with the result laid out as a checkpoint, and
adds what ModelOpt says the codes mean. ``tests/golden/modelopt_blocks`` was made by it; tests don't need the peer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from modelopt.torch.export.quant_utils import get_scaling_factor_from_weight, pack_int4_in_uint8
from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import save_file

ALGORITHMS = {
    "nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "mxfp4": {"quant_algo": "MXFP4", "group_size": 32},
    "mxfp8": {"quant_algo": "MXFP8", "group_size": 32},
    "int4": {"quant_algo": "W4A16_AWQ", "group_size": 32, "has_zero_point": False, "pre_quant_scale": False},
}


def main(out: Path) -> None:
    """Write the checkpoint and, beside it, the weight and its values in each format."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-64, 65, (4, 64), generator=generator) / 32
    weight = weight * torch.tensor([1.0, 0.03125, 7.0, 0.0])[:, None]
    tensors, values = {}, {"weight": weight}

    second = weight.abs().amax().float() / (6 * 448)
    scale, _ = NVFP4QTensor.get_weights_scaling_factor(weight, 16, second)
    codes = NVFP4QTensor.quantize(weight, 16, scale, second)[0]
    tensors |= {"nvfp4.weight": codes._quantized_data, "nvfp4.weight_scale": scale, "nvfp4.weight_scale_2": second}
    blocks = {"block_sizes": {-1: 16}}
    values["nvfp4"] = codes.dequantize(dtype=torch.float32, scale=scale, double_scale=second, **blocks)

    codes, exponents = MXFP4QTensor.quantize(weight, 32)
    tensors |= {"mxfp4.weight": codes._quantized_data, "mxfp4.weight_scale": exponents.reshape(4, 2)}
    values["mxfp4"] = codes.dequantize(dtype=torch.float32, scale=exponents, block_sizes={-1: 32})

    exponents = MXFP8QTensor.get_weights_scaling_factor(weight)
    tensors |= {"mxfp8.weight": MXFP8QTensor.quantize_with_scale(weight, exponents), "mxfp8.weight_scale": exponents}

    scale = get_scaling_factor_from_weight(weight, 32)
    tensors |= {"int4.weight": pack_int4_in_uint8(weight, scale, 32), "int4.weight_scale": scale}

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in values.items()}, out / "values.safetensors")
    quantization = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": ALGORITHMS}
    config = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    (out / "hf_quant_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
