"""What every reader returns: the entries of a checkpoint, their tensors read one at a time when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from octavo.readers.tensor_files import StoredTensor


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """A quantized weight.

    Args:
        name: State-dict key.
        format: In words, as ``octavo plan`` says it.
        shape: Shape of the parameter.
        codes: The stored codes.
        scales: Scales, zero points and the like, by their role.
        decode: Computes the values.
        real_scales: What the scales stand for, by name: each computes its values.
        has_signed_scales: Scales may be negative.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    codes: StoredTensor
    scales: Mapping[str, StoredTensor]
    decode: Callable[[], np.ndarray]
    real_scales: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    has_signed_scales: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.num_bytes + sum(scale.num_bytes for scale in self.scales.values())

    def dequantize(self) -> np.ndarray:
        """The values, fp32, in the parameter's shape.

        Raises:
            UserError: the tensors do not fit together.
        """
        return self.decode()


@dataclass(frozen=True, slots=True)
class ActivationEntry:
    """An activation quantizer, by its full name (``blocks.0.up.input_quantizer``); dynamic ones have no scale.

    ``scale`` is ``stored_factor`` times what values are divided by.
    """

    name: str
    format: str
    is_dynamic: bool
    scale: StoredTensor | None = None
    zero_point: StoredTensor | None = None
    stored_factor: float = 1.0

    def read_scale(self, simulated: float) -> np.ndarray:
        """What values are divided by; ``simulated`` where the files hold exactly ``stored_factor`` times it."""
        assert self.scale is not None, "a dynamic quantizer has no scale"
        stored = self.scale.read()
        factor = stored.dtype.type(self.stored_factor)
        own = np.asarray(simulated, stored.dtype)
        return (
            own.reshape(stored.shape)
            if np.array_equal((own * factor).reshape(-1), stored.reshape(-1))
            else stored / factor
        )


@dataclass(frozen=True, slots=True)
class ExtraEntry:
    """What is done to a layer's input, or added to its output: ``pre_scale``, ``low_rank.a``, ``low_rank.b``.

    Args:
        name: ``<site>.<part>``.
        stored: The tensor in the files.
        is_reciprocal: A ``pre_scale`` divides; the files hold what multiplies.
    """

    name: str
    stored: StoredTensor
    is_reciprocal: bool = False

    def read(self, simulated: np.ndarray) -> np.ndarray:
        """What it means; ``simulated`` where the files hold just its reciprocal, which has no exact inverse."""
        values = self.stored.read()
        if not self.is_reciprocal:
            return values
        is_exact = values.dtype == simulated.dtype and np.array_equal(np.reciprocal(simulated), values)
        return simulated if is_exact else np.reciprocal(values.astype(np.float32))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, listed.

    Args:
        path: Its directory.
        layout: ``run``, ``modelopt`` or ``plain``.
        weights: Quantized weights by state-dict key.
        tensors: What is stored as it was, by state-dict key.
        activations: Activation quantizers by full name.
        missing_input_scales: Weights whose format promises a calibrated input, without one.
        facts: What the files say of themselves: producer, label, recipe.
        extras: By name: vectors that layers' inputs are divided by, and low-rank branches.
        rotations: Site -> size of the blocks in which its input is rotated.
    """

    path: Path
    layout: str
    weights: Mapping[str, WeightEntry]
    tensors: Mapping[str, StoredTensor]
    activations: Mapping[str, ActivationEntry] = field(default_factory=dict)
    missing_input_scales: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, ExtraEntry] = field(default_factory=dict)
    rotations: Mapping[str, int] = field(default_factory=dict)
