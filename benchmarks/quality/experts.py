"""What scales do for experts in one tensor whose inputs have outliers: ``python -m benchmarks.quality.experts``.

Tiny models of transformers with random weights; one channel in sixteen of what experts and their second matrices read
is 50 times as large as the others. A figure is the squared error that quantization adds to the logits, over their
squares, on the texts that it was calibrated with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import describe_machine, one_line
from torch import Tensor, nn

import octavo
from octavo.spec.recipe import Recipe
from octavo.spec.steps import make_step

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

MODELS = ("mixtral", "qwen3_moe", "olmoe")
STEPS: dict[str, tuple[Any, ...]] = {
    "rounded to nearest": (),
    "scale_search (Gram matrix)": (make_step("scale_search", {"measure": "gram"}),),
    "awq": (make_step("awq"),),
    "gptq": (make_step("gptq"),),
    "awq without clip, gptq": (make_step("awq", {"clip": False}), make_step("gptq")),
    "smoothquant": (make_step("smoothquant"),),
    "smoothquant, alpha: search": (make_step("smoothquant", {"alpha": "search"}),),
    "rotate": (make_step("rotate"),),
}
FORMATS = {
    "INT4 weights per channel": {"weight": "int4-channel"},
    "INT8, static inputs": {"weight": "int8-channel", "input": "int8-tensor"},
}


def logits(model: nn.Module, data: list[dict[str, Any]]) -> Tensor:
    """Of all texts."""
    with torch.no_grad():
        return torch.cat([model(**batch)[0] for batch in data])


def lost(name: str, scheme: dict[str, str], steps: tuple[Any, ...]) -> float:
    """What quantization adds to the logits of a model with planted outliers."""
    from algorithms.outliers import plant_experts
    from zoo.table import made

    model, batch = made(name)
    generator = torch.Generator().manual_seed(5)
    data = [{**batch, "input_ids": torch.randint(3, 64, (4, 24), generator=generator)} for _ in range(3)]
    plain = logits(model.eval(), data)
    plant_experts(model)
    octavo.quantize(model, Recipe("r", ()).quantize("operation:linear", **scheme).with_steps(*steps), data)
    return float((logits(model, data) - plain).square().sum() / plain.square().sum())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object instead")
    parser.add_argument("--models", nargs="+", default=MODELS, help="of tests/zoo, built like Mixtral")
    options = parser.parse_args()
    rows = {
        f"{kind}, {what}": {name: lost(name, scheme, steps) for name in options.models}
        for kind, scheme in FORMATS.items()
        for what, steps in STEPS.items()
    }
    if options.json:
        print(json.dumps({"machine": describe_machine(), "lost": rows}))
        return
    print(one_line(describe_machine()))
    print(f"| | {' | '.join(options.models)} |\n| --- |{' --- |' * len(options.models)}")
    for what, figures in rows.items():
        print(f"| {what} | {' | '.join(f'{value:.3f}' for value in figures.values())} |")


if __name__ == "__main__":
    main()
