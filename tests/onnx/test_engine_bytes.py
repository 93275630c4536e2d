"""What an engine of TensorRT has less than the one in fp16 is what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.onnx import engines

from octavo.onnx.tensorrt import is_installed

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason="needs the extra 'tensorrt'")]


def test_saved_bytes_are_those_of_the_plan(tmp_path: Path) -> None:
    rows = list(engines.measure("two-layers", ["fp8", "int4-group"], "Blackwell (SM120)", tmp_path))
    assert len(rows) == 2
    for row in rows:
        assert row.fp16.weight_bytes > 20e6
        assert not row.engine.wide_weights
        assert abs(row.off) < 0.1
        assert abs(row.weights_off) < 0.02  # scales of groups are fp16 there, and fp32 in the account
