"""One tool quantizes one graph: ``worker.py TOOL MODEL CALIBRATION OUT``; prints its seconds and its memory as JSON."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

TARGET = "onnxruntime-cpu"
BATCH = 8


def octavo(model: Path, data: Any, out: Path, recipe: str, observer: str = "") -> None:
    """The ONNX door; for any x86 processor, so weights in 7 bits."""
    import torch

    from octavo import pipeline
    from octavo.sources import open_model
    from octavo.spec.recipe import load_recipe

    wanted = load_recipe(recipe)
    wanted = wanted.with_observer(observer) if observer else wanted
    rows = {name: torch.from_numpy(data[name]) for name in data.files}
    starts = range(0, len(rows["input_ids"]), BATCH)
    batches = [{name: values[i : i + BATCH] for name, values in rows.items()} for i in starts]
    pipeline.export_graph(pipeline.quantize(open_model(model), wanted, batches, target=TARGET), out)


def onnxruntime_static(model: Path, data: Any, out: Path, method: str) -> None:
    """onnxruntime's own: UINT8 activations, INT8 weights per channel in 7 bits, products with weights only."""
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.starts = iter(range(0, len(data["input_ids"]), BATCH))

        def get_next(self) -> Any:
            start = next(self.starts, None)
            return None if start is None else {name: data[name][start : start + BATCH] for name in data.files}

    q.quantize_static(
        model,
        out,
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        calibrate_method=q.CalibrationMethod[method],
        extra_options={"MatMulConstBOnly": True},
    )


def onnxruntime_dynamic(model: Path, data: Any, out: Path) -> None:
    """onnxruntime's own, ranges per call."""
    from onnxruntime import quantization as q

    q.quantize_dynamic(model, out, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True)


def modelopt(model: Path, data: Any, out: Path) -> None:
    """nvidia-modelopt's ONNX door."""
    from modelopt.onnx.quantization import quantize

    quantize(
        str(model),
        quantize_mode="int8",
        calibration_data={name: data[name] for name in data.files},
        calibration_method="max",
        calibration_eps=["cpu"],
        op_types_to_quantize=["MatMul"],
        output_path=str(out),
    )


def megabytes(key: str) -> float:
    """Of this process, by the kernel's account: ``VmRSS`` now, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    tool, model, calibration, out = sys.argv[1], *map(Path, sys.argv[2:5])
    work = {
        "octavo int8": lambda d: octavo(model, d, out, "int8"),
        "octavo int8 entropy": lambda d: octavo(model, d, out, "int8", "entropy"),
        "octavo int8-dynamic": lambda d: octavo(model, d, out, "int8-dynamic"),
        "onnxruntime static": lambda d: onnxruntime_static(model, d, out, "MinMax"),
        "onnxruntime entropy": lambda d: onnxruntime_static(model, d, out, "Entropy"),
        "onnxruntime dynamic": lambda d: onnxruntime_dynamic(model, d, out),
        "modelopt int8": lambda d: modelopt(model, d, out),
    }[tool]
    data = np.load(calibration)
    _import(tool)
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of the imports
    start = time.perf_counter()
    work(data)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_megabytes": megabytes("VmHWM") - before}))


def _import(tool: str) -> None:
    """What the tool will import, before memory is looked at."""
    match tool.split()[0]:
        case "octavo":
            import octavo.onnx.check
            import octavo.onnx.door
            import octavo.pipeline  # noqa: F401
        case "onnxruntime":
            import onnxruntime.quantization  # noqa: F401
        case "modelopt":
            import modelopt.onnx.quantization  # noqa: F401


if __name__ == "__main__":
    main()
