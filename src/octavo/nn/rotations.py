"""Rotations fused into weights: R1 of the residual stream and R2 of attention's values, in SpinQuant's naming.

QuaRot (arXiv:2404.00456) and SpinQuant (arXiv:2405.16406): where a space of a model (``spaces``) is nailed nowhere, all
of its parameters are multiplied by one orthogonal matrix, and nothing is left to do at run time. The scale of a norm
commutes with no rotation, so it moves into the layers that read the norm's output first; a norm that subtracts the mean
commutes with rotations that keep the mean, and stays the norm that it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.choices import Choices
from octavo.nn.norm_folds import along_axis, fold_norm
from octavo.nn.streams import RESIDUAL, Stream, Streams, find_streams, tied_readers
from octavo.nn.ties import remember_ties, tie_again, ties_of, untie
from octavo.numerics.arrays import tensors_in
from octavo.numerics.door import RotationFacts
from octavo.numerics.hadamard import Turn, has_hadamard, largest_block
from octavo.spec.plan import Plan
from octavo.spec.tensor_format import PerGroup


def block_size(stream: Stream, wanted: int | str, groups: Iterable[int]) -> int:
    """How many neighbours are turned together: the size asked for, that of the groups, or the largest; 0 for none.

    Args:
        stream: What is turned.
        wanted: ``group``, ``whole`` or a size.
        groups: Group sizes of the formats of the weights that read it; 0 for those without groups.
    """
    if isinstance(wanted, int):
        return wanted if stream.width % wanted == 0 and has_hadamard(wanted) else 0
    sizes = set(groups)
    size = sizes.pop() if wanted == "group" and len(sizes) == 1 else 0
    if size and stream.width % size == 0 and has_hadamard(size):
        return size
    largest = largest_block(stream.width)
    return largest if largest > 1 else 0


@torch.no_grad()
def turn(model: nn.Module, stream: Stream, size: int) -> None:
    """Turn every parameter of a stream, norms folded first."""
    for path, (kind, made) in stream.norms.items():
        fold_norm(model, path, kind, made)
    rotation = Turn(size, keeps_mean=stream.keeps_mean)
    own = dict(model.named_parameters())
    for member in stream.members:
        along_axis(own[member.key], member, rotation)
    for path in stream.norms:
        bias = model.get_submodule(path)._parameters.get("bias")
        if bias is not None:
            bias.copy_(rotation(bias.float()))


class Rotations:
    """What a door knows of rotations that can be fused into its model's weights.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.turned: frozenset[str] = frozenset()
        self._streams: Streams | None = None
        self._chosen: list[Stream] = []
        self._run: Callable[[], Any] | None = None

    def find(self, kinds: frozenset[str], run: Callable[[], Any] | None, *, may_untie: bool) -> RotationFacts:
        """See ``Door.find_rotations``.

        Args:
            kinds: What is looked for.
            run: A forward pass on a sample; ``None`` without one.
            may_untie: Whether parameters may become their own.
        """
        if run is None:
            return RotationFacts(tuple(f"rotate: {kind}: no sample shows how data flow" for kind in sorted(kinds)))
        self._run = run
        streams = find_streams(self.model, run)
        waiting = tied_readers(self.model, streams) if RESIDUAL in kinds else []
        if waiting:
            streams = self._untied(waiting, run)
        self._streams = streams
        self._chosen = [stream for stream in streams.found if stream.kind in kinds and not stream.reason]
        notes = [note for kind in sorted(kinds) for note in _notes(kind, streams.of(kind))]
        ties, own = ties_of(self.model), dict(self.model.named_parameters())
        notes += [
            f"rotate: '{name}' becomes a parameter of its own, apart from '{owner}': {own[name].nbytes:,} bytes more"
            for name, owner in ties.items()
        ]
        if not may_untie:
            tie_again(self.model)
        return RotationFacts(tuple(notes), tuple(ties))

    def _untied(self, names: list[str], run: Callable[[], Any]) -> Streams:
        """The streams without the ties, which stay away where that helps."""
        remember_ties(self.model, untie(self.model, names))
        without = find_streams(self.model, run)
        if all(stream.reason for stream in without.of(RESIDUAL)):
            tie_again(self.model)
        return without

    def apply(self, plan: Plan, block: int | str) -> tuple[str, ...]:
        """Turn what was found.

        Args:
            plan: Tells the groups of the weights that read a stream.
            block: ``group``, ``whole`` or a size.

        Returns:
            What was left as it was, and why.

        Raises:
            UserError: the model computes something else afterwards.
        """
        if self._streams is None or not self._chosen:
            return ()
        assert self._run is not None
        with Choices() as choices:
            before = list(tensors_in(_main(self._run())))
        groups = _group_sizes(plan)
        turned: set[str] = set()
        left: dict[str, None] = {}
        for stream in self._chosen:
            readers = [member for member in stream.members if self._streams.reads(member)]
            size = block_size(stream, block, [groups[m.key] for m in readers if m.key in groups])
            if not size:
                left[
                    f"rotate: {stream.kind}: no Hadamard matrix of the wanted size divides {stream.width} channels"
                ] = None
            else:
                turn(self.model, stream, size)
                turned |= {member.key for member in readers}
        self.turned = frozenset(turned)
        with Choices(choices):
            _check_same(before, list(tensors_in(_main(self._run()))))
        return tuple(left)


def _notes(kind: str, streams: Sequence[Stream]) -> Iterator[str]:
    done = [stream for stream in streams if not stream.reason]
    if not streams:
        yield f"rotate: {kind}: there is none in this model"
    for width in sorted({stream.width for stream in done}):
        count = sum(stream.width == width for stream in done)
        yield f"rotate: {kind}: {count} of {width} channels, in the weights"
    for reason in dict.fromkeys(stream.reason for stream in streams if stream.reason):
        widths = ", ".join(str(stream.width) for stream in streams if stream.reason == reason)
        yield f"rotate: {kind}: one of {widths} channels cannot be rotated in the weights: {reason}"


def _group_sizes(plan: Plan) -> dict[str, int]:
    """Weight -> size of its groups, 0 for none."""
    found = {}
    for decision in plan.decisions:
        if decision.weight is not None:
            granularity = decision.weight.format.granularity
            found[decision.site.weight_name] = granularity.size if isinstance(granularity, PerGroup) else 0
    return found


def _main(output: Any) -> Any:
    """Outputs without the caches among them, whose content is the model's own business."""
    return {k: v for k, v in output.items() if k != "past_key_values"} if isinstance(output, Mapping) else output


def _check_same(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    for old, new in zip(before, after, strict=True):
        size, change = float(old.float().norm()), float((new.float() - old.float()).norm())
        if not change <= (1e-3 if old.dtype is torch.float32 else 5e-2) * size:
            raise UserError(
                f"step 'rotate' should keep what the model computes, and changed its output by {change / size:.2g} of "
                "its norm: leave 'residual' and 'heads' out of 'where', and report it"
            )
