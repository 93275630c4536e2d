"""One layer of a block: its weight, its bias, the rows that meet its weight, its channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.backends.simulate import loops_for
from octavo.nn.extras import INPUT_TRANSFORM, LOW_RANK, InputTransform, LowRank, StackBranch
from octavo.nn.layers import has_own_forward, layer_kind
from octavo.nn.originals import give_bias
from octavo.nn.quantizer import ActivationQuantizer, Quantizer, WeightQuantizer
from octavo.nn.snapshot import stored_parameter
from octavo.numerics.qtensor import QTensor, fake_quantize
from octavo.spec.facts import Slot
from octavo.spec.plan import QuantizerSpec

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, eq=False)
class BlockLayer:
    """A layer with a weight quantizer.

    Args:
        name: Its site.
        holder: The module whose child the weight's quantizer is.
        owner: The module that has the weight.
        parameter: The weight as it is stored.
        quantizer: The weight's.
        input_quantizer: The input's, ``None`` for none.
        caller: The module whose method calls the function that computes with it, where its input can be changed there.
    """

    name: str
    holder: nn.Module
    owner: nn.Module
    parameter: nn.Parameter
    quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    caller: nn.Module | None = None

    @property
    def is_plain(self) -> bool:
        """A layer whose counterpart asks the holder's children what to do with its input (or a projection of
        ``nn.MultiheadAttention``), and not a functional call that only reads the weight.
        """
        if isinstance(self.owner, nn.MultiheadAttention):
            return type(self.holder) is nn.Module
        return self.holder is self.owner and layer_kind(self.holder) is not None and not has_own_forward(self.holder)

    @property
    def matrix(self) -> Tensor:
        """``(out_features, in_features)`` view of it."""
        return self.quantizer.view.to_matrix(self.parameter.detach())

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that is added to the product with this weight."""
        name = "in_proj_bias" if isinstance(self.owner, nn.MultiheadAttention) else "bias"
        found = self.owner._parameters.get(name)
        return found if found is None or found.shape[0] == self.quantizer.view.matrix_shape[-2] else None

    @property
    def takes_bias(self) -> bool:
        """Its forward adds a bias where there is one; there is none."""
        return self.is_plain and "bias" in self.owner._parameters and self.owner._parameters["bias"] is None

    def add_bias(self, value: Tensor) -> None:
        """Give a bias to a layer without."""
        assert self.takes_bias, "it has one, or its forward would not add it"
        give_bias(self.owner, value, self.parameter)

    @property
    def transform(self) -> InputTransform | None:
        """What is done to its input."""
        home, child = self._input_place
        found = home._modules.get(child)
        return found if isinstance(found, InputTransform) else None

    def set_transform(self, transform: InputTransform) -> None:
        """Do this to its input."""
        home, child = self._input_place
        home.add_module(child, transform)

    @property
    def _input_place(self) -> tuple[nn.Module, str]:
        place = self.quantizer.input_place
        return (self.holder, INPUT_TRANSFORM) if place is None or self.caller is None else (self.caller, place[1])

    @property
    def branch(self) -> LowRank | None:
        """The low-rank branch beside it, or beside its matrices."""
        found = self.holder._modules.get(self._branch_name)
        return found if isinstance(found, LowRank) else None

    def set_branch(self, a: Tensor, b: Tensor) -> None:
        """Put a low-rank branch beside it: ``a`` and ``b`` as ``LowRank`` takes them, or ``StackBranch``."""
        if not self.is_stack:
            self.holder.add_module(LOW_RANK, LowRank(a, b))
            return
        place, caller = self.quantizer.input_place, self.caller
        assert place is not None
        assert caller is not None
        branch = StackBranch(a, b, is_transposed=self.quantizer.view.is_transposed, axis=self.transform_axis)
        self.holder.add_module(self._branch_name, branch)
        caller.add_module(place[1].removesuffix(INPUT_TRANSFORM) + LOW_RANK, branch)

    @property
    def is_stack(self) -> bool:
        """Matrices in one parameter."""
        return self.quantizer.view.num_stacked == 1 and len(self.quantizer.view.matrix_shape) == 3

    @property
    def _branch_name(self) -> str:
        return f"{self.quantizer.key.rpartition('.')[2]}_{LOW_RANK}" if self.is_stack else LOW_RANK

    @property
    def takes_transform(self) -> bool:
        """Its input can be scaled, and rotated where it is a matrix or a stack of them, when it is computed with."""
        return self.caller is not None or self.takes_scale

    @property
    def spec(self) -> QuantizerSpec:
        """What the plan gives its weight."""
        return self.quantizer.spec

    @property
    def is_fixed(self) -> bool:
        """An algorithm has rounded its weight."""
        return self.quantizer.is_fixed

    @property
    def fixed_outer(self) -> Tensor | None:
        """The scale of its scales, where it is fixed and has one."""
        return self.quantizer.fixed_outer

    def fix(self, value: QTensor) -> None:
        """Its weight from now on."""
        self.quantizer.fix(self.parameter, value)

    def rounded(self) -> Tensor:
        """The matrix as it will be, as far as that is known: fixed, or rounded to nearest by its largest value."""
        fmt = self.spec.format
        return self.matrix if self.is_fixed else fake_quantize(self.matrix, fmt, loops=loops_for(self.matrix, fmt))

    @property
    def is_linear(self) -> bool:
        """A product along the last axis of the input; it may have a rotation and a low-rank branch."""
        return self.quantizer.operation == "linear" and len(self.quantizer.view.matrix_shape) == 2

    @property
    def takes_scale(self) -> bool:
        """Its columns can be matched with channels; those of a transposed convolution in groups cannot."""
        if not self.is_plain or len(self.quantizer.view.matrix_shape) != 2:
            return False
        return self.is_linear or isinstance(self.holder, _CONVOLUTIONS) or getattr(self.holder, "groups", 1) == 1

    @property
    def takes_low_rank(self) -> bool:
        """Its forward adds a low-rank branch, or the function's call takes those of a stack."""
        if self.is_stack:
            return self.caller is not None and self.quantizer.operation == "linear"
        return self.is_linear and self.holder is self.owner and self.is_plain and self.branch is None

    def write(self, matrix: Tensor) -> None:
        """Replace the weight."""
        with torch.no_grad():
            self.parameter.copy_(self.quantizer.view.to_parameter(matrix))

    @property
    def channel_axis(self) -> int:
        """Axis of the input's channels, from the end, as its quantizer sees it."""
        return -1 if self.is_linear else -1 - (self.parameter.ndim - 2)

    @property
    def transform_axis(self) -> int:
        """The same, as what is done to the input sees it: where a function is called it is as the function takes it."""
        place = self.quantizer.input_place
        return self.channel_axis if self.caller is None or place is None else place[2]

    def rows(self, x: Tensor) -> Tensor | None:
        """``(num_rows, in_features)`` vectors of an input that meet the weight; ``None`` where it has no such view."""
        if self.is_linear:
            return x.reshape(-1, x.shape[-1]) if x.shape[-1] == self.quantizer.view.matrix_shape[-1] else None
        if isinstance(self.holder, _CONVOLUTIONS) and self.holder.groups == 1:
            return _patches(self.holder, x)
        return None

    @property
    def geometry(self) -> object:
        """How a convolution moves over its input: layers with another one meet other rows of it."""
        conv = self.holder
        if not isinstance(conv, _CONVOLUTIONS):
            return None
        return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode

    @property
    def is_grouped(self) -> bool:
        """A convolution whose kernels meet some of the channels each."""
        return isinstance(self.holder, _CONVOLUTIONS) and self.holder.groups > 1

    def patches(self, x: Tensor) -> Tensor:
        """``(num_positions, channels * kernel)`` of all channels of a convolution's input."""
        assert isinstance(self.holder, _CONVOLUTIONS)
        return _patches(self.holder, x)

    def num_channels(self, x: Tensor) -> int:
        """Channels of an input."""
        return x.shape[self.channel_axis]

    def columns(self, num_channels: int) -> Tensor | None:
        """Which channel each column of the weight meets, ``None`` for column ``k`` channel ``k``.

        ``(in_features,)``; ``(out_features, in_features)`` for a convolution in groups.
        """
        if self.is_linear or not self.takes_scale:
            return None
        rows, width = self.quantizer.view.matrix_shape
        kernel = math.prod(self.parameter.shape[2:])
        inside = torch.arange(width, device=self.parameter.device) // kernel
        groups = self.holder.groups if isinstance(self.holder, _CONVOLUTIONS) else 1
        if groups == 1:
            return inside
        group_of_row = torch.arange(rows, device=self.parameter.device) // (rows // groups)
        return group_of_row.unsqueeze(1) * (num_channels // groups) + inside


def block_layers(model: nn.Module, quantizers: Sequence[Quantizer]) -> dict[str, BlockLayer]:
    """Layers by site, in the order of ``quantizers``; a tied weight under its owner's name only."""
    inputs = {q.site: q for q in quantizers if isinstance(q, ActivationQuantizer) and q.slot is Slot.INPUT}
    weights = {id(q): q for q in quantizers if isinstance(q, WeightQuantizer)}
    found: dict[int, BlockLayer] = {}
    for holder in model.modules():
        for child in holder._modules.values():
            if isinstance(child, WeightQuantizer) and id(child) in weights and id(child) not in found:
                owner = model.get_submodule(child.key.rpartition(".")[0])
                parameter = stored_parameter(model, child.key)
                caller = None if child.input_place is None else model.get_submodule(child.input_place[0])
                given = inputs.get(child.site)
                found[id(child)] = BlockLayer(child.site, holder, owner, parameter, child, given, caller)
    return {found[key].name: found[key] for key in weights if key in found}


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """``(rows, in_channels * kernel)`` of ``(batch, in_channels, ...)``."""
    is_batched = x.ndim == len(module.kernel_size) + 2
    x = x if is_batched else x.unsqueeze(0)
    if module.padding_mode == "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice)
    else:
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    num_axes = len(module.kernel_size)
    for axis, (size, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    x = x.movedim(1, 1 + num_axes)
    return x.reshape(-1, math.prod(x.shape[1 + num_axes :]))
