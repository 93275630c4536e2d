"""Products of bytes as processors without VNNI sum them: the exact product less what saturates.

``octavo::saturate`` is an opaque operator beside ``octavo::fake_quantize``: ``torch.compile`` carries it as one node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.backends.simulate import range_of
from octavo.numerics.saturation import conv_lost, lost
from octavo.numerics.windows import Geometry
from octavo.spec.tensor_format import TensorFormat

UNSIGNED = 128
"""Codes of activations are signed here; runtimes store them this much higher, as UINT8."""
_is_on = True


@contextmanager
def exact_sums() -> Iterator[None]:
    """While open, nothing saturates: as on processors with VNNI, and as files say."""
    global _is_on
    before, _is_on = _is_on, False
    try:
        yield
    finally:
        _is_on = before


def is_simulated() -> bool:
    """Whether sums saturate now."""
    return _is_on


def machine_saturates() -> bool:
    """Whether this processor sums bytes in 16 bits: x86 without VNNI."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni"} & set(flags)


def as_this_machine() -> AbstractContextManager[None]:
    """While open, sums saturate only if they do on this processor: what a runtime here is held against."""
    return nullcontext() if machine_saturates() else exact_sums()


def saturated(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    fmt: TensorFormat,
    known: tuple[Tensor | None, Tensor | None],
    weight_scale: Tensor,
    geometry: Geometry | None = None,
) -> Tensor:
    """``y`` less what its sums lose.

    Args:
        y: The exact product of ``x`` and ``weight``, with or without a bias.
        x: Rounded inputs; of a linear layer ``(..., in_features)``, else as a convolution takes them.
        weight: Rounded, ``(out, in, ...)``.
        fmt: What ``x`` is rounded to: 8-bit integers, one scale.
        known: Scale and zero point of ``x``; ``(None, None)`` where they are found from ``x`` itself.
        weight_scale: One, or one for each output channel, in any shape.
        geometry: Of a convolution.
    """
    scale, zero = range_of(x, fmt) if known[0] is None else known
    assert scale is not None
    numbers = [] if geometry is None else _flat(geometry)
    out: Tensor = torch.ops.octavo.saturate(y, x, weight, scale, zero, weight_scale, numbers)
    return out


def _flat(geometry: Geometry) -> list[int]:
    ends = [end for pair in geometry.padding for end in pair]
    return [geometry.groups, *ends, *geometry.stride, *geometry.dilation]


def _geometry(numbers: list[int], axes: int) -> Geometry:
    ends = numbers[1 : 1 + 2 * axes]
    stride, dilation = numbers[1 + 2 * axes : 1 + 3 * axes], numbers[1 + 3 * axes :]
    return Geometry(tuple(zip(ends[::2], ends[1::2], strict=True)), tuple(stride), tuple(dilation), numbers[0])


def _compute(
    y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, weight_scale: Tensor, geometry: list[int]
) -> Tensor:
    shift = UNSIGNED + (0 if zero is None else int(zero))
    codes = (x.float() / scale).round_().int() + shift
    steps = weight_scale.float().flatten()
    integers = (weight.float() / steps.view(-1, *[1] * (weight.ndim - 1))).round_().int()
    if geometry:
        less = conv_lost(codes, integers, _geometry(geometry, weight.ndim - 2), shift)
        steps = steps.view(-1, *[1] * (weight.ndim - 2))
    else:
        less = lost(codes.flatten(0, -2), integers).view(y.shape)
    return (y.float() - less * (scale * steps)).to(y.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None, None, None, None


_LIBRARY = torch.library.Library("octavo", "FRAGMENT")
_LIBRARY.define(
    "saturate(Tensor y, Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor weight_scale, int[] geometry)"
    " -> Tensor"
)
_LIBRARY.impl("saturate", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("octavo::saturate", lambda y, *rest: torch.empty_like(y))
torch.library.register_autograd("octavo::saturate", _backward)
