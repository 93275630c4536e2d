"""AutoRound on CPU: learned rounding, all in fp32. See ``cell.py``.

It has its default of 200 iterations. A batch is one text, and gradients are gathered over eight: texts of a sentence
encoder differ in length.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.cell import Draw, Method, main
from torch import nn

ITERATIONS = 200
_STATIC = {"act_bits": 8, "act_group_size": 0, "act_dynamic": False, "act_sym": True}


def learned(scheme: str | dict[str, Any]) -> Method:
    """By a scheme of its own, or one that is spelt out."""

    def quantize(model: nn.Module, draw: Draw) -> nn.Module:
        import torch
        from auto_round import AutoRound
        from auto_round.schemes import QuantizationScheme

        chosen = scheme if isinstance(scheme, str) else QuantizationScheme.from_dict(scheme)
        rows = [
            {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()} for row in draw.rows()
        ]
        rounder = AutoRound(
            model,
            draw.subject.tokenizer,
            scheme=chosen,
            dataset=rows,
            iters=ITERATIONS,
            seqlen=1,
            nsamples=len(rows),
            batch_size=1,
            gradient_accumulate_steps=8,
            enable_torch_compile=False,
            amp=False,
            device_map="cpu",
        )
        return rounder.quantize()[0]

    return quantize


METHODS: dict[str, Method] = {
    "int8 autoround": learned(
        {"bits": 8, "group_size": -1, "sym": True, "data_type": "int", "act_data_type": "int", **_STATIC}
    ),
    "int4-group128 autoround": learned("W4A16"),
    "int4-group32 autoround": learned("W4A16G32"),
    "nvfp4-weight-only autoround": learned({"bits": 4, "group_size": 16, "data_type": "nv_fp", "act_bits": 16}),
    "nvfp4 autoround": learned("NVFP4"),
    "mxfp4 autoround": learned("MXFP4"),
    "w4a8 autoround": learned(
        {"bits": 4, "group_size": 128, "sym": True, "data_type": "int", "act_data_type": "fp", **_STATIC}
    ),
}

if __name__ == "__main__":
    main("auto-round", METHODS)
