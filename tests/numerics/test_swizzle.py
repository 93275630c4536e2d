"""Block scales in tiles of 128 x 4: as torchao orders them, and nothing lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.numerics.qtensor import QTensor, quantize
from octavo.numerics.swizzle import swizzle_scales, unswizzle_scales
from octavo.spec.formats import NVFP4


def some_scales(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@given(st.integers(0, 300), st.integers(0, 11), st.lists(st.integers(1, 3), max_size=1))
@settings(deadline=None)
def test_the_way_back_gives_every_scale(rows, cols, experts):
    scales = some_scales(*experts, rows, cols)
    assert torch.equal(unswizzle_scales(swizzle_scales(scales), rows, cols), scales)


@pytest.mark.parametrize("shape", [(128, 4), (256, 8), (1, 1), (130, 5), (384, 12), (96, 7)])
def test_it_is_the_order_of_torchao(shape):
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scales = some_scales(*shape)
    theirs = utils.to_blocked(scales, use_triton_kernel=False).flatten()
    assert torch.equal(swizzle_scales(scales), theirs)
    if shape[0] % 128 == 0 and shape[1] % 4 == 0:
        assert torch.equal(unswizzle_scales(theirs, *shape), utils.from_blocked(theirs, *shape))


def test_one_scale_lies_where_the_formula_says():
    scales = torch.zeros(256, 8, dtype=torch.uint8)
    scales[128 + 77, 6] = 1  # tile (1, 1), row 77 and column 2 inside it
    assert swizzle_scales(scales).nonzero().item() == 512 * (1 * 2 + 1) + (77 % 32) * 16 + (77 // 32) * 4 + 2


def test_scales_of_nvfp4_keep_their_dtype():
    scale = quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), NVFP4).scale
    assert isinstance(scale, QTensor)
    tiles = swizzle_scales(scale.codes.view(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(unswizzle_scales(tiles, 4, 4), scale.codes)
    assert tiles.numel() == 512


def test_another_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="scales of 130 rows and 5 columns fill 2048 places, not 1024"):
        unswizzle_scales(torch.zeros(1024, dtype=torch.uint8), 130, 5)
