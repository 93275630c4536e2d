"""Element formats state what the specifications say."""

import math

import pytest

from octavo.spec.element import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    ELEMENTS,
    INT2,
    INT4,
    INT8,
    INT8_NARROW,
    NF4,
    UINT8,
    FloatFormat,
    IntFormat,
)

SMALL = [element for element in ELEMENTS.values() if element.bits <= 8]


def test_every_element_is_listed_under_its_own_name():
    assert all(name == element.name for name, element in ELEMENTS.items())


@pytest.mark.parametrize(
    ("element", "low", "high"),
    [
        (INT2, -2, 1), (INT4, -8, 7), (INT8, -128, 127), (INT8_NARROW, -127, 127), (UINT8, 0, 255),
        (E4M3, -448, 448), (E5M2, -57344, 57344), (E3M2, -28, 28), (E2M3, -7.5, 7.5), (E2M1, -6, 6),
        (E8M0, 2.0**-127, 2.0**127), (NF4, -1, 1),
    ],
)  # fmt: skip
def test_ranges_are_those_of_the_specifications(element, low, high):
    assert (element.min, element.max) == (low, high)


@pytest.mark.parametrize("element", SMALL, ids=lambda e: e.name)
def test_values_ascend_and_span_the_range(element):
    values = element.values
    assert list(values) == sorted(set(values))
    assert (values[0], values[-1]) == (element.min, element.max)
    assert all(map(math.isfinite, values))


@pytest.mark.parametrize("element", SMALL, ids=lambda e: e.name)
def test_there_are_as_many_values_as_codes_that_are_finite_numbers(element):
    not_values = 0
    if isinstance(element, IntFormat):
        not_values = int(element.is_narrow)
    if isinstance(element, FloatFormat):
        magnitude_codes = {"none": 0, "top": 1, "ieee": 1 << element.mantissa_bits}[element.nan]
        not_values = magnitude_codes * (2 if element.is_signed else 1) + int(element.is_signed)  # and the second zero
    assert len(element.values) == (1 << element.bits) - not_values


def test_e2m1_is_the_list_of_the_microscaling_specification():
    assert [v for v in E2M1.values if v >= 0] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
