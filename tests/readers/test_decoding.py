"""The readers' arithmetic against the writer's, which it shares nothing with: every format, every bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.handmade import matrix
from octavo.errors import UserError
from octavo.export.qtensor_files import qtensor_parts
from octavo.numerics.packing import pack
from octavo.numerics.qtensor import quantize
from octavo.readers.decoding import decode_element, element_bits, scale_shape, sign_extend, spread_scale, unpack_bits
from octavo.readers.run import dequantize, describe
from octavo.readers.tensor_files import StoredTensor
from octavo.spec.element import ELEMENTS, INT8, NF4, UINT8, CodebookFormat
from octavo.spec.formats import FORMATS
from octavo.spec.tensor_format import PLAIN_FP32, PerFlatGroup, PerGroup, PerTile, Ragged, TensorFormat, scaled

WEIGHTS = {
    **FORMATS,
    "nf4, centred per block": TensorFormat(
        NF4, PerFlatGroup(64), TensorFormat(INT8, PerFlatGroup(256), PLAIN_FP32, PLAIN_FP32)
    ),
    "unsigned": scaled(UINT8, PerGroup(32), asymmetric=True),
    "tiles": scaled(INT8, PerTile(4, 48), ragged=Ragged.PAD),
    "mine": scaled(CodebookFormat("mine", (-1.0, -0.3, 0.1, 0.7, 1.0)), PerGroup(16)),
    "ragged": TensorFormat(INT8, PerGroup(48), PLAIN_FP32, ragged=Ragged.PAD),
}


class InMemory(StoredTensor):
    """A tensor that was never in a file."""

    def __init__(self, name: str, value: torch.Tensor) -> None:
        super().__init__(name, "U8", tuple(value.shape), value.numel(), None, 0)  # type: ignore[arg-type]
        VALUES[name] = value.numpy()

    def read(self) -> np.ndarray:
        return VALUES[self.name]


VALUES: dict[str, np.ndarray] = {}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("shape", [(6, 128), (2, 3, 256)])
def test_every_format_means_the_same_to_both(name: str, shape: tuple[int, ...]) -> None:
    fmt = WEIGHTS[name]
    value = matrix(*shape) * torch.linspace(0.001, 40, shape[-1])
    quantized = quantize(value, fmt)
    tensors = {part: InMemory(part, stored) for part, stored in qtensor_parts("w", quantized)}
    found = dequantize("w", fmt.to_dict(), shape, tensors)
    assert found.dtype == np.float32
    assert found.tobytes() == quantized.dequantize().numpy().tobytes()
    assert describe(fmt.to_dict()) == str(fmt)
    assert scale_shape(fmt.to_dict()["granularity"], shape) == fmt.granularity.scale_shape(shape)


@pytest.mark.parametrize("name", [name for name, element in ELEMENTS.items() if element.bits <= 8])
def test_every_code_means_the_same_to_both(name: str) -> None:
    element = ELEMENTS[name]
    assert element_bits(name) == element.bits
    codes = torch.arange(1 << element.bits, dtype=torch.int16).to(torch.uint8)
    packed = pack(codes[None], element.bits).numpy()
    found = decode_element(packed, name, (1, len(codes)))[0]
    finite = found[np.isfinite(found)]
    lowest = element.min
    expected = {float(np.float32(value)) for value in element.values}
    assert {float(value) for value in finite if value >= lowest} == expected


@given(st.integers(2, 8), st.integers(1, 40), st.randoms(use_true_random=False))
def test_bits_unpack(bits: int, width: int, random: object) -> None:
    rng = np.random.default_rng(abs(hash(str(random))) % 1000 + width)
    codes = rng.integers(0, 1 << bits, (3, width), dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits).numpy()
    assert np.array_equal(unpack_bits(packed, bits, (3, width)), codes)
    signed = sign_extend(codes, bits)
    assert signed.min() >= -(1 << (bits - 1))
    assert np.array_equal(signed.view(np.uint8) & ((1 << bits) - 1), codes)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "element": (lambda: decode_element(np.zeros(1, np.uint8), "int9", (1,)), "unknown element format 'int9'"),
    "amount": (
        lambda: decode_element(np.zeros((2, 3), np.uint8), "int4", (2, 8)),
        r"uint8 \(2, 3\) where uint8 \(2, 4\) was expected, codes of 4 bits for \(2, 8\)",
    ),
    "dtype": (lambda: decode_element(np.zeros(2, np.float16), "fp32", (2,)), "float16 .* where fp32 .* was expected"),
    "granularity": (lambda: scale_shape({"kind": "spiral"}, (2,)), "unknown granularity {'kind': 'spiral'}"),
    "group": (lambda: scale_shape({"kind": "group", "size": 0}, (2,)), "unknown granularity"),
    "scales": (
        lambda: spread_scale(np.zeros(3, np.float32), {"kind": "group", "size": 2}, (2, 8)),
        r"scales of shape \(3,\) where \(2, 4\) was expected",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        call()
