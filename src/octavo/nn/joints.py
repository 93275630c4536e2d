"""Where a factor can be moved to for what functions read: experts in one tensor, and all that share their input.

As in ``flow``, it is found by trying, with powers of two. What an expert reads was chosen and copied from what a norm
made, so no tensor tells who shares it: the norm's channels are multiplied, and every parameter whose input comes out
multiplied alike is a reader. Readers are divided as they show themselves, the router before the experts that it
chooses, until nobody new does; when the block's outputs are then what they were, nobody else has read it.

What an expert's second matrix reads is, in a gated product, linear in half of the rows of its first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from octavo.nn.flow import Producer, agree, tolerance
from octavo.nn.layers import layer_kind
from octavo.nn.reads import Read, Reads
from octavo.nn.snapshot import stored_parameter

_MOST_NORMS = 4
_MOST_ROUNDS = 5
_LARGEST_POWER = 3


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a parameter's axis.

    Args:
        key: Its name in the block.
        axis: Which axis.
        start: First index along it.
        stop: The index after the last.
        step: 2: every second.
        index: The matrix of a stack, -1 for all.
    """

    key: str
    axis: int
    start: int
    stop: int
    step: int = 1
    index: int = -1

    @torch.no_grad()
    def multiply(self, root: nn.Module, factors: Tensor) -> None:
        """Multiply index ``k`` of the run by ``factors[k]``."""
        parameter = stored_parameter(root, self.key).detach()
        part = parameter if self.index < 0 else parameter[self.index : self.index + 1]
        part = part.movedim(self.axis, -1)[..., self.start : self.stop : self.step]
        for one in part if part.ndim > 2 else [part]:  # one matrix at a time in fp32
            one.copy_((one.float() * factors).to(one.dtype))


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm's output.

    Args:
        path: Of the norm in the block.
        size: Its channels.
        is_centred: It multiplies by one plus its weight.
    """

    path: str
    size: int
    is_centred: bool = False

    def multiply(self, root: nn.Module, factors: Tensor) -> None:
        """Multiply channel ``k`` by ``factors[k]``, in the parameters."""
        Producer(self.path, root.get_submodule(self.path), slice(0, self.size), self.is_centred).multiply(factors)


@dataclass(frozen=True, slots=True)
class Joint:
    """Something linear in the channels of a tensor, and every parameter that reads them.

    Names are those within the block, so that it serves any block that is built alike.

    Args:
        made_by: A norm, or rows of a stack and the biases added to their products.
        readers: Axes that meet the channels.
        producer: Name of the norm or the parameter.
        index: The expert that it is for, -1 for all.
    """

    made_by: tuple[Norm | Part, ...]
    readers: tuple[Part, ...]
    producer: str
    index: int = -1

    def divide(self, root: nn.Module, scale: Tensor) -> None:
        """Divide the channels by ``(num_channels,)`` factors, and multiply what meets them."""
        for made in self.made_by:
            made.multiply(root, 1 / scale)
        for reader in self.readers:
            reader.multiply(root, scale)

    def of_expert(self, index: int) -> Joint:
        """The part of a joint of stacks that concerns one expert."""
        made = tuple(replace(made, index=index) for made in self.made_by if isinstance(made, Part))
        return Joint(made, tuple(replace(reader, index=index) for reader in self.readers), self.producer, index)


@dataclass(eq=False)
class JointFinder:
    """Finds joints of a block.

    Args:
        root: The block.
        probe: Its forward on a few samples, in full precision: every floating tensor that it returns.
        alike: Names of one weight in all experts of a list: those that the samples do not reach do what the others do.
    """

    root: nn.Module
    probe: Callable[[], Sequence[Tensor]]
    alike: Sequence[tuple[str, ...]] = ()
    _order: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        own = self.root.named_parameters()
        self._parameters = {
            key: stored_parameter(self.root, key).detach() for key, p in own if p.is_floating_point() and p.ndim > 1
        }
        with ExitStack() as cleanup:
            reads = Reads(self._parameters)
            for path, module in self.root.named_modules():
                cleanup.callback(module.register_forward_hook(partial(self._note, reads, path)).remove)
            with reads:
                self._reference = self.probe()
        self._reads = _by_key(reads.found)
        self._siblings = {key: keys for keys in self.alike for key in keys}

    def _note(self, reads: Reads, path: str, *_: object) -> None:
        self._order.append(path)
        reads.now = len(self._order)

    def find(self, keys: Sequence[tuple[str, bool]]) -> tuple[Joint, ...]:
        """All joints of parameters that functions or experts in a list read.

        Args:
            keys: Of what functions read: names in the block, and whether each is a stack of matrices.
        """
        found: list[Joint] = []
        lists = [(next((key for key in keys if key in self._reads), keys[0]), False) for keys in self.alike]
        for key, is_stack in (*keys, *lists):
            if any(reader.key == key for joint in found for reader in joint.readers):
                continue
            joint = self.norm_before(key)
            if joint is not None:
                found.append(joint)
            elif is_stack and (joint := self.rows_before(key)) is not None:
                found += [joint.of_expert(index) for index in range(self._parameters[key].shape[0])]
        return tuple(found)

    def norm_before(self, key: str) -> Joint | None:
        """The norm whose output, or a choice from it, ``key`` reads; ``None`` where no factor can be moved."""
        reads = self._reads.get(key)
        if reads is None:
            return None
        channels, count = reads[0].x.shape[-1], 0
        if not self._all_ran(channels):
            return None
        for path in dict.fromkeys(reversed(self._order[: reads[0].time])):
            weight = self.root.get_submodule(path)._parameters.get("weight")
            if weight is None or tuple(weight.shape) != (channels,) or not weight.is_floating_point():
                continue
            for is_centred in (False, True):
                found = self._confirmed((Norm(path, channels, is_centred),), path, key, self._reads)
                if found is not None:
                    return found
            count += 1
            if count == _MOST_NORMS:
                return None
        return None

    def _all_ran(self, channels: int) -> bool:
        """Whether every layer that could be a reader was seen: one that was not sent anything says nothing."""
        for path, module in self.root.named_modules():
            key = f"{path}.weight".lstrip(".")
            kind, weight = layer_kind(module), self._parameters.get(key)
            if kind is None or kind.operation != "linear" or weight is None:
                continue
            is_seen = any(name in self._reads for name in self._siblings.get(key, (key,)))
            if not is_seen and kind.view(weight).matrix_shape[-1] == channels:
                return False
        return True

    def rows_before(self, key: str) -> Joint | None:
        """Rows of a stack in which what the stack ``key`` reads is linear, expert by expert; ``None`` for none."""
        reads = self._reads.get(key)
        shape = self._parameters[key].shape
        if reads is None or len(shape) != 3:
            return None
        for other, found in self._reads.items():
            parameter = self._parameters[other]
            if other == key or parameter.ndim != 3 or parameter.shape[0] != shape[0] or found[0].time > reads[0].time:
                continue
            for rows in _row_choices(other, parameter, found[0].axis, reads[0].x.shape[-1]):
                biases = tuple(self._biases(rows, parameter))
                joint = self._confirmed((rows, *biases), other, key, {key: reads})
                if joint is not None:
                    return joint
        return None

    def _biases(self, rows: Part, parameter: Tensor) -> Iterator[Part]:
        """Stacks of vectors beside a stack of matrices that are called as it is, and more."""
        for key, bias in self._parameters.items():
            if key.startswith(rows.key) and tuple(bias.shape) == (parameter.shape[0], parameter.shape[rows.axis]):
                yield replace(rows, key=key, axis=1)

    def _confirmed(
        self, made_by: tuple[Norm | Part, ...], producer: str, wanted: str, candidates: Mapping[str, list[Read]]
    ) -> Joint | None:
        """What was made is multiplied, readers are divided one by one; the joint, if nobody else has noticed."""
        channels = candidates[wanted][0].x.shape[-1]
        generator = torch.Generator().manual_seed(0)
        powers = torch.randint(-_LARGEST_POWER, _LARGEST_POWER + 1, (channels,), generator=generator).float()
        factors = powers.exp2().to(candidates[wanted][0].x.device)
        readers: tuple[Part, ...] = ()
        for _ in range(_MOST_ROUNDS):
            with self._changed(made_by, readers, factors) as (outputs, reads):
                known = {reader.key for reader in readers}
                new = {
                    name: Part(name, before[0].axis, 0, channels)
                    for key, before in candidates.items()
                    if key not in known and _are_multiplied(before, reads.get(key, []), factors)
                    for name in (key, *(name for name in self._siblings.get(key, ()) if name not in self._reads))
                    if name not in known
                }
                if new:
                    readers = (*readers, *new.values())
                elif wanted in known and agree(outputs, self._reference):
                    return Joint(made_by, readers, producer)
                else:
                    return None
        return None

    @contextmanager
    def _changed(
        self, made_by: Iterable[Norm | Part], readers: Iterable[Part], factors: Tensor
    ) -> Iterator[tuple[Sequence[Tensor], Mapping[str, list[Read]]]]:
        """Outputs and reads with channels multiplied and readers divided; parameters come back bit for bit."""
        changed: dict[Tensor, Tensor] = {}
        for part in (*made_by, *readers):
            if isinstance(part, Norm):
                module = self.root.get_submodule(part.path)
                changed |= {p: p.detach().clone() for p in module._parameters.values() if p is not None}
            else:
                parameter = stored_parameter(self.root, part.key)
                changed.setdefault(parameter, parameter.detach().clone())
        try:
            for made in made_by:
                made.multiply(self.root, factors)
            for reader in readers:
                reader.multiply(self.root, 1 / factors)
            with Reads(self._parameters) as reads:
                outputs = self.probe()
            yield outputs, _by_key(reads.found)
        finally:
            with torch.no_grad():
                for parameter, value in changed.items():
                    parameter.copy_(value)


def _by_key(reads: Sequence[Read]) -> dict[str, list[Read]]:
    """A read of no rows says nothing."""
    found: dict[str, list[Read]] = {}
    for read in reads:
        if read.x.numel():
            found.setdefault(read.key, []).append(read)
    return found


def _row_choices(key: str, parameter: Tensor, summed: int, channels: int) -> Iterator[Part]:
    """All rows of the matrices, or one half: the last, the first, the odd ones, the even ones."""
    axis = 3 - summed
    rows = parameter.shape[axis]
    if summed not in (1, 2) or rows not in (channels, 2 * channels):
        return
    if rows == channels:
        yield Part(key, axis, 0, rows)
        return
    yield Part(key, axis, channels, rows)
    yield Part(key, axis, 0, channels)
    yield Part(key, axis, 1, rows, 2)
    yield Part(key, axis, 0, rows, 2)


def _are_multiplied(before: Sequence[Read], after: Sequence[Read], factors: Tensor) -> bool:
    """Whether every input of a parameter came out multiplied by ``(channels,)`` factors, and enough of it was seen."""
    if len(before) != len(after) or any(read.axis != before[0].axis for read in before):
        return False
    seen = torch.zeros_like(factors, dtype=torch.bool)
    for old, new in zip(before, after, strict=True):
        if old.x.shape != new.x.shape or old.x.shape[-1] != factors.shape[0]:
            return False
        x, y = (part.x.reshape(-1, factors.shape[0]).float() for part in (old, new))
        if not x.shape[0]:
            continue
        size = y.abs().amax(0)
        if not bool(((y - x * factors).abs().amax(0) <= tolerance(old.x.dtype) * size).all()):
            return False
        seen |= size > 0
    return int(seen.sum()) * 4 >= factors.shape[0]
