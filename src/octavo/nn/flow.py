"""Where a factor for every channel can be moved to, found by trying: no names, no table of architectures.

A candidate producer's channels are multiplied by random powers of two. Powers of two change no mantissa, so wherever
the way from there to a group's input is linear channel by channel (straight through, through a product with a gate,
through the values of attention), that input comes out multiplied by powers of two, bit for bit, and which ones tells
which producer channel feeds which channel that is read. Then the readers' columns are divided by the same powers: when
the block's outputs are what they were, nobody else has read the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from octavo.nn.block_layers import BlockLayer
from octavo.nn.layers import layer_kind
from octavo.nn.views import WeightView

_MOST_CANDIDATES = 4
_LARGEST_POWER = 3


@dataclass(frozen=True, slots=True, eq=False)
class Producer:
    """Output channels of a module that can be multiplied by factors.

    Args:
        path: Of the module.
        module: A norm with a weight, or a layer.
        rows: Which of its output channels.
        is_centred: The norm multiplies by one plus its weight.
    """

    path: str
    module: nn.Module
    rows: slice
    is_centred: bool = False

    @torch.no_grad()
    def multiply(self, factors: Tensor) -> None:
        """Multiply channel ``rows[k]`` by ``factors[k]``, in the parameters."""
        weight, bias = self.module._parameters["weight"], self.module._parameters.get("bias")
        assert weight is not None
        if bias is not None:
            bias[self.rows] = (bias[self.rows].float() * factors).to(bias.dtype)
        if weight.ndim == 1:
            one = 1.0 if self.is_centred else 0.0
            weight[self.rows] = ((weight[self.rows].float() + one) * factors - one).to(weight.dtype)
            return
        view = _view(self.module)
        matrix = view.to_matrix(weight)
        matrix = torch.cat(
            [
                matrix[: self.rows.start],
                (matrix[self.rows].float() * factors.unsqueeze(1)).to(weight.dtype),
                matrix[self.rows.stop :],
            ]
        )
        weight.copy_(view.to_parameter(matrix))

    @property
    def size(self) -> int:
        """How many channels."""
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A producer, what feeds what, and all that read it.

    Args:
        producer: See there.
        sources: ``(num_channels,)`` number among the producer's rows that feeds each channel.
        followers: Paths and modules of layers that are not quantized and read the same tensor.
    """

    producer: Producer
    sources: Tensor
    followers: tuple[tuple[str, nn.Module], ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """A forward pass of the block on a few samples, in full precision.

    Args:
        run: The forward. It takes layers, and returns the floating tensors that the block returns, and by name the
            inputs of those layers that were heard exactly once.
        modules: Paths and modules of the block.
    """

    run: Callable[[Sequence[BlockLayer]], tuple[Sequence[Tensor], Mapping[str, Tensor]]]
    modules: Mapping[str, nn.Module]


class LinkFinder:
    """Finds the links of a block's groups.

    Args:
        trial: The forward.
        layers: All layers of the block that have a quantizer.
    """

    def __init__(self, trial: Trial, layers: Sequence[BlockLayer]) -> None:
        self._trial = trial
        self._order: list[str] = []
        self._inputs: dict[nn.Module, Tensor] = {}
        with ExitStack() as cleanup:
            for path, module in trial.modules.items():
                kind = layer_kind(module)
                if kind is not None and kind.operation == "linear":
                    cleanup.callback(module.register_forward_pre_hook(self._note).remove)
                hook = module.register_forward_hook(lambda *_, path=path: self._order.append(path))
                cleanup.callback(hook.remove)
            self._reference, self._heard = trial.run(layers)

    def _note(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._inputs.setdefault(module, args[0])

    def find(self, group: Sequence[BlockLayer]) -> Link | None:
        """The producer of the tensor that ``group`` reads, ``None`` where no factor can be moved.

        Args:
            group: All quantized layers that read it.
        """
        leader = group[0]
        before = self._heard.get(leader.name)
        if before is None:
            return None
        for producer in self._candidates(leader, leader.num_channels(before)):
            found = self._try(group, producer, before)
            if found is not None:
                return found
        return None

    def _candidates(self, leader: BlockLayer, channels: int) -> Iterator[Producer]:
        """Modules that finish before the group begins, the nearest first."""
        ours = {path for path, module in self._trial.modules.items() if module in (leader.holder, leader.owner)}
        end = next((k for k, path in enumerate(self._order) if path in ours), len(self._order))
        count = 0
        for path in dict.fromkeys(reversed(self._order[:end])):
            found = list(_row_choices(path, self._trial.modules[path], channels))
            yield from found
            count += bool(found)
            if count >= _MOST_CANDIDATES:
                return

    def _try(self, group: Sequence[BlockLayer], producer: Producer, before: Tensor) -> Link | None:
        generator = torch.Generator().manual_seed(0)
        powers = torch.randint(-_LARGEST_POWER, _LARGEST_POWER + 1, (producer.size,), generator=generator)
        powers = powers.float().to(before.device)
        with _restored(producer.module):
            producer.multiply(powers.exp2())
            after = self._trial.run([group[0]])[1].get(group[0].name)
            seen = None if after is None else _ratios(before, after, group[0].channel_axis)
            if seen is None:
                return None
            sources = _sources(powers, *seen)
            if sources is not None:
                return self._confirmed(group, Link(producer, sources, tuple(self._followers(group))), powers.exp2())
        may_be_centred = producer.module.get_parameter("weight").ndim == 1 and not producer.is_centred
        return self._try(group, replace(producer, is_centred=True), before) if may_be_centred else None

    def _confirmed(self, group: Sequence[BlockLayer], link: Link, factors: Tensor) -> Link | None:
        """``link``, if nobody but the readers that it knows has noticed."""
        followers = [module for _, module in link.followers]
        with _restored(*(layer.owner for layer in group), *followers):
            divide_columns(group, followers, factors[link.sources])
            return link if agree(self._trial.run(())[0], self._reference) else None

    def _followers(self, group: Sequence[BlockLayer]) -> Iterator[tuple[str, nn.Module]]:
        """Layers without a quantizer that read the very tensor that the group reads."""
        read = self._inputs.get(group[0].holder)
        ours = {layer.holder for layer in group}
        for path, module in self._trial.modules.items():
            if read is not None and self._inputs.get(module) is read and module not in ours:
                yield path, module


def _row_choices(path: str, module: nn.Module, channels: int) -> Iterator[Producer]:
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return
    if weight.ndim == 1:
        if weight.shape[0] == channels:
            yield Producer(path, module, slice(0, channels))
        return
    kind = layer_kind(module)
    if kind is None or kind.operation not in ("linear", "conv", "conv_transposed"):
        return
    if kind.operation == "conv_transposed" and getattr(module, "groups", 1) != 1:
        return
    rows = kind.view(weight).matrix_shape[0]
    if rows <= channels and channels % rows == 0:
        yield Producer(path, module, slice(0, rows))
    elif rows > channels:  # the last part of a packed projection
        yield Producer(path, module, slice(rows - channels, rows))
        few, rest = divmod(rows - channels, 2)
        if not rest and few and channels % few == 0 and few != channels:
            yield Producer(path, module, slice(rows - few, rows))


def _ratios(before: Tensor, after: Tensor, axis: int) -> tuple[Tensor, Tensor] | None:
    """What each channel was multiplied by, and which channels say so; ``None`` where it was not just multiplied."""
    if before.shape != after.shape or not before.numel():
        return None
    old, new = (x.detach().movedim(axis, -1).reshape(-1, x.shape[axis]).float() for x in (before, after))
    at = old.abs().argmax(0, keepdim=True)
    largest = old.gather(0, at).squeeze(0)
    live = largest != 0
    if int(live.sum()) * 4 < live.shape[0]:
        return None  # too little was seen to tell
    ratio = torch.where(live, new.gather(0, at).squeeze(0) / torch.where(live, largest, 1.0), 1.0)
    error, size = (new - old * ratio).abs().amax(0), new.abs().amax(0)
    return (ratio, live) if bool((error <= tolerance(before.dtype) * size).all()) else None


def _sources(powers: Tensor, ratio: Tensor, live: Tensor) -> Tensor | None:
    """The map from channels that are read to producer rows under which both agree."""
    seen = ratio.log2()
    channels, rows = seen.shape[0], powers.shape[0]
    index = torch.arange(channels, device=seen.device)
    repeat = channels // rows
    heads = [d for d in range(rows, 0, -1) if rows % d == 0] if repeat > 1 else [rows]
    for width in heads:
        sources = (index // (width * repeat)) * width + index % width
        if bool(((powers[sources] - seen).abs() < 0.05)[live].all()):
            return sources
    return None


def divide_columns(group: Sequence[BlockLayer], followers: Sequence[nn.Module], factors: Tensor) -> None:
    """Divide the columns of all readers' weights by ``(num_channels,)`` factors."""
    for layer in group:
        columns = layer.columns(factors.shape[0])
        matrix = layer.matrix.float()
        layer.write((matrix / (factors if columns is None else factors[columns])).to(layer.parameter.dtype))
    for module in followers:
        weight, view = module.get_parameter("weight"), _view(module)
        with torch.no_grad():
            weight.copy_(view.to_parameter((view.to_matrix(weight).float() / factors).to(weight.dtype)))


def _view(module: nn.Module) -> WeightView:
    kind = layer_kind(module)
    assert kind is not None
    return kind.view(module.get_parameter("weight"))


def agree(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether a block's outputs are what they were, up to rounding in their dtype."""
    return all(
        bool((a.float() - b.float()).abs().max() <= tolerance(b.dtype) * b.float().abs().max()) if b.numel() else True
        for a, b in zip(one, other, strict=True)
    )


def tolerance(dtype: torch.dtype) -> float:
    """Largest error of a channel, relative to its largest value, that rounding in ``dtype`` explains."""
    return 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2


@contextmanager
def _restored(*modules: nn.Module) -> Iterator[None]:
    """The parameters of these modules themselves come back, bit for bit."""
    kept = {p: p.detach().clone() for module in modules for p in module._parameters.values() if p is not None}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept.items():
                parameter.copy_(value)
