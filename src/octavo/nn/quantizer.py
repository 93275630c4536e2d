"""The quantizer module: one place where values are rounded to a grid.

Quantizers are children of the module they serve, under the names that users of this field know
(``input_quantizer``, ``weight_quantizer``, ``q_bmm_quantizer`` ...), so they travel with deepcopy,
``state_dict`` and ``.to``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from octavo.backends.codes import quantize
from octavo.backends.simulate import fake_quantize, format_key
from octavo.backends.weight_ranges import weight_range
from octavo.errors import UserError
from octavo.nn.packed import PackedTensor, blank_scale
from octavo.nn.views import WeightView
from octavo.numerics.observers import NotFiniteError, Observer, make_observer
from octavo.numerics.qtensor import QTensor, quantize_scale
from octavo.numerics.scaling import outer_scale_from_range
from octavo.spec.facts import Slot
from octavo.spec.plan import QuantizerSpec
from octavo.spec.tensor_format import one_level


class Mode(Enum):
    """What a quantizer does with a value that passes."""

    OFF = "off"  # passes it through
    OBSERVE = "observe"  # passes it through and looks at its range
    QUANTIZE = "quantize"  # rounds it


class Quantizer(nn.Module):
    """Scale, zero point and mode of one quantizer.

    It knows the ``site``, ``slot`` and ``operation`` that it was made for, and whether a value came by while it did not
    round (``was_asked``).

    Buffers: ``scale`` fp32 and, for asymmetric formats, ``zero_point`` int32, NaN and 0 until calibrated;
    dynamic quantizers have none, weights with scaled scales keep them in ``stored_scale``. Of an activation in a
    nested format ``scale`` is that of the outermost level. Scales stay fp32 when the model is cast to another dtype.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    site: str = ""
    slot: Slot | None = None
    operation: str = ""

    def __init__(self, name: str, spec: QuantizerSpec, scale_shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.name = name
        self.spec = spec
        self.format_key = format_key(spec.format)
        self.mode = Mode.OFF
        self.was_asked = False
        stored = scale_shape is not None
        self.register_buffer("scale", torch.full(scale_shape, torch.nan) if scale_shape is not None else None)
        self.register_load_state_dict_post_hook(_round_when_complete)
        has_zero_point = stored and not spec.format.is_symmetric
        self.register_buffer(
            "zero_point", torch.zeros(scale_shape or (), dtype=torch.int32) if has_zero_point else None
        )

    @property
    def is_calibrated(self) -> bool:
        """True when nothing is missing to round values."""
        return self.scale is None or not bool(torch.isnan(self.scale).any())

    def set_range(self, scale: Tensor | QTensor, zero_point: Tensor | None) -> None:
        """Store a range and start rounding. Copies into the buffers, so their identity stays.

        Args:
            scale: Real-valued, or as it is stored; of the outermost level where an activation's format is nested.
            zero_point: Of an asymmetric format.
        """
        self._store_scale(scale)
        if self.zero_point is not None:
            assert zero_point is not None
            self.zero_point.copy_(zero_point)
        self.mode = Mode.QUANTIZE

    def _store_scale(self, scale: Tensor | QTensor) -> None:
        assert self.scale is not None
        self.scale.copy_(scale.dequantize() if isinstance(scale, QTensor) else scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Moves buffers between devices; never changes their dtype."""
        kept = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def note_asked(self) -> None:
        """Remember that a value came by while this does not round (``door`` looks for quantizers that nothing asks)."""
        if not torch.compiler.is_compiling():
            self.__dict__["was_asked"] = True

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        kind = "dynamic" if self.spec.is_dynamic else "static"
        return f"{self.spec.format}, {kind}, {self.mode.value}"


def _round_when_complete(quantizer: nn.Module, _: object) -> None:
    """Runs when a state dict was loaded, children included."""
    if isinstance(quantizer, Quantizer) and quantizer.is_calibrated:
        quantizer.mode = Mode.QUANTIZE


class SharedInput:
    """What quantizers of layers that read the same tensor have in common: one look at it, one rounding of it.

    Args:
        name: The first of these layers.
        num_readers: How many they are; a result is dropped when each of them had it.
        observer: Where all of them collect.
    """

    def __init__(self, name: str, num_readers: int, observer: Observer | None) -> None:
        self.name = name
        self.num_readers = num_readers
        self.observer = observer
        self._entry: tuple[weakref.ref[Tensor], tuple[Mode, int], Tensor, list[int]] | None = None

    def get(self, x: Tensor, mode: Mode, work: Callable[[Tensor], Tensor]) -> Tensor:
        """``work(x)``, or what another reader of the same ``x`` got in the same mode."""
        state = (mode, -1 if x.is_inference() else x._version)
        entry = self._entry
        if entry is not None and entry[0]() is x and entry[1] == state:
            entry[3].append(0)
            if len(entry[3]) >= self.num_readers:
                self._entry = None
            return entry[2]
        result = work(x)
        self._entry = (weakref.ref(x), state, result, [0])
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        twin = SharedInput(self.name, self.num_readers, copy.deepcopy(self.observer, memo))
        memo[id(self)] = twin
        return twin


class ActivationQuantizer(Quantizer):
    """Rounds activations: static with a calibrated scale, or dynamic with a scale found per call."""

    def __init__(self, name: str, spec: QuantizerSpec, shared: SharedInput | None = None) -> None:
        super().__init__(name, spec, None if spec.is_dynamic else ())
        self.shared = shared
        self.observer: Observer | None = shared.observer if shared is not None else new_observer(spec)
        self.mode = Mode.QUANTIZE if spec.is_dynamic else Mode.OFF

    def forward(self, x: Tensor) -> Tensor:
        """``x`` rounded, or as it is while off or observing."""
        if self.mode is not Mode.QUANTIZE:
            self.note_asked()
        if self.mode is Mode.OFF:
            return x
        work = self._round if self.mode is Mode.QUANTIZE else self._observe
        if self.shared is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return work(x)
        return self.shared.get(x, self.mode, work)

    def fix_range(self, low: float, high: float) -> None:
        """A range that no data need tell; nothing is observed."""
        if self.scale is None:
            return
        self.observer = None
        self._cover(*(torch.tensor(value, device=self.scale.device) for value in (low, high)))

    def _cover(self, low: Tensor, high: Tensor) -> None:
        self.set_range(*outer_scale_from_range(low, high, self.spec.format))

    def _round(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.format_key, self.scale, self.zero_point)

    def _observe(self, x: Tensor) -> Tensor:
        if self.observer is not None and x.numel():
            try:
                self.observer.update(x.detach())
            except NotFiniteError as error:
                raise NotFiniteError(f"quantizer '{self.name}': {error}") from error
        return x

    def finish(self) -> str:
        """Turn what was observed into a scale and start rounding.

        Returns:
            Why it stays off; empty when it rounds.
        """
        if self.observer is None:
            return ""
        if self.observer.count == 0:
            return "saw no calibration data"
        low, high = self.observer.range()
        if float(low) == 0.0 and float(high) == 0.0:
            return "every value in the calibration data was 0"
        self._cover(low, high)
        return ""


def new_observer(spec: QuantizerSpec) -> Observer | None:
    """What collects for a static quantizer; dynamic ones need nothing."""
    return None if spec.is_dynamic else make_observer(spec.observer, spec.format)


class WeightQuantizer(Quantizer):
    """Rounds one parameter. A frozen weight is rounded once, not at every forward.

    Args:
        name: Full name of the quantizer.
        spec: Format and observer.
        view: The parameter as a matrix.
        key: The parameter's key in the model's state dict.
    """

    def __init__(self, name: str, spec: QuantizerSpec, view: WeightView, key: str) -> None:
        fmt = spec.format
        if spec.observer.name not in ("absmax", "mse"):
            raise UserError(
                f"quantizer '{name}': a weight's range is found by absmax or mse, not by {spec.observer.name}"
            )
        if spec.observer.name == "mse" and fmt.offset is not None:
            raise UserError(f"quantizer '{name}': no scale search for {fmt}, whose values are centred: use absmax")
        shape = fmt.granularity.scale_shape(view.matrix_shape)
        super().__init__(name, spec, None if fmt.is_plain or fmt.is_nested else shape)
        self.stored_scale: PackedTensor | None = None
        if fmt.scale is not None and fmt.is_nested:
            self.stored_scale = PackedTensor(blank_scale(fmt.scale, shape))
            if fmt.zero_point is not None:
                self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        # Whatever their levels, scales are real values in the end, and rounding only needs those.
        self.rounding_key = format_key(one_level(fmt)) if fmt.is_nested else self.format_key
        self.view = view
        self.key = key
        self.saturates = False  # the target sums products with it in 16 bits
        self.is_fixed = False
        self.fixed: PackedTensor | None = None  # codes that rounding the parameter would not give again
        self.override: Tensor | None = None  # an algorithm tries another weight
        self.input_place: tuple[str, str, int] | None = None  # see ``Site``
        self._rounded: tuple[weakref.ref[Tensor], tuple[object, ...], Tensor] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` rounded, in its own shape and dtype."""
        if self.override is not None:
            return self.override
        if self.mode is not Mode.QUANTIZE:
            self.note_asked()
            return weight
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and weight.requires_grad):
            return self._round(weight)
        state = _state(weight), *(_state(buffer) for buffer in self.buffers())
        known = self._rounded
        if known is not None and known[0]() is weight and known[1] == state:
            return known[2]
        with torch.inference_mode(False), torch.no_grad():
            rounded = self._round(weight)
        self._rounded = (weakref.ref(weight), state, rounded)
        return rounded

    def _round(self, weight: Tensor) -> Tensor:
        if self.fixed is not None:
            rounded = self.view.to_parameter(self.fixed.tensor().dequantize(weight.dtype))
            return rounded + (weight - weight.detach()) if weight.requires_grad else rounded  # the gradient passes
        scale = self.scale if self.stored_scale is None else self.stored_scale.tensor().dequantize()
        matrix = fake_quantize(self.view.to_matrix(weight), self.rounding_key, scale, self.zero_point)
        return self.view.to_parameter(matrix)

    @property
    def is_calibrated(self) -> bool:
        """True when nothing is missing to round values."""
        if self.stored_scale is None:
            return super().is_calibrated
        return not any(bool(torch.isnan(b).any()) for b in self.stored_scale.buffers() if b.is_floating_point())

    def _store_scale(self, scale: Tensor | QTensor) -> None:
        if self.stored_scale is None:
            super()._store_scale(scale)
            return
        if not isinstance(scale, QTensor):
            assert self.spec.format.scale is not None
            stored = quantize_scale(scale, self.spec.format.scale)
            assert isinstance(stored, QTensor)
            scale = stored
        self.stored_scale.copy_(scale)

    @torch.no_grad()
    def find_range(self, weight: Tensor, shared_amax: Tensor | None = None, outer: Tensor | None = None) -> None:
        """Look at the weight once and start rounding.

        Args:
            weight: The parameter.
            shared_amax: Largest magnitude of all weights that share the scale of their scales with this one.
            outer: That scale, where one of them is fixed already.

        Raises:
            NotFiniteError: the weight holds NaN or inf.
        """
        self._rounded = None
        if self.is_fixed:
            self.mode = Mode.QUANTIZE
            return
        matrix = self.view.to_matrix(weight)
        if not bool(torch.isfinite(matrix).all()):
            raise NotFiniteError(f"quantizer '{self.name}': the weight holds NaN or inf; the checkpoint is damaged")
        if self.spec.format.is_plain:
            self.mode = Mode.QUANTIZE
        else:
            self.set_range(*weight_range(matrix, self.spec, shared_amax=shared_amax, outer=outer))

    @property
    def steps(self) -> Tensor | None:
        """Plain scales, as what is rounded has them."""
        scale = self.scale if self.fixed is None else self.fixed.tensor().scale
        return scale if isinstance(scale, Tensor) else None

    @property
    def fixed_outer(self) -> Tensor | None:
        """The scale of a fixed weight's scales, in a format that has one per tensor."""
        if not self.is_fixed or self.stored_scale is None or not self.spec.format.shares_outer_scale:
            return None
        level: Tensor | QTensor | None = self.stored_scale.tensor()
        while isinstance(level, QTensor):
            level = level.scale
        return level

    @torch.no_grad()
    def codes(self, weight: Tensor) -> QTensor:
        """What is stored of the weight: ``codes(weight).dequantize()`` is what ``forward`` simulates."""
        if self.fixed is not None:
            return self.fixed.tensor()
        scale = self.scale if self.stored_scale is None else self.stored_scale.tensor()
        return quantize(self.view.to_matrix(weight), self.spec.format, scale=scale, zero_point=self.zero_point)

    @torch.no_grad()
    def fix(self, weight: Tensor, value: QTensor) -> None:
        """Let ``weight`` be what ``value`` stands for, from now on: these codes and scales are simulated and stored.

        Rounding the parameter gives them again, as a rule also in bf16, which is off by less than half a step of any
        element of at most 8 bits. Where it does not (an fp16 underflow, an offset), the codes are kept beside it.
        """
        assert value.format == self.spec.format, "codes of another format"
        value = value.to(weight.device)
        if value.scale is not None:
            self.set_range(value.scale, value.zero_point)
        self.mode, self.is_fixed, self.fixed, self._rounded = Mode.OFF, True, None, None
        matrix = value.dequantize(weight.dtype)
        weight.copy_(self.view.to_parameter(matrix))
        if not torch.equal(self.codes(weight).dequantize(weight.dtype), matrix):
            self.fixed = PackedTensor(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rounded": None}


def _state(tensor: Tensor | None) -> tuple[object, ...]:
    """What differs when a tensor was written to, or another storage, device or dtype was put under it."""
    if tensor is None:
        return ()
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device
