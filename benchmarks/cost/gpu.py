"""What simulation costs on a GPU, in ratios to the plain model, and whether a GPU rounds as the processor does.

    python -m benchmarks.cost.gpu [--recipes fp8 int8 nvfp4 mxfp4] [--batch-size 64] [--json]

The model is a vision tower in the shape of CLIP ViT-L/14 with random weights in bfloat16. Plain and simulated forward
passes take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import octavo

_WIDE = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
)


def tower(num_layers: int) -> nn.Module:
    """Random weights, the same each time."""
    torch.manual_seed(0)
    config = copy.deepcopy(_WIDE)
    config.num_hidden_layers = num_layers
    return CLIPVisionModel(config).eval().cuda().bfloat16()


def milliseconds(model: nn.Module, batch: Tensor) -> float:
    """Of one forward pass, on the GPU's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    model(pixel_values=batch)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@torch.inference_mode()
def measure(recipe: str, batch_size: int, num_layers: int, rounds: int) -> dict[str, float]:
    """Insert and calibrate once, then forward passes in turns."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(batch_size, 3, 224, 224, generator=generator).cuda().bfloat16()
    plain = tower(num_layers)
    twin = copy.deepcopy(plain)
    milliseconds(plain, batch)
    bare = [milliseconds(plain, batch) for _ in range(5)]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    data = [{"pixel_values": batch}] * 4
    start.record()
    octavo.quantize(twin, recipe, data)
    end.record()
    torch.cuda.synchronize()
    milliseconds(twin, batch)
    turns = [(milliseconds(plain, batch), milliseconds(twin, batch)) for _ in range(rounds)]
    return {
        "plain_ms": statistics.median(bare),
        "quantize_s": start.elapsed_time(end) / 1e3,
        "simulated_ratio": statistics.median(simulated / plain_ for plain_, simulated in turns),
    }


def main() -> None:
    """Reads the command line, prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["fp8", "fp8-attention", "int8", "nvfp4", "mxfp4"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    found = {recipe: measure(recipe, args.batch_size, args.layers, args.rounds) for recipe in args.recipes}
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    if args.json:
        print(json.dumps({"device": device, "recipes": found}))
        return
    print(f"{device}\n\n| recipe | plain forward, ms | simulated / plain | insert and calibrate 4 batches, s |")
    print("|---|---|---|---|")
    for recipe, of in found.items():
        print(f"| {recipe} | {of['plain_ms']:.1f} | {of['simulated_ratio']:.2f} | {of['quantize_s']:.2f} |")


if __name__ == "__main__":
    main()
