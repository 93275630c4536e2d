"""Tensor formats refuse nonsense, survive JSON and know their size."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import UserError
from octavo.spec.element import E4M3, E8M0, FP16, INT4, INT8, MXINT8_ELEMENT, NF4, CodebookFormat
from octavo.spec.formats import FORMATS, NVFP4, format_name, tensor_format
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Ragged,
    ScaleRule,
    TensorFormat,
    scaled,
)

shapes = st.lists(st.integers(1, 300), min_size=1, max_size=4).map(tuple)


@given(shapes)
def test_scale_shapes_agree_where_granularities_mean_the_same(shape):
    flat = math.prod(shape)
    assert PerFlatGroup(1).scale_shape(shape) == (flat,)
    assert PerGroup(shape[-1]).scale_shape(shape) == (*PerToken().scale_shape(shape), 1)
    assert PerGroup(1).scale_shape(shape) == shape
    if len(shape) > 1:
        assert PerTile(1, 7).scale_shape(shape) == PerGroup(7).scale_shape(shape)
        assert PerChannel(-2).scale_shape(shape) == PerToken().scale_shape(shape)


def test_a_channel_axis_counts_from_either_end():
    assert PerChannel(0).scale_shape((8, 3, 5)) == PerChannel(-3).scale_shape((8, 3, 5)) == (8,)


@given(shapes, st.integers(1, 40))
def test_a_refused_group_says_what_would_fit(shape, size):
    reason = scaled(INT4, PerGroup(size)).misfit(shape)
    assert (reason is None) == (shape[-1] % size == 0)
    assert scaled(INT4, PerGroup(size)).misfit((*shape[:-1], size * 3)) is None
    assert TensorFormat(INT4, PerGroup(size), scale=PLAIN_FP32, ragged=Ragged.PAD).misfit(shape) is None
    if reason is not None and "none" not in reason:
        first = int(reason.split("choose ")[1].split(",")[0])
        assert shape[-1] % first == 0


def test_tiles_that_are_not_full_are_padded_or_refused():
    assert "ragged: pad" in scaled(E4M3, PerTile(16, 16)).misfit((10, 16))
    assert scaled(E4M3, PerTile(16, 16), ragged=Ragged.PAD).misfit((10, 10)) is None
    assert scaled(E4M3, PerTile(16, 16)).misfit((32, 64)) is None


def test_misfits_name_the_axis_that_is_missing():
    assert "single value" in scaled(INT4, PerGroup(4)).misfit(())
    assert "two axes" in scaled(E4M3, PerTile(4, 4)).misfit((8,))
    assert "no axis -3" in scaled(INT8, PerChannel(-3)).misfit((8, 8))


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda: TensorFormat(NF4, scale=PLAIN_FP32, zero_point=INT4),
        lambda: TensorFormat(MXINT8_ELEMENT, scale=PLAIN_FP32, zero_point=INT8),
        lambda: TensorFormat(INT8, zero_point=INT8),
        lambda: TensorFormat(INT8, offset=PLAIN_FP32),
        lambda: TensorFormat(INT4, scale=PLAIN_FP32, zero_point=INT4, scale_rule=ScaleRule.POWER_CEIL),
        lambda: TensorFormat(INT4, scale=PLAIN_FP32, zero_point=INT4, top=7.5),
        lambda: TensorFormat(E4M3, scale=PLAIN_FP32, top=0.0),
        lambda: TensorFormat(E4M3, scale=PLAIN_FP32, min_scale=-1.0),
        lambda: TensorFormat(E4M3, scale=PLAIN_FP32, scale_rule=ScaleRule.FULL_RANGE),
        lambda: TensorFormat(INT4, scale=TensorFormat(E8M0), scale_rule=ScaleRule.FULL_RANGE),
        lambda: TensorFormat(E4M3, scale=PLAIN_FP32, offset_granularity=PerTensor()),
        lambda: CodebookFormat("short", (1.0,)),
        lambda: CodebookFormat("falling", (1.0, 0.0)),
        lambda: CodebookFormat("equal in fp32", (0.1, 0.1 + 1e-12)),
        lambda: CodebookFormat("endless", (0.0, 1e39)),
        lambda: PerGroup(0),
        lambda: PerFlatGroup(-1),
        lambda: PerTile(128, 0),
    ],
)
def test_nonsense_cannot_be_built(nonsense):
    with pytest.raises(UserError):
        nonsense()


@pytest.mark.parametrize("fmt", [*FORMATS.values(), NVFP4], ids=str)
def test_json_keeps_a_format(fmt):
    assert TensorFormat.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


def test_json_keeps_every_field():
    fmt = TensorFormat(
        INT4,
        PerTile(16, 8),
        scale=TensorFormat(FP16),
        offset=TensorFormat(E4M3, PerTensor(), scale=TensorFormat(E8M0)),
        zero_point=INT4,
        ragged=Ragged.PAD,
    )
    ruled = TensorFormat(E4M3, PerToken(), PLAIN_FP32, scale_rule=ScaleRule.POWER_CEIL, top=240.0, min_scale=1e-9)
    centred = TensorFormat(
        CodebookFormat("mine", (-1.0, 0.1, 1.0)),
        PerFlatGroup(8),
        PLAIN_FP32,
        offset=PLAIN_FP32,
        offset_granularity=PerTensor(),
    )
    for kept in (fmt, ruled, centred):
        assert TensorFormat.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept


@pytest.mark.parametrize(
    "change",
    [
        {"element": "int99"},
        {"element": ["int4"]},
        {"granularity": {"kind": "group"}},
        {"granularity": {"kind": "group", "size": 0}},
        {"granularity": {"kind": "group", "size": "32"}},
        {"granularity": "tensor"},
        {"zero_point": "e4m3"},
        {"scale": "fp32"},
        {"scale_rule": "guess"},
        {"ragged": None},
        {"scale_rul": "amax"},
        {"element": {"name": "nf4", "values": [0.0, 1.0]}},
        {"element": {"name": "mine", "values": [1.0, 0.0]}},
        {"element": {"name": "mine", "values": 4}},
        {"offset_granularity": {"kind": "tensor"}},
    ],
)
def test_what_is_not_a_format_is_refused(change):
    good = tensor_format("int4-group32-asymmetric").to_dict()
    with pytest.raises(UserError, match="not a tensor format"):
        TensorFormat.from_dict({**good, **change})


def test_names_find_formats_and_near_names_are_suggested():
    assert all(format_name(tensor_format(name)) == name for name in FORMATS)
    with pytest.raises(UserError, match="int4-group128"):
        tensor_format("int4-groups128")


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        (tensor_format("int4-group128"), 4.25),
        (tensor_format("int4-group128-asymmetric"), 4.28125),
        (NVFP4, 4.5 + 32 / 2**20),
        (TensorFormat(NF4, PerFlatGroup(64), scale=PLAIN_FP32), 4.5),
        (TensorFormat(MXINT8_ELEMENT, PerGroup(32), scale=TensorFormat(E8M0)), 8.25),
        (scaled(E4M3, PerTile(128, 128)), 8 + 32 / 128**2),
    ],
    ids=str,
)
def test_bits_per_element_count_the_scales(fmt, bits):
    assert fmt.bits_per_element((1024, 1024)) == bits
