"""The quantized counterparts of torch's layers.

A layer becomes quantized by a change of class: parameters, hooks, attributes and ``isinstance`` stay, and the
way back is the class it had. Quantizers are child modules; a slot without one passes values through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.nn.extras import INPUT_TRANSFORM, LOW_RANK
from octavo.nn.parametrized import obstacle_of, sources_of
from octavo.nn.saturation import saturated
from octavo.nn.views import WeightView
from octavo.spec.facts import QUANTIZER_NAMES, Slot

_LINEAR_SLOTS = (Slot.WEIGHT, Slot.INPUT, Slot.OUTPUT)


def through(module: nn.Module, slot: Slot, x: Tensor) -> Tensor:
    """``x`` through the quantizer of ``slot`` that is a child of ``module``, if it has one.

    An input is scaled and rotated first, where an algorithm asked for that.
    """
    return rounded(module, slot, transformed(module, x) if slot is Slot.INPUT else x)


def transformed(module: nn.Module, x: Tensor) -> Tensor:
    """An input as ``module`` computes with it, before rounding."""
    transform = module._modules.get(INPUT_TRANSFORM)
    return x if transform is None else transform(x)


def rounded(module: nn.Module, slot: Slot, x: Tensor) -> Tensor:
    """``x`` through a quantizer only."""
    quantizer = module._modules.get(QUANTIZER_NAMES[slot])
    return x if quantizer is None else quantizer(x)


def with_low_rank(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``y``, and what ``module``'s low-rank branch makes of its input ``x``, if it has one."""
    branch = module._modules.get(LOW_RANK)
    return y if branch is None else y + branch(x)


class _Quantized(nn.Module):
    """Common to all counterparts: the weight that computes."""

    weight: Tensor

    def _weight(self) -> Tensor:
        stored = self._parameters.get("weight")  # a weight that others read, too, is rounded by a property
        return through(self, Slot.WEIGHT, self.weight if stored is None else stored)


class QuantLinear(_Quantized, nn.Linear):
    """``nn.Linear`` (and bias-only or renamed subclasses of it)."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        x = transformed(self, input)
        given, weight = rounded(self, Slot.INPUT, x), self._weight()
        y = saturated(self, given, weight, F.linear(given, weight, self.bias))
        return through(self, Slot.OUTPUT, with_low_rank(self, x, y))


class _QuantConv(_Quantized):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """As torch's convolution, padding modes included."""
        x, weight = through(self, Slot.INPUT, input), self._weight()
        return through(self, Slot.OUTPUT, saturated(self, x, weight, self._conv_forward(x, weight, self.bias)))


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``nn.Conv1d``."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``nn.Conv2d``."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """``nn.Conv3d``."""


def _transposed_forward(num_axes: int, convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, num_axes, self.dilation
        )
        x = through(self, Slot.INPUT, input)
        y = convolution(x, self._weight(), self.bias, self.stride, self.padding, padding, self.groups, self.dilation)
        return through(self, Slot.OUTPUT, y)

    forward.__doc__ = "As torch's transposed convolution."
    return forward


class QuantConvTranspose1d(_Quantized, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d``."""

    forward = _transposed_forward(1, F.conv_transpose1d)


class QuantConvTranspose2d(_Quantized, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d``."""

    forward = _transposed_forward(2, F.conv_transpose2d)


class QuantConvTranspose3d(_Quantized, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d``."""

    forward = _transposed_forward(3, F.conv_transpose3d)


class QuantEmbedding(_Quantized, nn.Embedding):
    """``nn.Embedding``: only its weight and output are values; ``max_norm`` is refused where sites are found."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Embedding``."""
        y = F.embedding(input, self._weight(), self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        return through(self, Slot.OUTPUT, y)


class QuantTransposedLinear(_Quantized):
    """transformers' ``Conv1D``: a linear layer whose weight is stored ``(in_features, out_features)``."""

    bias: Tensor
    nf: int

    def forward(self, x: Tensor) -> Tensor:
        """As transformers' ``Conv1D``."""
        x = transformed(self, x)
        flat, weight = rounded(self, Slot.INPUT, x).reshape(-1, x.size(-1)), self._weight()
        y = saturated(self, flat, weight.T, torch.addmm(self.bias, flat, weight)).view(*x.shape[:-1], self.nf)
        return through(self, Slot.OUTPUT, with_low_rank(self, x, y))


class QuantNorm(nn.Module):
    """Norms and other plain modules: an input and an output quantizer around the module's own forward."""

    def forward(self, input: Tensor) -> Tensor:
        """The module's own forward on a rounded input."""
        return through(self, Slot.OUTPUT, super().forward(through(self, Slot.INPUT, input)))


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What octavo knows of one module type.

    Args:
        operation: As in ``SiteFacts``.
        counterpart: The quantized forward; ``None`` for a type that only transformers has (found by its name).
        slots: Slots it offers.
        is_transposed: The weight is stored with the input axis first.
    """

    operation: str
    counterpart: type[nn.Module]
    slots: tuple[Slot, ...]
    is_transposed: bool = False

    def view(self, weight: Tensor) -> WeightView:
        """The weight as a matrix."""
        return WeightView(tuple(weight.shape), self.is_transposed)


LAYER_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind("linear", QuantLinear, _LINEAR_SLOTS),
    nn.Conv1d: LayerKind("conv", QuantConv1d, _LINEAR_SLOTS),
    nn.Conv2d: LayerKind("conv", QuantConv2d, _LINEAR_SLOTS),
    nn.Conv3d: LayerKind("conv", QuantConv3d, _LINEAR_SLOTS),
    nn.ConvTranspose1d: LayerKind("conv_transposed", QuantConvTranspose1d, _LINEAR_SLOTS, is_transposed=True),
    nn.ConvTranspose2d: LayerKind("conv_transposed", QuantConvTranspose2d, _LINEAR_SLOTS, is_transposed=True),
    nn.ConvTranspose3d: LayerKind("conv_transposed", QuantConvTranspose3d, _LINEAR_SLOTS, is_transposed=True),
    nn.Embedding: LayerKind("embedding", QuantEmbedding, (Slot.WEIGHT, Slot.OUTPUT)),
}
"""To add a module type, add its counterpart above and a line here."""

_REGISTERED: dict[type[nn.Module], LayerKind] = {}
_TRANSPOSED_LINEAR = LayerKind("linear", QuantTransposedLinear, _LINEAR_SLOTS, is_transposed=True)
_NORM = LayerKind("norm", QuantNorm, (Slot.INPUT, Slot.OUTPUT))
_ACTIVATION = LayerKind("activation", QuantNorm, (Slot.OUTPUT,))
_WITHOUT_PRODUCT = ("norm", "activation")
_ACTIVATION_HOMES = ("torch.nn.modules.activation", "transformers.activations")


def register_kind(module_class: type[nn.Module], kind: LayerKind) -> None:
    """Make ``module_class`` (and its subclasses) known; what was registered last is asked first."""
    _REGISTERED[module_class] = kind


def layer_kind(module: nn.Module) -> LayerKind | None:
    """What octavo knows of ``module``'s type, ``None`` for nothing.

    Norms are known by what their class is called, since every model family brings its own.
    """
    cls = original_class(module)
    for base, kind in (*reversed(_REGISTERED.items()), *LAYER_KINDS.items()):
        if isinstance(module, base):
            return kind
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return _TRANSPOSED_LINEAR
    if cls.__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d")):
        return _NORM
    return _ACTIVATION if _is_activation(module) else None


def _is_activation(module: nn.Module) -> bool:
    """torch's and transformers' elementwise functions as modules; what a softmax makes has a slot at the attention."""
    own = original_class(module)
    is_plain = not module._parameters and not isinstance(module, nn.MultiheadAttention)
    return own.__module__ in _ACTIVATION_HOMES and is_plain and "softm" not in own.__name__.lower()


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before it was quantized."""
    cls: type[nn.Module] = vars(type(module)).get("octavo_original", type(module))
    return cls


def has_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` derives from a known layer but computes in its own way."""
    kind = layer_kind(module)
    if isinstance(module, nn.MultiheadAttention):
        return original_class(module).forward is not nn.MultiheadAttention.forward
    if kind is None or kind.operation in _WITHOUT_PRODUCT or kind in _REGISTERED.values() or kind is _TRANSPOSED_LINEAR:
        return False
    base = next(base for base, known in LAYER_KINDS.items() if known is kind)
    own = original_class(module)
    return own.forward is not base.forward or getattr(own, "_conv_forward", 0) is not getattr(base, "_conv_forward", 0)


INSTANCE_FORWARD = (
    "its forward was replaced on the instance, as accelerate's hooks do it, and would bypass the quantizers: "
    "take that back first (accelerate.hooks.remove_hook_from_submodules)"
)


def has_instance_forward(module: nn.Module) -> bool:
    """Whether ``module`` computes with a function that its class does not know."""
    return "forward" in vars(module)


def is_sealed(module: nn.Module) -> bool:
    """Whether a counterpart stands for all that ``module`` computes, so that nobody looks inside."""
    if isinstance(module, nn.MultiheadAttention):
        return not has_own_forward(module)
    kind = layer_kind(module)
    return kind is not None and kind.operation not in _WITHOUT_PRODUCT and not has_own_forward(module)


def obstacle(module: nn.Module, kind: LayerKind) -> str:
    """Why ``module`` cannot be quantized although its type is known; empty when it can."""
    if has_instance_forward(module):
        return INSTANCE_FORWARD
    if kind.operation in _WITHOUT_PRODUCT or kind in _REGISTERED.values():
        return ""
    if has_own_forward(module):
        base = next(base for base, known in LAYER_KINDS.items() if known is kind)
        names = f"{original_class(module).__name__} derives from {base.__name__}"
        return f"{names}, with its own forward: hand in its counterpart with octavo.register"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm changes its weight during the forward"
    if "weight" in module._parameters:
        return ""
    return obstacle_of(module) if sources_of(module) else "its weight is computed in a way that octavo does not know"
