"""What sums of products of bytes lose on processors whose instruction adds two of them in 16 bits.

``vpmaddubsw`` (AVX2, AVX512 without VNNI) multiplies unsigned by signed bytes and adds neighbours in a saturating
16-bit integer. onnxruntime's kernels feed it neighbours along the inner axis, (0, 1), (2, 3), ..., zero behind an odd
end; of a convolution that axis is kernel position by kernel position, the channels of each last. Checked against these
kernels on an emulated processor (``tests/onnx/test_saturation.py``).

Only pairs of weights that reach the end with the largest activations that come matter, a small share of all, so the
loss is computed for these and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.numerics.windows import Geometry, windows

_LOW, _HIGH = -(2**15), 2**15 - 1


@torch.no_grad()
def lost(codes: Tensor, weight: Tensor) -> Tensor:
    """How much larger exact sums are than saturating ones.

    Args:
        codes: ``(rows, in_features)`` activations, integers in [0, 255].
        weight: ``(out_features, in_features)`` integers in [-128, 127].

    Returns:
        ``(rows, out_features)`` int32; negative where a sum saturates at the low end.

    >>> lost(torch.tensor([[255, 255, 1]]), torch.tensor([[127, 127, 127]]))
    tensor([[32003]], dtype=torch.int32)
    """
    pairs_w, pairs_x = _paired(weight), _paired(codes).permute(1, 2, 0).contiguous()
    found = torch.zeros(len(weight), len(codes), dtype=torch.int32, device=codes.device)
    if not codes.numel():
        return found.T
    top = pairs_x.amax(-1)  # (pairs, 2): the largest activations that come
    high, low = ((pairs_w.clamp(**end) * top).sum(-1) for end in ({"min": 0}, {"max": 0}))
    matters = ((high > _HIGH) | (low < _LOW)).T  # (pairs, out_features)
    for pair in matters.any(1).nonzero().flatten().tolist():
        outputs = matters[pair].nonzero().flatten()
        total = pairs_w[outputs, pair] @ pairs_x[pair]  # exact: below 2^24
        found.index_add_(0, outputs, (total - total.clamp(_LOW, _HIGH)).int())
    return found.T


def _paired(matrix: Tensor) -> Tensor:
    """``(rows, in_features)`` as ``(rows, pairs, 2)`` fp32."""
    return F.pad(matrix.float(), (0, matrix.shape[1] % 2)).view(len(matrix), -1, 2)


@torch.no_grad()
def conv_lost(codes: Tensor, weight: Tensor, geometry: Geometry, zero_code: int) -> Tensor:
    """``lost`` of a convolution.

    Args:
        codes: ``(batch, in_channels, *spatial)`` integers in [0, 255].
        weight: ``(out_channels, in_channels / groups, *kernel)`` integers in [-128, 127].
        geometry: How it moves.
        zero_code: The code of 0, which pads.

    Returns:
        ``(batch, out_channels, *spatial)`` int32. Nothing is lost where each channel is a group of its own:
        onnxruntime's kernel for these adds in 32 bits.
    """
    kernel = tuple(weight.shape[2:])
    seen = windows(codes.int(), kernel, geometry, zero_code)
    spatial = tuple(seen.shape[2 : 2 + len(kernel)])
    shape = (len(codes), len(weight), *spatial)
    if geometry.groups == codes.shape[1]:
        return torch.zeros(shape, dtype=torch.int32, device=codes.device)
    # (batch, channels, *spatial, *kernel) -> (batch, *spatial, *kernel, channels)
    last = seen.movedim(1, -1)
    parts = [
        lost(part.reshape(-1, own[0].numel()), own.movedim(1, -1).flatten(1))
        for part, own in zip(last.chunk(geometry.groups, -1), weight.chunk(geometry.groups), strict=True)
    ]
    return torch.cat(parts, 1).view(len(codes), *spatial, -1).movedim(-1, 1)
