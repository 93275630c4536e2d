"""The protocol that everything above the wings speaks: one model seen from outside, and the walk over its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from octavo.numerics.block import Block
from octavo.numerics.snapshot import LayerSnapshot, Snapshot
from octavo.numerics.statistics import Need
from octavo.numerics.store import Store
from octavo.spec.facts import ModelFacts
from octavo.spec.plan import Plan


@dataclass(frozen=True, slots=True)
class RotationFacts:
    """What ``Door.find_rotations`` found.

    Args:
        notes: What will be rotated, and what cannot be and why.
        untied: Names of parameters that are their own for it.
    """

    notes: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()


class Walk(Protocol):
    """Blocks one after the other; how many is known beforehand."""

    num_batches: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Block]: ...


class Door(Protocol):
    """A model, whatever it is made of."""

    def facts(self) -> ModelFacts:
        """Sites, parameters, multiply-adds. Nothing in the model changes."""
        ...

    def why_not(self, needs: frozenset[Need]) -> str:
        """Why blocks of this model cannot give what an algorithm needs, and the way out; empty when they can."""
        ...

    def find_rotations(self, kinds: frozenset[str], *, may_untie: bool) -> RotationFacts:
        """Look for what rotations could be fused into; before ``facts``.

        Args:
            kinds: ``residual``, ``heads``.
            may_untie: Parameters that are one, and would have to be two, become two until ``tie_again`` or ``strip``.
        """
        ...

    def tie_again(self) -> None:
        """Undo what ``find_rotations`` untied."""
        ...

    def rotate(self, block: int | str) -> Sequence[str]:
        """Fuse the rotations that were found into the weights of a prepared model, in full precision.

        Args:
            block: ``group``, ``whole`` or a size.

        Returns:
            What was left as it was, and why.

        Raises:
            UserError: the model computes something else afterwards.
        """
        ...

    def prepare(self, plan: Plan) -> None:
        """Put the plan's quantizers in place. Weight quantizers are ready; activation quantizers are off."""
        ...

    def observe(self) -> AbstractContextManager[None]:
        """While open, forward passes are unquantized and feed the observers."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """While open, forward passes are those of inference: no dropout, no running statistics."""
        ...

    def finish_calibration(self) -> Mapping[str, str]:
        """Turn observed statistics into scales.

        Returns:
            Quantizer name -> why it stays off, for those that saw no data.
        """
        ...

    def run(self, batch: Any) -> Any:
        """One forward pass without gradients: a tensor, a tuple of positional inputs, or a dict."""
        ...

    def expert_tokens(self) -> Mapping[str, Sequence[int]]:
        """Layer of experts -> tokens that each of them got while observing; empty without experts."""
        ...

    def quantizer_names(self) -> Sequence[str]:
        """Every quantizer that is in place, in model order."""
        ...

    def disabled(self, names: Callable[[str], bool]) -> AbstractContextManager[None]:
        """While open, the quantizers whose name satisfies ``names`` pass values through."""
        ...

    def walk(
        self,
        batches: Iterable[Any] | None,
        store: Store,
        *,
        is_quantized: bool,
        keeps_unquantized: bool,
        folds_only: AbstractSet[str] = frozenset(),
    ) -> Walk:
        """The blocks of the model in the order of its forward pass, each with its inputs.

        A block that was handed out must be advanced before the next is asked for.

        Args:
            batches: Calibration data; ``None`` for steps that need none.
            store: Where inputs wait.
            is_quantized: Inputs come by the quantized path, through the blocks that are settled already; else by the
                unquantized one.
            keeps_unquantized: The unquantized path is followed, too (``CROSS`` needs both).
            folds_only: Layers whose input takes a scale only where it can be folded.
        """
        ...

    def snapshot(self) -> Snapshot:
        """What exporters see."""
        ...

    def restore(self, plan: Plan, tensors: Mapping[str, Tensor], layers: Iterable[LayerSnapshot]) -> None:
        """Prepare with ``plan``, with weights and ranges from a run's files instead of from calibration.

        Args:
            plan: Of the run.
            tensors: Everything that the model had, by name, the quantized weights as what their codes mean.
            layers: The run's snapshot.

        Raises:
            UserError: the tensors are not this model's.
        """
        ...

    def simulated_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name of every quantized weight, and the rounded values that the simulation computes with."""
        ...

    def activation_scales(self) -> Mapping[str, float]:
        """Full quantizer name -> scale, of every static activation quantizer that is on."""
        ...

    def simulated_extras(self) -> Iterator[tuple[str, Tensor]]:
        """``<site>.<part>`` and value of what is done to inputs beside rounding, and of low-rank branches.

        Parts: ``pre_scale``, ``input_rotation``, ``low_rank.a``, ``low_rank.b``.
        """
        ...

    def twin(
        self,
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        extras: Mapping[str, Tensor],
    ) -> Door:
        """A copy of the simulation that computes with other values, found by whoever checks files.

        Args:
            weights: Name -> simulated value, in the parameter's shape.
            tensors: Name -> value of what is not quantized.
            scales: Quantizer -> scale.
            extras: As ``simulated_extras`` names them.
        """
        ...

    def write_skeleton(self, directory: Path) -> None:
        """Write what is needed, besides tensors and the model's own files, to build the model again."""
        ...

    def strip(self) -> None:
        """The model as it was."""
        ...
