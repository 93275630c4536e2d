"""Between a layer's matrix ``(out_features, in_features)`` and its parameter in the model's own shape.

One rule serves every parameter: behind the axes of a stack of matrices (experts), where inputs come first
(transformers' Conv1D, transposed convolutions) two axes change places, then the axes after the first are flattened.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from octavo.numerics.snapshot import LayerSnapshot, Snapshot


def to_parameter(matrix: Tensor, layer: LayerSnapshot) -> Tensor:
    """``matrix`` in the shape that the parameter has in the state dict: values, or codes before packing."""
    if not layer.is_transposed:
        return matrix.reshape(layer.weight_shape)
    stack = _num_stacked(layer)
    first, second, *rest = layer.weight_shape[stack:]
    matrix = matrix.reshape(*layer.weight_shape[:stack], second, first, *rest)
    return matrix.transpose(stack, stack + 1).contiguous()


def _num_stacked(layer: LayerSnapshot) -> int:
    return len(layer.weight.shape) - 2 if layer.weight is not None else 0


def channel_scale_to_parameter(scale: Tensor, layer: LayerSnapshot) -> Tensor:
    """``(out_features,)`` scales so that they say by their shape which axis of the parameter they belong to.

    As they are when that is the first axis, else with the parameter's number of axes: ``(1, out_features, 1, 1)``.
    """
    if not layer.is_transposed:
        return scale
    stack = _num_stacked(layer)
    return scale.reshape(*layer.weight_shape[:stack], 1, -1, *(1 for _ in layer.weight_shape[stack + 2 :]))


def dequantized_weights(snapshot: Snapshot) -> Iterator[tuple[str, Tensor]]:
    """State-dict key and simulated value, fp32 in the parameter's own shape, of every quantized weight."""
    for layer in snapshot.layers():
        if layer.weight is not None:
            yield layer.weight_name, to_parameter(layer.weight.dequantize(), layer)
