"""8-bit weights on processors without VNNI: both doors simulate what onnxruntime computes there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from octavo import pipeline
from octavo.backends.saturation import exact_sums
from octavo.sources import open_model

X = torch.rand(16, 6, 9, 9, generator=torch.Generator().manual_seed(1)) * 4 - 1
EMULATOR = "qemu-x86_64"
RUN = """
import numpy, onnxruntime, sys
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {session.get_inputs()[0].name: numpy.load(sys.argv[2])})[0])
"""


class Net(nn.Module):
    """Weights that point the same way, so that neighbours reach the end together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 16, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(64, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(parameter.abs().mean())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(torch.relu(self.grouped(torch.relu(self.conv(x)))))
        out: torch.Tensor = self.second(torch.relu(self.first(x.flatten(2).transpose(1, 2))))
        return out


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("graphs") / "net.onnx"
    program = torch.onnx.export(Net().eval(), (X,), dynamo=True, opset_version=18, dynamic_shapes=({0: "n"},))
    assert program is not None
    program.save(path)
    return path


def outputs(run: pipeline.Run) -> torch.Tensor:
    with torch.no_grad():
        found = run.model(X)
    return found if isinstance(found, torch.Tensor) else next(iter(found.values()))


@pytest.mark.parametrize(("recipe", "share"), [("int8", 0.05), ("int8-dynamic", 0.01)])
def test_both_doors_lose_the_same(file: Path, recipe: str, share: float) -> None:
    runs = [pipeline.quantize(m, recipe, [X], target="onnxruntime-cpu-avx2") for m in (Net().eval(), open_model(file))]
    assert all("sums saturate on x86 processors" in " ".join(run.plan.warnings) for run in runs)
    saturated = [outputs(run) for run in runs]
    with exact_sums():
        exact = [outputs(run) for run in runs]
    gone = [(a - b).norm() for a, b in zip(saturated, exact, strict=True)]
    assert gone[0] > share * exact[0].norm()
    assert (saturated[0] - saturated[1]).norm() < 0.1 * gone[0]


def test_seven_bits_and_vnni_lose_nothing(file: Path) -> None:
    for target in ("onnxruntime-cpu", "onnxruntime-cpu-vnni"):
        run = pipeline.quantize(open_model(file), "int8", [X], target=target)
        assert not any("saturate" in warning for warning in run.plan.warnings)
        found = outputs(run)
        with exact_sums():
            assert torch.equal(outputs(run), found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} emulates a processor without VNNI")
@pytest.mark.parametrize(("recipe", "share"), [("int8", 0.05), ("int8-dynamic", 0.01)])
def test_onnxruntime_on_such_a_processor_computes_what_was_simulated(tmp_path: Path, recipe: str, share: float) -> None:
    run = pipeline.quantize(Net().eval(), recipe, [X], target="onnxruntime-cpu-avx2")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=X)
    np.save(tmp_path / "x.npy", X.numpy())
    python = str(Path(sys.executable).resolve())
    command = [EMULATOR, "-cpu", "Haswell", python, "-c", RUN, str(out / "model.onnx"), str(tmp_path / "x.npy")]
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([*command, str(tmp_path / "y.npy")], check=True, env={**os.environ, "PYTHONPATH": paths})
    found, simulated = torch.from_numpy(np.load(tmp_path / "y.npy")), outputs(run)
    with exact_sums():
        exact = outputs(run)
    assert (simulated - exact).norm() > share * exact.norm()
    assert (found - simulated).norm() < 0.1 * (simulated - exact).norm()
    assert (found - simulated).norm() < 0.02 * simulated.norm()
