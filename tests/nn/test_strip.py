"""The way back: every bit, hook, class and attribute; after steps that change weights too, when they are kept."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo.errors import UserError
from octavo.nn.originals import kept_bytes, watched
from zoo.battery import COARSE, anatomy, bits, outputs, same_bits
from zoo.table import made


def changed(model: nn.Module, *, keep: bool) -> None:
    """What a step that writes weights does between preparing and simulating."""
    with watched(model, ("smoothquant", "gptq"), keep=keep), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def test_kept_originals_come_back_bit_for_bit() -> None:
    model, batch = made("llama")
    before, tensors = outputs(model, batch), bits(model)
    octavo.quantize(model, COARSE, [batch])
    changed(model, keep=True)
    twin = copy.deepcopy(model)
    for quantized in (model, twin):
        octavo.strip(quantized)
        assert torch.equal(outputs(quantized, batch), before)
    assert same_bits(tensors, bits(model))
    assert not [name for name in vars(model) if "octavo" in name]


def test_changed_weights_that_are_not_kept_are_refused_with_the_steps() -> None:
    model, batch = made("llama")
    run = octavo.quantize(model, COARSE, [batch])
    changed(model, keep=False)
    with pytest.raises(UserError, match=r"changed by smoothquant, gptq.*load the model again.*keep_original=True"):
        octavo.strip(model)
    assert run.door.quantizer_names()


def test_a_step_that_changes_nothing_needs_no_way_back() -> None:
    model, batch = made("llama")
    octavo.quantize(model, COARSE, [batch])
    with watched(model, ("gptq",), keep=False):
        pass
    octavo.strip(model)
    assert kept_bytes(model) == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.breaks = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        if self.breaks:
            raise RuntimeError("the user's own")
        return y


@pytest.mark.parametrize("where", ["trace", "calibration"])
def test_an_error_in_the_user_s_forward_leaves_nothing_behind(where: str) -> None:
    model, x = Fragile().eval(), torch.randn(2, 4)
    seen: list[Any] = []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(output))
    shape = anatomy(model)

    def batches() -> Any:
        yield x
        model.breaks = True
        yield x

    model.breaks = where == "trace"
    with pytest.raises(RuntimeError, match="the user's own"):
        octavo.quantize(model, "fp8", batches() if where == "calibration" else [x], sample=x)
    model.breaks = False
    assert anatomy(model) == shape


def test_two_quantized_models_do_not_disturb_each_other() -> None:
    first, batch = made("llama")
    second, _ = made("llama")
    plain = outputs(first, batch)
    octavo.quantize(first, "int8", [batch])
    alone = outputs(first, batch)
    octavo.quantize(second, COARSE, [batch])
    assert torch.equal(outputs(first, batch), alone)
    octavo.strip(second)
    assert torch.equal(outputs(second, batch), plain)
    assert torch.equal(outputs(first, batch), alone)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "lstm_tagger"])
def test_threads_get_what_one_thread_gets(name: str) -> None:
    model, batch = made(name)
    octavo.quantize(model, COARSE, [batch])
    expected = outputs(model, batch)
    found: list[bool] = []

    def work() -> None:
        for _ in range(5):
            found.append(torch.equal(outputs(model, batch), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20
