"""One tool quantizes one graph: ``TOOL MODEL CALIBRATION OUT``; prints its seconds and its memory as JSON.

``TOOL`` is ``octavo RECIPE [OBSERVER]``, or a method of onnxruntime's own quantizers: ``onnxruntime MinMax``.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.onnx.measure import BATCH, measured

TARGET = "onnxruntime-cpu"
GROUP = 128


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


def reader_of(data: Any) -> Any:
    """The texts in batches, as onnxruntime's calibration wants them."""
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self.starts = iter(range(0, len(data["input_ids"]), BATCH))

        def get_next(self) -> Any:
            start = next(self.starts, None)
            return None if start is None else {name: data[name][start : start + BATCH] for name in data.files}

    return Reader()


def onnxruntime_static(model: Path, data: Any, out: Path, method: str) -> None:
    """onnxruntime's own: UINT8 activations, INT8 weights per channel in 7 bits, products with weights only."""
    from onnxruntime import quantization as q

    q.quantize_static(
        model,
        out,
        reader_of(data),
        quant_format=q.QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        calibrate_method=q.CalibrationMethod[method],
        extra_options={"MatMulConstBOnly": True},
    )


def onnxruntime_dynamic(model: Path, out: Path) -> None:
    """onnxruntime's own, ranges per call."""
    from onnxruntime import quantization as q

    q.quantize_dynamic(model, out, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True)


def onnxruntime_weights(model: Path, data: Any, out: Path, method: str) -> None:
    """onnxruntime's own INT4 weights in symmetric groups, stored for MatMulNBits."""
    from onnxruntime.quantization import matmul_nbits_quantizer as q

    import onnx

    logging.disable()
    match method:
        case "INT4":
            config: Any = q.DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=True, accuracy_level=4)
        case "HQQ":
            config = q.HQQWeightOnlyQuantConfig(block_size=GROUP)
        case "GPTQ":
            config = q.GPTQWeightOnlyQuantConfig(calibration_data_reader=reader_of(data), block_size=GROUP)
        case _:
            raise ValueError(method)
    made = q.MatMulNBitsQuantizer(
        onnx.load(model), block_size=GROUP, is_symmetric=True, accuracy_level=4, algo_config=config
    )
    made.process()
    made.model.save_model_to_file(str(out))


def main() -> None:
    tool, model, calibration, out = sys.argv[1], *map(Path, sys.argv[2:5])
    data = np.load(calibration)
    maker, *words = tool.split()
    _import(maker)
    work = octavo if maker == "octavo" else _onnxruntime
    cost = measured(lambda: work(model, data, out, *words))
    print(f"\n{json.dumps(cost)}")  # behind a progress bar that ends no line


def _import(maker: str) -> None:
    """What the tool will import, before memory is looked at."""
    if maker == "octavo":
        import octavo.onnx.check
        import octavo.onnx.door
        import octavo.pipeline  # noqa: F401
    else:
        import onnxruntime.quantization.matmul_nbits_quantizer  # noqa: F401


def _onnxruntime(model: Path, data: Any, out: Path, method: str) -> None:
    match method:
        case "MinMax" | "Entropy" | "Percentile":
            onnxruntime_static(model, data, out, method)
        case "dynamic":
            onnxruntime_dynamic(model, out)
        case _:
            onnxruntime_weights(model, data, out, method)


if __name__ == "__main__":
    main()
