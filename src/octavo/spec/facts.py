"""What a door says about a model before anything is changed: sites, operands, parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum


class Slot(Enum):
    """Where a quantizer may sit at a site."""

    WEIGHT = "weight"
    INPUT = "input"
    OUTPUT = "output"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    SOFTMAX = "softmax"
    ATTENTION_OUTPUT = "attention_output"
    KEY_CACHE = "key_cache"
    VALUE_CACHE = "value_cache"
    LEFT = "left"
    RIGHT = "right"


class Role(Enum):
    """What a layer is for, where only a rule that names such layers may reach it."""

    ROUTER = "router"
    ADAPTER = "adapter"


QUANTIZER_NAMES: dict[Slot, str] = {
    Slot.WEIGHT: "weight_quantizer",
    Slot.INPUT: "input_quantizer",
    Slot.OUTPUT: "output_quantizer",
    Slot.QUERY: "q_bmm_quantizer",
    Slot.KEY: "k_bmm_quantizer",
    Slot.VALUE: "v_bmm_quantizer",
    Slot.SOFTMAX: "softmax_quantizer",
    Slot.ATTENTION_OUTPUT: "bmm2_output_quantizer",
    Slot.KEY_CACHE: "k_cache_quantizer",
    Slot.VALUE_CACHE: "v_cache_quantizer",
    Slot.LEFT: "left_quantizer",
    Slot.RIGHT: "right_quantizer",
}
"""The names that users of this field know; a quantizer's full name is ``<site name>.<this>``."""


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """One place where a parameter meets an activation, or two activations meet.

    Args:
        name: Stable dotted name: the module's path; ``path#operation`` with a number for further sites in one module.
        operation: ``linear``, ``conv``, ``conv_transposed``, ``embedding``, ``recurrent``, ``attention``, ``matmul`` (a
            product of two activations), ``add`` (a sum of what convolutions give), ``norm``, ``activation``, ``other``.
        type_name: Class name of the module (what ``type:`` patterns match); ``base_types`` its base classes' names.
        slots: Slots that a rule may give a quantizer.
        weight_shape: ``(out_features, in_features)`` view of the weight, empty without one.
        parameters: ``name -> number of values`` of the parameters that live here.
        weight_name: Which of them is the weight.
        macs: Multiply-adds seen in the traced forward; ``None`` when no sample was traced.
        tied_to: Name of the site that owns the same parameter, empty for none.
        shares_input_with: Names of sites that read the same tensor.
        fused_call: The function that computes this attention without showing its probabilities, empty for none.
        obstacle: Why nothing here can be quantized (a subclass with its own forward, ...), empty for none.
        role: Router of experts, or adapter beside a frozen layer; ``None`` for an ordinary site.
        unreached: The part of the model that did not run on the sample and holds this site; empty when it ran.
        activation: Where the function is called behind which the output is rounded, empty for the output itself.
        folds_into: Of a batch norm the site of the layer that it can be folded into, empty for none.
        stays: Of a batch norm why it cannot be folded.
        adds: Of an ``add`` the sites whose outputs it sums: on its left a convolution, on its right what skipped that.
    """

    name: str
    operation: str
    type_name: str
    slots: tuple[Slot, ...] = ()
    base_types: tuple[str, ...] = ()
    weight_shape: tuple[int, ...] = ()
    parameters: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    weight_name: str = ""
    macs: int | None = None
    tied_to: str = ""
    shares_input_with: tuple[str, ...] = ()
    fused_call: str = ""
    obstacle: str = ""
    unreached: str = ""
    role: Role | None = None
    adds: tuple[str, ...] = ()
    activation: str = ""
    folds_into: str = ""
    stays: str = ""

    @property
    def is_apart(self) -> bool:
        """Whether only a rule whose pattern matches nothing but such sites may quantize it."""
        return self.operation == "norm" or self.role is not None

    @property
    def num_weights(self) -> int:
        """Values in the weight."""
        return math.prod(self.weight_shape) if self.weight_shape else 0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Everything ``resolve`` knows of a model.

    Args:
        model: What the user called it.
        type_name: Class of the model.
        sites: Sites in the order of the forward pass, parameters of modules without a site included as
            sites of operation ``norm`` or ``other``: every parameter of the model is in exactly one of them.
        num_parameters: Values in all parameters, tied ones once.
        total_bytes: Bytes of all parameters and persistent buffers as they are.
        was_traced: Whether a forward pass was observed (attention calls and multiply-adds are then known).
        notes: What could not be seen, and why.
        experts: Paths of the modules, or lists of modules, that are experts: of which a token meets a few.
    """

    model: str
    type_name: str
    sites: tuple[SiteFacts, ...]
    num_parameters: int
    total_bytes: int
    was_traced: bool
    notes: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
