"""ModelOpt's ONNX door on one graph, in the peer's own venv.

    PEER/bin/python -m benchmarks.peers.modelopt_onnx METHOD MODEL CALIBRATION OUT

``METHOD`` is ``int8``, or one of its INT4 methods: ``rtn_dq``, ``awq_lite``, ``awq_clip``, ``awq_full``. Knows nothing
of octavo. Prints seconds and memory as JSON, as its last line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
from benchmarks.onnx.measure import BATCH, measured


def reader_of(data: dict[str, Any]) -> Any:
    """The texts in batches, as its calibration wants them; it goes over them by ``for``."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.starts = iter(range(0, len(data["input_ids"]), BATCH))

        def get_next(self) -> Any:
            start = next(self.starts, None)
            return None if start is None else {name: rows[start : start + BATCH] for name, rows in data.items()}

    return Reader()


def quantize_graph(method: str, model: Path, data: dict[str, Any], out: Path) -> None:
    """Its own defaults, but for floats, which stay in fp32, and Gemm, whose INT4 form onnxruntime refuses to run."""
    from modelopt.onnx.quantization import quantize

    import onnx

    if method == "int8":
        chosen = {"calibration_data": data, "calibration_method": "max", "op_types_to_quantize": ["MatMul"]}
    else:
        left = [node.name for node in onnx.load(model).graph.node if node.op_type == "Gemm"]
        chosen = {"calibration_data_reader": reader_of(data), "calibration_method": method, "block_size": 128}
        chosen["nodes_to_exclude"] = left
    quantize(
        str(model),
        quantize_mode="int8" if method == "int8" else "int4",
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(out),
        **chosen,
    )


def main() -> None:
    method, model, calibration, out = sys.argv[1], *map(Path, sys.argv[2:5])
    import modelopt.onnx.quantization  # noqa: F401

    loaded = np.load(calibration)
    data = {name: loaded[name] for name in loaded.files}
    with tempfile.TemporaryDirectory() as place:
        own = Path(copyfile(model, Path(place, "model.onnx")))  # it writes into its input
        print(json.dumps(measured(lambda: quantize_graph(method, own, data, out))))


if __name__ == "__main__":
    main()
