"""What exporters see of a quantized model, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from octavo.numerics.qtensor import QTensor
from octavo.spec.facts import Slot
from octavo.spec.tensor_format import TensorFormat


@dataclass(frozen=True, slots=True)
class ActivationScale:
    """The range of one activation quantizer.

    ``scale`` is fp32, ``()`` when static and ``None`` when it is computed per call (``is_dynamic``).
    """

    format: TensorFormat
    is_dynamic: bool
    scale: Tensor | None = None
    zero_point: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerSnapshot:
    """One site with at least one quantizer.

    Args:
        name: Site name, ``<module path>`` or ``<module path>#<operation><number>``.
        operation: As in ``SiteFacts``.
        weight_name: Full state-dict key of the weight (``<path>.weight``), empty without one.
        weight: The quantized weight, viewed ``(..., out_features, in_features)``; ``None`` when it stays as it is.
        weight_shape: Shape of the parameter in the state dict (a convolution's four axes, say).
        is_transposed: The parameter is stored ``(in_features, out_features)`` (transformers' Conv1D).
        activations: Activation quantizers by slot.
        pre_scale: ``(num_channels,)`` vector that divides the input, ``None`` for none.
        input_rotation: Block size of the Hadamard rotation of the input after that, 0 for none.
        low_rank: ``a`` ``(rank, in_features)`` and ``b`` ``(out_features, rank)``: ``x @ a.T @ b.T`` is added to the
            output, where ``x`` is the input after scale and rotation, before rounding. ``None`` for none. Of a stack of
            matrices both begin with its axis.
        fusion_group: Sites that read the same input carry the same non-empty name.
    """

    name: str
    operation: str
    weight_name: str = ""
    weight: QTensor | None = None
    weight_shape: tuple[int, ...] = ()
    is_transposed: bool = False
    activations: Mapping[Slot, ActivationScale] = field(default_factory=dict)
    pre_scale: Tensor | None = None
    input_rotation: int = 0
    low_rank: tuple[Tensor, Tensor] | None = None
    fusion_group: str = ""


class Snapshot(Protocol):
    """A quantized model as a stream: at most one layer in memory at a time."""

    def layers(self) -> Iterator[LayerSnapshot]:
        """Every site with a quantizer, in the order of the model."""
        ...

    def passthrough(self) -> Iterator[tuple[str, Tensor]]:
        """State-dict entries that stay as they are; tied ones once."""
        ...

    def tied(self) -> Mapping[str, str]:
        """State-dict keys that are other names of a tensor: ``alias -> owner``."""
        ...


class Agreement(Protocol):
    """One written file held against the simulation, by who can run it."""

    @property
    def agrees(self) -> bool:
        """Whether the file means what was simulated."""
        ...

    @property
    def num_weights(self) -> int:
        """Quantized weights compared."""
        ...

    @property
    def num_values(self) -> int:
        """Values in them."""
        ...

    @property
    def different_weights(self) -> Mapping[str, int]:
        """Weight quantizer -> how many of its values differ."""
        ...

    @property
    def missing(self) -> tuple[str, ...]:
        """Weights that only the file has."""
        ...

    def to_json_object(self) -> dict[str, Any]:
        """Plain JSON values: ``file``, ``runtime``, ``refusals``, ``num_nodes``, ``worst_node``, ``cosine`` ..."""
        ...
