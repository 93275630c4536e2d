"""Bytes of TensorRT's engines, quantized and in fp16, held against the plan's account; no GPU is needed.

    python -m benchmarks.onnx.engines [--cases clip-vision clip-text] [--recipes fp8 fp8-attention] [--json]

Models have real shapes and random weights. The fp16 engine is that of the unquantized model in fp16, the quantized one
has fp16 for all that is not quantized. "account" is what the plan says that quantizing saves. It is held against what
the weights in the second engine have less than those in the first, by TensorRT's count ("off"). The whole engines stand
beside it: those of TensorRT for RTX hold the source of kernels, too, of which quantized ones have more.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import describe_machine, one_line
from torch import nn

from octavo import pipeline
from octavo.onnx.engine import Engine
from octavo.onnx.from_torch import graph_of
from octavo.onnx.stages import stages
from octavo.onnx.tensorrt import build_engines
from octavo.onnx.write import save
from octavo.sources.models import describe_module
from octavo.spec.plan import Plan

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One model in one recipe.

    Args:
        case: The model.
        recipe: The preset.
        architecture: What the engines are for.
        fp16: The unquantized engine.
        engine: The quantized one.
        account_bytes: What the plan says that is saved against fp16.
    """

    case: str
    recipe: str
    architecture: str
    fp16: Engine
    engine: Engine
    account_bytes: int

    @property
    def weights_off(self) -> float:
        """How far what the weights have less is from the account."""
        return (self.fp16.weight_bytes - self.engine.weight_bytes) / self.account_bytes - 1

    @property
    def ratio(self) -> float:
        """Bytes of the quantized engine for each byte of that in fp16."""
        return self.engine.num_bytes / self.fp16.num_bytes

    @property
    def engines_off(self) -> float:
        """How far what the whole engine has less is from the account."""
        return (self.fp16.num_bytes - self.engine.num_bytes) / self.account_bytes - 1


def clip_vision() -> tuple[nn.Module, Batch]:
    """The image tower of CLIP ViT-L/14."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPVisionConfig(image_size=224, patch_size=14, projection_dim=768, **sizes)
    return CLIPVisionModelWithProjection(config), {"pixel_values": torch.randn(2, 3, 224, 224)}


def clip_text() -> tuple[nn.Module, Batch]:
    """The text tower of CLIP ViT-L/14."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    ids = torch.randint(0, 49000, (2, 77))
    ids[:, -1] = 49407
    return CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=768, **sizes)), {"input_ids": ids}


def vit_small() -> tuple[nn.Module, Batch]:
    """A vision transformer with the sizes of ViT-S/16: 43 MB in fp16."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    return ViTModel(ViTConfig(**sizes), add_pooling_layer=False), {"pixel_values": torch.randn(2, 3, 224, 224)}


def two_layers() -> tuple[nn.Module, Batch]:
    """Two layers of the width of ViT-L: 51 MB in fp16."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16}
    config = ViTConfig(image_size=64, patch_size=16, **sizes)
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(2, 3, 64, 64)}


def convolutions() -> tuple[nn.Module, Batch]:
    """Plain 3x3 convolutions, 256 and 512 channels wide: 30 MB in fp16."""
    widths = [3, 64, 256, 512, 512, 512, 512, 512, 512]
    parts: list[nn.Module] = []
    for k, (before, after) in enumerate(pairwise(widths)):
        parts += [nn.Conv2d(before, after, 3, padding=1, stride=2 if k in (1, 2) else 1), nn.ReLU()]
    return nn.Sequential(*parts), {"input": torch.randn(2, 3, 32, 32)}


RECIPES = ("fp8", "fp8-attention", "int8", "int8-weight-only", "int4-group", "nvfp4-weight-only")
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Batch]], tuple[str, ...]]] = {
    "clip-vision": (clip_vision, ("fp8", "fp8-attention")),
    "clip-text": (clip_text, ("fp8", "fp8-attention")),
    "vit-small": (vit_small, RECIPES),
    "two-layers": (two_layers, RECIPES),
    "convolutions": (convolutions, ("fp8", "int8", "int8-weight-only")),
}


def measure(case: str, recipes: Iterable[str], architecture: str, place: Path) -> Iterator[Row]:
    """Engines of one model in fp16 and in every recipe."""
    torch.manual_seed(0)
    model, batch = CASES[case][0]()
    model.eval().requires_grad_(False)
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    reference = _fp16_engine(model, batch, place / "fp16.onnx", shapes, architecture)
    for recipe in recipes:
        run = pipeline.quantize(model, recipe, [_given(model, batch)], target="tensorrt")
        sample = _given(model, batch)
        out = pipeline.export(run, place / recipe, layout="onnx", sample=sample, dtype=torch.float16)
        (graph,) = out.glob("*.onnx")
        engine = build_engines(graph, shapes, [architecture])[architecture]
        yield Row(case, recipe, architecture, reference, engine, account(run.plan))
        run.door.strip()


def account(plan: Plan) -> int:
    """Bytes that the plan saves against the same weights in fp16."""
    quantized = {d.site.name: d for d in plan.decisions if d.weight is not None}.values()
    return sum(
        2 * d.site.num_weights - d.weight.format.stored_bytes(d.site.weight_shape) for d in quantized if d.weight
    )


def _given(model: nn.Module, batch: Batch) -> Any:
    """A batch as a plain module or one of transformers takes it."""
    return next(iter(batch.values())) if isinstance(model, nn.Sequential) else batch


def _fp16_engine(model: nn.Module, batch: Batch, path: Path, shapes: Any, architecture: str) -> Engine:
    half = {name: value.half() if value.is_floating_point() else value for name, value in batch.items()}
    model.half()
    (stage,) = stages(describe_module(model), _given(model, half))
    save(graph_of(stage), path)
    model.float()
    engine = build_engines(path, shapes, [architecture])[architecture]
    path.unlink()
    assert engine.num_bytes, engine.problem
    return engine


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["vit-small", "convolutions"])
    parser.add_argument("--recipes", nargs="+", help="instead of those of the case")
    parser.add_argument("--architecture", default="Blackwell (SM120)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    machine = describe_machine() | {"tensorrt-rtx": version("tensorrt-rtx")}
    rows = []
    if not given.json:
        print(one_line(machine))
        print(
            f"{'MB':34}{'weights':>17}{'account':>9}{'off %':>7}{'engines':>17}{'ratio':>7}{'off %':>7}  not as asked"
        )
    for case in given.cases:
        with tempfile.TemporaryDirectory(prefix="octavo-engines-") as place:
            for row in measure(case, given.recipes or CASES[case][1], given.architecture, Path(place)):
                rows.append(asdict(row))
                if not given.json:
                    print(_line(row), flush=True)
    if given.json:
        print(json.dumps({"machine": machine, "results": rows}, indent=1))


def _line(row: Row) -> str:
    engine = row.engine
    left = f"{len(engine.wide_weights)} weights wide, {len(engine.float_products)} products in float, "
    left += f"{len(engine.unfused_attention)} attention not fused"
    weights = f"{row.fp16.weight_bytes / 1e6:9.1f}{engine.weight_bytes / 1e6:8.1f}{row.account_bytes / 1e6:9.1f}"
    sizes = f"{row.fp16.num_bytes / 1e6:9.1f}{engine.num_bytes / 1e6:8.1f}{row.ratio:7.3f}"
    return (
        f"{row.case:14}{row.recipe:20}{weights}{100 * row.weights_off:7.1f}{sizes}{100 * row.engines_off:7.1f}"
        f"  {engine.problem or engine.needs or left}"
    )


if __name__ == "__main__":
    main()
