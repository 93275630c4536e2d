"""Every kind of layer computes as torch's (or transformers') own while its quantizers are off, and rounds when on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import octavo
from octavo.backends.simulate import fake_quantize, format_key
from octavo.nn.door import TorchDoor
from octavo.nn.views import WeightView
from octavo.numerics import qtensor
from octavo.spec.facts import Slot
from octavo.spec.formats import FORMATS
from octavo.spec.recipe import Recipe
from octavo.spec.resolve import resolve

RECIPE = Recipe("all", ()).quantize("*", weight="int8-channel", input="int8-tensor", output="int8-tensor")
WEIGHTS = Recipe("weights", ()).quantize("*", weight="int8-channel", output="int8-tensor")


class Renamed(nn.Linear):
    """A subclass that only brings a name and an attribute."""

    flavour = "renamed"


def transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(12, 8)


def pictures(*shape: int) -> Tensor:
    return torch.randn(2, 4, *shape)


MODES = [
    *[
        (f"conv{n}d-{mode}", lambda n=n, mode=mode: (CONVS[n](4, 6, 3, padding=1, padding_mode=mode), AXES[n]()))
        for n in (1, 2, 3)
        for mode in ("zeros", "reflect", "replicate", "circular")
    ],
]
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
AXES: dict[int, Any] = {1: lambda: pictures(9), 2: lambda: pictures(7, 9), 3: lambda: pictures(5, 6, 7)}
LAYERS: dict[str, Any] = {
    **dict(MODES),
    "linear": lambda: (nn.Linear(8, 5), torch.randn(3, 8)),
    "linear-3d-no-bias": lambda: (nn.Linear(8, 5, bias=False), torch.randn(2, 3, 8)),
    "linear-one-row": lambda: (nn.Linear(8, 5), torch.randn(8)),
    "linear-renamed": lambda: (Renamed(8, 5), torch.randn(3, 8)),
    "transformers-conv1d": lambda: (transformers_conv1d(), torch.randn(2, 3, 8)),
    **{f"conv{n}d-groups": lambda n=n: (CONVS[n](4, 8, 3, groups=2, stride=2, dilation=2), AXES[n]()) for n in (1, 2)},
    **{f"conv{n}d-depthwise": lambda n=n: (CONVS[n](4, 8, 3, groups=4), AXES[n]()) for n in (1, 2, 3)},
    "conv2d-same": lambda: (nn.Conv2d(4, 6, (3, 5), padding="same", bias=False), AXES[2]()),
    "conv2d-unbatched": lambda: (nn.Conv2d(4, 6, 3), torch.randn(4, 7, 9)),
    **{
        f"transposed{n}d-groups{g}": lambda n=n, g=g: (
            TRANSPOSED[n](4, 6, 3, stride=2, padding=1, output_padding=1, groups=g),
            AXES[n](),
        )
        for n in (1, 2, 3)
        for g in (1, 2)
    },
    "embedding": lambda: (nn.Embedding(10, 6, padding_idx=0), torch.tensor([[1, 0, 9], [3, 3, 2]])),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layer, x = LAYERS[name]()
    return nn.Sequential(layer).eval(), x


def recipe_for(name: str) -> Recipe:
    return WEIGHTS if name == "embedding" else RECIPE


@every_layer
def test_with_quantizers_off_the_bits_are_the_layer_s_own(name: str) -> None:
    model, x = made(name)
    expected = model(x)
    door = TorchDoor(model, name, x)
    door.prepare(resolve(recipe_for(name), door.facts()))
    assert list(model[0].children())
    assert torch.equal(model(x), expected)


@every_layer
def test_with_quantizers_on_it_is_the_layer_on_rounded_tensors(name: str) -> None:
    """Input, weight and output rounded by hand with the calibrated scales, through torch's own layer."""
    model, x = made(name)
    plain, _ = made(name)
    octavo.quantize(model, recipe_for(name), [x])
    layer, int8 = model[0], FORMATS["int8-tensor"]
    view = WeightView(tuple(plain[0].weight.shape), is_transposed=name.startswith("trans"))
    with torch.no_grad():
        matrix = qtensor.fake_quantize(view.to_matrix(plain[0].weight), FORMATS["int8-channel"])
        plain[0].weight.copy_(view.to_parameter(matrix))
        if x.is_floating_point():
            x_rounded = qtensor.fake_quantize(x, int8, scale=layer.input_quantizer.scale)
            assert torch.equal(layer.input_quantizer.scale, x.abs().max() / 127)
        else:
            x_rounded = x
        y = plain(x_rounded)
        assert torch.equal(model(x), qtensor.fake_quantize(y, int8, scale=layer.output_quantizer.scale))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_transposed_convolution_takes_an_output_size(axes: int) -> None:
    torch.manual_seed(0)
    layer, x = TRANSPOSED[axes](4, 6, 3, stride=2), AXES[axes]()
    sizes = [2 * n + 2 for n in x.shape[2:]]
    expected = layer(x, output_size=sizes)
    door = TorchDoor(model := nn.ModuleDict({"up": layer}), "up", lambda model: model["up"](x, output_size=sizes))
    door.prepare(resolve(RECIPE, door.facts()))
    assert torch.equal(model["up"](x, sizes), expected)


@pytest.mark.parametrize("name", ["linear-renamed", "transformers-conv1d", "conv2d-groups", "embedding"])
def test_a_quantized_layer_is_still_what_it_was(name: str) -> None:
    model, x = made(name)
    original, parameters = type(model[0]), dict(model.named_parameters())
    model[0].note = "mine"
    octavo.quantize(model, recipe_for(name), [x])
    assert isinstance(model[0], original)
    assert model[0].note == "mine"
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(dict(model.named_parameters())[key] is p for key, p in parameters.items())


def test_the_user_s_hooks_run_as_before_and_stay_after_strip() -> None:
    model, x = made("linear")
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    octavo.quantize(model, RECIPE, [x])
    calls.clear()
    model(x)
    assert calls == ["before", "after"]
    octavo.strip(model)
    model(x)
    assert calls == ["before", "after"] * 2


def test_a_norm_is_quantized_only_when_a_rule_names_it() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8)), torch.randn(4, 8)
    run = octavo.quantize(model, Recipe("broad", ()).quantize("*", input="int8-tensor"), [x])
    assert run.door.quantizer_names() == ["0.input_quantizer"]
    assert run.plan.decision("1").why == "norm: not quantized unless a rule names it"
    octavo.strip(model)
    named = Recipe("named", ()).quantize("operation:norm", input="int8-tensor", output="int8-tensor")
    run = octavo.quantize(model, named, [x])
    assert run.door.quantizer_names() == [f"{n}.{slot}_quantizer" for n in (1, 2) for slot in ("input", "output")]
    rounded = model[1].input_quantizer(model[0](x))
    normed = nn.functional.layer_norm(rounded, (8,), *model[1].parameters())
    assert torch.equal(model[1](model[0](x)), model[1].output_quantizer(normed))


def test_an_embedding_that_changes_its_weight_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0), nn.Linear(8, 4))
    plan = octavo.plan(model, WEIGHTS, sample=torch.tensor([[1, 2]]))
    assert "max_norm" in plan.decision("0").why


def test_a_registered_counterpart_is_used_for_subclasses_too() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))  # inputs first

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class QuantOwn(Own):
        def forward(self, x: Tensor) -> Tensor:
            return octavo.nn.register.through(self, Slot.INPUT, x) @ octavo.nn.register.through(
                self, Slot.WEIGHT, self.weight
            )

    class Heir(Own):
        pass

    octavo.register(Own, QuantOwn, slots=("weight", "input"), is_transposed=True)
    torch.manual_seed(0)
    model, x = nn.Sequential(Own(), nn.Linear(4, 8), Heir()), torch.randn(3, 8)
    expected = model(x)
    recipe = Recipe("own", ()).quantize("operation:linear", weight="int8-channel", input="int8-tensor")
    run = octavo.quantize(model, recipe, [x])
    assert [d.site.weight_shape for d in run.plan.decisions] == [(4, 8), (8, 4), (4, 8)]
    assert model[0].weight_quantizer.scale.shape == (4,)
    assert torch.nn.functional.cosine_similarity(model(x), expected).min() > 0.99
    octavo.strip(model)
    assert torch.equal(model(x), expected)
    assert type(model[2]) is Heir


def test_register_takes_classes_of_modules_and_known_slots() -> None:
    with pytest.raises(octavo.UserError, match="two classes of modules"):
        octavo.register(nn.Linear, nn.Linear(1, 1))
    with pytest.raises(octavo.UserError, match="slots are weight, input"):
        octavo.register(nn.Linear, nn.Linear, slots=("wieght",))


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.ReLU()], ids=lambda m: type(m).__name__)
def test_outputs_of_norms_and_activations_are_rounded_on_request(activation: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(8), activation, nn.Linear(8, 3)).eval(), torch.randn(4, 8)
    before = model(x)
    recipe = Recipe("mine", ()).quantize("operation:norm", output="int4-tensor")
    recipe = recipe.quantize("operation:activation", output="int4-tensor")
    run = octavo.quantize(model, recipe, [x])
    assert run.door.quantizer_names() == ["0.output_quantizer", "1.output_quantizer"]
    normed = F.layer_norm(x, (8,))
    normed = fake_quantize(normed, format_key(FORMATS["int4-tensor"]), normed.abs().max() / 7)
    active = type(activation)()(normed)
    # the activation's range was found on unrounded values
    active = fake_quantize(active, format_key(FORMATS["int4-tensor"]), model[1].output_quantizer.scale)
    assert torch.equal(model(x), model[2](active))
    octavo.strip(model)
    assert torch.equal(model(x), before)
    assert type(model[1]) is type(activation)
