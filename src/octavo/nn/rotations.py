"""Rotations fused into weights: R1 of the residual stream and R2 of attention's values, in SpinQuant's naming.

QuaRot (arXiv:2404.00456) and SpinQuant (arXiv:2405.16406): where a space of a model (``spaces``) is nailed nowhere, all
of its parameters are multiplied by one orthogonal matrix, and nothing is left to do at run time. The scale of a norm
commutes with no rotation, so it moves into the layers that read the norm's output first; a norm that subtracts the mean
commutes with rotations that keep the mean, and stays the norm that it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.norms import NormKind
from octavo.nn.space_trace import READS, WRITES, SpaceTrace, trace_spaces
from octavo.nn.spaces import Member, Space
from octavo.nn.ties import names_of, remember_ties, tie_again, ties_of, untie
from octavo.numerics.arrays import tensors_in
from octavo.numerics.door import RotationFacts
from octavo.numerics.hadamard import Turn, has_hadamard, largest_block
from octavo.spec.plan import Plan
from octavo.spec.tensor_format import PerGroup

RESIDUAL, HEADS = "residual", "heads"
_TINY = 1e-3  # of a norm's scales: what a bias is divided by must not be smaller than this share of the largest


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """What must be turned by one matrix.

    Args:
        kind: ``residual`` or ``heads``.
        width: Neighbours that may be turned together.
        spaces: Its spaces, each of which is nailed nowhere unless ``reason`` says so.
        norms: Path -> what it is, and the space of its output.
        reason: Why it cannot be turned; empty where it can.
    """

    kind: str
    width: int
    spaces: tuple[Space, ...]
    norms: Mapping[str, tuple[NormKind, Space]]
    reason: str = ""

    @property
    def members(self) -> list[Member]:
        """Every parameter's axis in it, in a stable order."""
        found = {member for space in self.spaces for member in space.members}
        return sorted(found, key=lambda member: (member.key, member.axis, member.start))

    @property
    def keeps_mean(self) -> bool:
        """One of its norms subtracts the mean."""
        return any(kind.keeps_mean for kind, _ in self.norms.values())


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """All streams of a model, and what was seen of it."""

    found: tuple[Stream, ...]
    seen: SpaceTrace

    def of(self, kind: str) -> list[Stream]:
        """Those of one kind."""
        return [stream for stream in self.found if stream.kind == kind]

    def reads(self, member: Member) -> bool:
        """Whether a product sums over it."""
        return any(role == READS for role, _ in self.seen.roles_of(member))


def find_streams(model: nn.Module, run: Callable[[], Any]) -> Streams:
    """Follow ``run``, one forward pass of ``model``."""
    seen = trace_spaces(model, run)
    roots = _roots(seen)
    streams = [stream for spaces in _components(seen, roots) if (stream := _stream(model, seen, spaces)) is not None]
    return Streams(tuple(streams), seen)


def _roots(seen: SpaceTrace) -> list[Space]:
    waiting = [*seen.spaces, *(space for _, one, two in seen.norms.values() for space in (one, two))]
    roots: dict[int, Space] = {}
    while waiting:
        root = waiting.pop(0).root
        if id(root) not in roots:
            roots[id(root)] = root
            for part in root.parts.values():
                if root.reason:
                    part.nail(root.reason)
                waiting.append(part)
            if root.parts:
                root.nail("it is cut into parts")
    return list(roots.values())


def _components(seen: SpaceTrace, roots: Sequence[Space]) -> Iterator[list[Space]]:
    """Spaces that a norm ties to each other."""
    neighbours: dict[int, list[Space]] = {}
    for _, one, two in seen.norms.values():
        neighbours.setdefault(id(one.root), []).append(two.root)
        neighbours.setdefault(id(two.root), []).append(one.root)
    done: set[int] = set()
    for root in roots:
        waiting, found = [root], []
        while waiting:
            space = waiting.pop()
            if id(space) not in done:
                done.add(id(space))
                found.append(space)
                waiting += neighbours.get(id(space), [])
        if found:
            yield found


def _stream(model: nn.Module, seen: SpaceTrace, spaces: list[Space]) -> Stream | None:
    """The stream that these spaces are; ``None`` for what is neither a residual stream nor values of attention."""
    paths = {path for space in spaces for path in space.norms_out}
    norms = {path: (kind, made.root) for path, (kind, _, made) in seen.norms.items() if path in paths}
    if any(space.is_sum and (space.norms_in or not norms) for space in spaces):
        kind = RESIDUAL
    elif any(space.is_mixed for space in spaces) and not norms:
        kind = HEADS
    else:
        return None
    width = math.gcd(*(space.block for space in spaces))
    stream = Stream(kind, width, tuple(spaces), norms)
    nailed = next((space.reason for space in spaces if space.reason), "")
    reason = _norm_that_writes(seen, stream) or nailed or _why_not(model, seen, stream)
    if not _has_both_ends(seen, stream) if kind == HEADS else reason and not norms:
        return None
    return Stream(kind, width, tuple(spaces), norms, reason)


def _has_both_ends(seen: SpaceTrace, stream: Stream) -> bool:
    roles = {role for member in stream.members for role, _ in seen.roles_of(member)}
    return {READS, WRITES} <= roles


def _norm_that_writes(seen: SpaceTrace, stream: Stream) -> str:
    """A norm whose output is added to something, as behind every block of a post-norm model."""
    for path, (kind, made) in stream.norms.items():
        others = [member for member in made.members if _does(seen, member, WRITES) and not _does(seen, member, READS)]
        if (
            kind.has_weight
            and (others or made.is_sum)
            and not any(_does(seen, m, READS) and _does(seen, m, WRITES) for m in made.members)
        ):
            return f"'{path}' writes to it, and no rotation can pass the scales of its channels"
    return ""


def _why_not(model: nn.Module, seen: SpaceTrace, stream: Stream) -> str:
    own = dict(model.named_parameters())
    for member in stream.members:
        if "parametrizations." in member.key or own[member.key].numel() == 0:
            return f"'{member.key}' is no plain weight"
    for path, (kind, made) in stream.norms.items():
        if not kind.has_weight:
            continue
        if len(made.norms_out) > 1 or any(_does(seen, member, WRITES) for member in made.members):
            tied = _tied_reader(model, seen, made)
            if tied:
                return f"'{tied}' is read behind '{path}' and is the table of embeddings, too"
            return f"'{path}' writes to it, and no rotation can pass the scales of its channels"
        if any(own[member.key].ndim < 2 for member in made.members):
            return f"the scales of '{path}' cannot move into what reads it"
        problem = _bias_problem(model, kind, path, made)
        if problem:
            return problem
    return ""


def _does(seen: SpaceTrace, member: Member, role: str) -> bool:
    return any(found == role for found, _ in seen.roles_of(member))


def _tied_reader(model: nn.Module, seen: SpaceTrace, space: Space) -> str:
    """A parameter with several names that is both read and written with in ``space``."""
    names = names_of(model)
    both = [m.key for m in space.members if _does(seen, m, READS) and _does(seen, m, WRITES) and len(names[m.key]) > 1]
    return min(both, default="")


# Ties


def tied_readers(model: nn.Module, streams: Streams) -> list[str]:
    """Names of parameters that only a tie keeps from being turned: what reads them has a name of its own for them."""
    names = names_of(model)
    found = []
    for stream in streams.of(RESIDUAL):
        for member in stream.members:
            roles = streams.seen.roles_of(member)
            if {role for role, _ in roles} == {READS, WRITES} and len(names[member.key]) > 1:
                places = {place for role, place in roles if role == READS}
                found += [name for name in names[member.key][1:] if name.rpartition(".")[0] in places]
    return list(dict.fromkeys(found))


# Norms


def _bias_key(model: nn.Module, member: Member) -> str:
    """The bias that is added to the product with a weight; empty where there is none."""
    home, _, last = member.key.rpartition(".")
    name = last.removesuffix("weight") + "bias"
    bias = model.get_submodule(home)._parameters.get(name) if last.endswith("weight") else None
    return f"{home}.{name}".lstrip(".") if bias is not None else ""


def _bias_problem(model: nn.Module, kind: NormKind, path: str, made: Space) -> str:
    norm = model.get_submodule(path)
    bias, weight = norm._parameters.get("bias"), norm._parameters.get("weight")
    if not kind.has_bias or bias is None or weight is None or not bool(bias.detach().any()):
        return ""
    if _readers_take_bias(model, made) or _divides(kind, weight):
        return ""
    return f"the bias of '{path}' cannot pass its scales, some of which are nearly zero, and what reads it has no bias"


def _readers_take_bias(model: nn.Module, made: Space) -> bool:
    own = dict(model.named_parameters())
    return all(_bias_key(model, m) and own[m.key].ndim == 2 for m in made.members)


def _divides(kind: NormKind, weight: Tensor) -> bool:
    scale = _scale(kind, weight).abs()
    return bool(scale.min() > _TINY * scale.max())


def _scale(kind: NormKind, weight: Tensor) -> Tensor:
    return weight.detach().float() + (1.0 if kind.is_centred else 0.0)


@torch.no_grad()
def fold_norm(model: nn.Module, path: str, kind: NormKind, made: Space) -> None:
    """Move the scales of a norm into the columns that read it, and its bias into their biases or under its scale."""
    norm, own = model.get_submodule(path), dict(model.named_parameters())
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if weight is None:
        return
    scale = _scale(kind, weight)
    if bias is not None and bool(bias.any()):
        if _readers_take_bias(model, made):
            for member in made.members:
                reader, target = own[member.key], own[_bias_key(model, member)]
                shift = torch.tensordot(reader.float(), bias.float(), dims=([member.axis], [0]))
                target.copy_(target.float() + shift)
            bias.zero_()
        else:
            bias.copy_(bias.float() / scale)
    for member in made.members:
        along_axis(own[member.key], member, lambda values: values * scale)
    weight.copy_(torch.full_like(weight, 0.0 if kind.is_centred else 1.0))


@torch.no_grad()
def along_axis(parameter: Tensor, member: Member, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a run of an axis by what ``change`` makes of it in fp32, that axis last."""
    part = parameter.detach().narrow(member.axis, member.start, member.size)
    part.copy_(change(part.movedim(member.axis, -1).float().contiguous()).movedim(-1, member.axis))


# Turning


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
