"""ModelOpt on the models of ``tests/zoo``: ``benchmarks/quality/coverage.py`` runs this in the peer's own venv.

Knows nothing of octavo. Prints one JSON object as its last line. A weight counts as covered when its quantizer, alone
at two bits, changes an output of the model.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))


def floats(value: Any) -> Iterator[Tensor]:
    """Every floating tensor in a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floats(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from floats(item)
    elif type(value).__module__.startswith("diffusers"):
        yield from floats(vars(value))


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return torch.cat([t.flatten().float() for t in floats(model(**batch))])


def weight_of(model: nn.Module, quantizer: str) -> tuple[str, int]:
    """Key of the weight that a quantizer serves, and how many of its values: a list has one for each expert."""
    path, _, name = quantizer.rpartition(".")
    parts = 1
    if name.isdigit():
        parts = len(model.get_submodule(path))
        path, _, name = path.rpartition(".")
        name = name.removesuffix("s")
    parameter = name.removesuffix("weight_quantizer").rstrip("_") or "weight"
    tensor = model.get_submodule(path)._parameters.get(parameter)
    return f"{path}.{parameter}", 0 if tensor is None else tensor.numel() // parts


def covered(name: str) -> dict[str, Any]:
    """One model of the zoo under the peer's default FP8 configuration."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    from zoo.table import made

    model, batch = made(name)
    total = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda m: m(**batch))
    seconds = time.perf_counter() - start
    found = {p: q for p, q in model.named_modules() if isinstance(q, TensorQuantizer) and q.is_enabled}
    for quantizer in found.values():
        quantizer.disable()
    before = outputs(model, batch)
    acting: dict[str, int] = {}
    inert, blind = [], [path for path, q in found.items() if "weight" not in path and getattr(q, "_amax", None) is None]
    for path, quantizer in found.items():
        if "weight_quantizer" not in path:
            continue
        quantizer.enable()
        quantizer.num_bits = 2
        if torch.equal(outputs(model, batch), before):
            inert.append(path)
        else:
            key, count = weight_of(model, path)
            acting[key] = acting.get(key, 0) + count
        quantizer.disable()
    return {
        "parameters": total,
        "covered": sum(acting.values()) / total,
        "quantizers": len(found),
        "inert": len(inert),
        "blind": len(blind),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    results: dict[str, Any] = {}
    for name in parser.parse_args().models:
        try:
            results[name] = covered(name)
        except Exception as error:  # what the peer cannot do is a result, too
            results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    import modelopt

    print(json.dumps({"version": modelopt.__version__, "models": results}))


if __name__ == "__main__":
    main()
