"""Between a layer's matrix ``(out_features, in_features)`` and its parameter in the model's own shape.

One rule serves every parameter: where inputs come first (transformers' Conv1D, transposed convolutions) the first two
axes change places, then the axes after the first are flattened.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from octavo.numerics.snapshot import LayerSnapshot, Snapshot


def to_parameter(matrix: Tensor, layer: LayerSnapshot) -> Tensor:
    """``matrix`` in the shape that the parameter has in the state dict: values, or codes before packing."""
    if not layer.is_transposed:
        return matrix.reshape(layer.weight_shape)
    first, second, *rest = layer.weight_shape
    return matrix.reshape(second, first, *rest).transpose(0, 1).contiguous()


def channel_scale_to_parameter(scale: Tensor, layer: LayerSnapshot) -> Tensor:
    """``(out_features,)`` scales so that they say by their shape which axis of the parameter they belong to.

    As they are when that is the first axis, else with the parameter's number of axes: ``(1, out_features, 1, 1)``.
    """
    if not layer.is_transposed:
        return scale
    return scale.reshape(1, -1, *(1 for _ in layer.weight_shape[2:]))


def dequantized_weights(snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
    """State-dict key and simulated value, fp32 in the parameter's own shape, of every quantized weight."""
    for layer in snapshot.layers():
        if layer.weight is not None:
            yield layer.weight_name, to_parameter(layer.weight.dequantize(), layer)
