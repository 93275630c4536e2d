"""How fast a weight becomes codes, scales and packed bytes, and how much memory that takes, on one thread.

    python -m benchmarks.cost.pack [--size 4096] [--rounds 5] [--json]

octavo with its compiled loops and without, and in the same process, taking turns, torchao and compressed-tensors.
octavo and torchao find the scales from the weight; compressed-tensors is given them, since it has no function for that.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import describe_machine, one_line
from torch import Tensor

from octavo.backends.compiled import CompiledBackend
from octavo.backends.compiled import pack as compiled_pack
from octavo.backends.inplace import InPlaceBackend
from octavo.backends.native import LIBRARY
from octavo.numerics import packing
from octavo.numerics.loops import Loops
from octavo.numerics.qtensor import QTensor, quantize
from octavo.spec.formats import tensor_format

FORMATS = {
    "INT8 per channel": "int8-channel",
    "FP8 per channel": "e4m3-channel",
    "INT4 groups of 128": "int4-group128",
    "NVFP4": "nvfp4",
    "MXFP4": "mxfp4",
}
GOALS_GB_S = {"octavo compiled": 0.3, "octavo eager": 0.05}
Work = Callable[[Tensor], Any]


@dataclass
class Case:
    """One library on one format."""

    library: str
    work: Work
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int = 0

    def run(self, weight: Tensor) -> None:
        """Once, timed."""
        start = time.perf_counter()
        self.work(weight)
        self.seconds.append(time.perf_counter() - start)


def octavo(name: str, loops: Loops, pack: Callable[[Tensor, int], Tensor]) -> Work:
    """Quantize, and pack codes and scales."""

    def packed(tensor: QTensor) -> list[Tensor]:
        inner = packed(tensor.scale) if isinstance(tensor.scale, QTensor) else []
        bits = tensor.format.element.bits
        return [pack(tensor.codes, bits) if bits < 8 else tensor.codes, *inner]

    return lambda weight: packed(quantize(weight, tensor_format(name), loops=loops))


def torchao(name: str) -> Work | None:
    """``None`` where it has nothing of the kind for a CPU."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

    match name:
        case "int8-channel":
            return lambda weight: Int8Tensor.from_hp(weight, PerRow())
        case "e4m3-channel":
            return lambda weight: Float8Tensor.from_hp(weight, granularity=PerRow())
        case "nvfp4":
            return lambda weight: NVFP4Tensor.to_nvfp4(
                weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max())
            )
        case "mxfp4":
            return lambda weight: MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
        case _:
            return None


def compressed_tensors(name: str, weight: Tensor) -> Work | None:
    """Its compressor of the format, given octavo's scales."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments, layout = {
        "int8-channel": ({"num_bits": 8, "strategy": "channel"}, "int-quantized"),
        "e4m3-channel": ({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized"),
        "int4-group128": ({"num_bits": 4, "strategy": "group", "group_size": 128}, "pack-quantized"),
        "nvfp4": (
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, "nvfp4-pack-quantized",
        ),
        "mxfp4": ({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, "mxfp4-pack-quantized"),
    }[name]  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(layout)
    scale = quantize(weight, tensor_format(name)).scale
    tensors: dict[str, Tensor] = {}
    while isinstance(scale, QTensor):
        if isinstance(scale.scale, Tensor):
            tensors["weight_global_scale"] = (1 / scale.scale).reshape(1)
            scale = scale.dequantize() / scale.scale
        else:
            scale = scale.dequantize()
    assert scale is not None
    tensors["weight_scale"] = scale.unsqueeze(1) if scale.ndim == 1 else scale
    return lambda weight: compressor.compress({"weight": weight, **tensors}, scheme)


def cases(name: str, weight: Tensor) -> Iterator[Case]:
    """Everybody who can do the format."""
    yield Case("octavo compiled", octavo(name, CompiledBackend(), lambda codes, bits: _compiled(codes, bits)))
    yield Case("octavo eager", octavo(name, InPlaceBackend(), packing.pack))
    for package, found in (("torchao", torchao(name)), ("compressed-tensors", compressed_tensors(name, weight))):
        if found is not None:
            yield Case(f"{package} {version(package)}", found)


def _compiled(codes: Tensor, bits: int) -> Tensor:
    packed = compiled_pack(codes, bits)
    assert packed is not None, LIBRARY.reason
    return packed


def extra_bytes(work: Work, weight: Tensor) -> int:
    """Growth of this process's resident memory at the peak, the result included. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system: else it would be taken from there unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    result = work(weight)
    peak = _resident("VmHWM")
    del result
    return peak - before


def _resident(which: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def measure(size: int, num_rounds: int) -> dict[str, list[Case]]:
    """Every format's cases, taking turns."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02
    measured: dict[str, list[Case]] = {}
    for words, name in FORMATS.items():
        measured[words] = list(cases(name, weight))
        for case in measured[words]:
            case.work(weight)
            case.extra_bytes = extra_bytes(case.work, weight)
        for _ in range(num_rounds):
            for case in measured[words]:
                case.run(weight)
    return measured


def table(measured: dict[str, list[Case]], num_bytes: int) -> str:
    """Markdown: GB of fp32 weight per second, and peak extra memory in sizes of the weight."""
    lines = ["| format | library | GB/s, median (min to max) | peak extra memory / weight | goal |", "|---|" * 1]
    lines[1] = "| --- | --- | --- | --- | --- |"
    for words, found in measured.items():
        for case in found:
            rates = sorted(num_bytes / second / 1e9 for second in case.seconds)
            rate = f"{statistics.median(rates):.2f} ({rates[0]:.2f} to {rates[-1]:.2f})"
            aim = f"at least {GOALS_GB_S[case.library]} GB/s, at most 3" if case.library in GOALS_GB_S else ""
            lines.append(f"| {words} | {case.library} | {rate} | {case.extra_bytes / num_bytes:.2f} | {aim} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    machine = describe_machine()
    if not LIBRARY.wait():
        raise SystemExit(f"no compiled loops: {LIBRARY.reason}")
    with torch.no_grad():
        measured = measure(args.size, args.rounds)
    num_bytes = 4 * args.size**2
    if args.json:
        results = {words: [{**vars(case), "work": ""} for case in found] for words, found in measured.items()}
        print(json.dumps({"machine": machine, "weight_bytes": num_bytes, "results": results}, indent=1))
        return
    print(one_line(machine))
    print(f"fp32 weight of {args.size} x {args.size}, {args.rounds} rounds, one thread\n")
    print(table(measured, num_bytes))


if __name__ == "__main__":
    main()
