"""Scale, rotation and low-rank branch beside a layer's quantizers: the function stays, and every copy keeps them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import octavo
from octavo.nn.door import TorchDoor
from octavo.nn.extras import INPUT_TRANSFORM, LOW_RANK, InputTransform, LowRank
from octavo.numerics.hadamard import hadamard, rotate


def quantized_pair() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    x = torch.randn(5, 64)
    octavo.quantize(model, "int8", [x])
    return model, x


@torch.no_grad()
def add_extras(model: nn.Module, *, scale: torch.Tensor, rank: int = 0) -> None:
    layer = model[0]
    transform = InputTransform(64, -1, 1)
    transform.divide(scale)
    transform.rotate(16, scale.device)
    layer.add_module(INPUT_TRANSFORM, transform)
    layer.weight.copy_(rotate(layer.weight * scale, 16))
    if rank:
        branch = LowRank(torch.randn(rank, 64), torch.randn(32, rank))
        layer.add_module(LOW_RANK, branch)
        layer.weight.sub_(branch.b @ branch.a)


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 3])
def test_the_function_stays_when_nothing_is_rounded(rank: int) -> None:
    model, x = quantized_pair()
    door = TorchDoor(model)
    with door.disabled(lambda name: True):
        before = model(x)
        add_extras(model, scale=torch.logspace(-1, 1, 64), rank=rank)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_they_reach_the_snapshot_and_are_no_tensors_of_the_model() -> None:
    model, x = quantized_pair()
    names = {key for key, _ in TorchDoor(model).snapshot().passthrough()}
    scale = torch.logspace(-1, 1, 64)
    add_extras(model, scale=scale, rank=2)
    snapshot = TorchDoor(model).snapshot()
    first, second = snapshot.layers()
    assert torch.equal(first.pre_scale, scale)
    assert (first.input_rotation, second.input_rotation) == (16, 0)
    assert first.low_rank[0].shape == (2, 64)
    assert second.low_rank is None
    assert second.pre_scale is None
    assert {key for key, _ in snapshot.passthrough()} == names
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_strip_takes_them_out() -> None:
    model, _ = quantized_pair()
    add_extras(model, scale=torch.ones(64), rank=2)
    octavo.strip(model)
    assert list(model[0].children()) == []
    assert type(model[0]) is nn.Linear


def test_a_cast_of_the_model_leaves_the_scale_in_fp32() -> None:
    model, _ = quantized_pair()
    add_extras(model, scale=torch.logspace(-1, 1, 64))
    model.to(torch.bfloat16)
    assert model[0].input_transform.pre_scale.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_rows_are_orthogonal(size: int) -> None:
    matrix = hadamard(size)
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))
