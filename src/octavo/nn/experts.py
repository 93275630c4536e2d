"""Experts while calibrating: how many tokens each of them sees, and what becomes of those that see few.

Experts are one module that holds stacks of weights and is told which tokens go where, or a list of modules each of
which is called with its tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.layers import layer_kind
from octavo.nn.quantizer import ActivationQuantizer
from octavo.spec.experts import ExpertsPolicy, RarePolicy

_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """Experts of one layer.

    Args:
        path: Of the module that holds the stacks, or of the list.
        count: How many experts there are.
        is_list: Whether each is a module of its own.
    """

    path: str
    count: int
    is_list: bool


def find_experts(model: nn.Module) -> tuple[ExpertLayer, ...]:
    """Every layer of experts, in the order of the module tree."""
    found = []
    for path, module in model.named_modules():
        members = list(module.children())
        if "expert" not in f"{path.rpartition('.')[2]} {type(module).__name__}".lower():
            continue
        if isinstance(module, nn.ModuleList):
            if len(members) > 1 and len({type(member) for member in members}) == 1:
                found.append(ExpertLayer(path, len(members), is_list=True))
        elif layer_kind(module) is None:
            stacks = {p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3}
            if len(stacks) == 1 and min(stacks) > 1:
                found.append(ExpertLayer(path, stacks.pop(), is_list=False))
    return tuple(found)


class ExpertWatch:
    """Counts tokens per expert while open; the policy decides whether all experts see all tokens, and what follows.

    Args:
        model: The model, prepared.
        policy: What becomes of experts that see few tokens.
    """

    def __init__(self, model: nn.Module, policy: ExpertsPolicy) -> None:
        self.model = model
        self.policy = policy
        self.layers = find_experts(model)
        self.tokens: dict[str, list[int]] = {}
        self._busy = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count in every forward pass meanwhile."""
        with ExitStack() as hooks:
            for layer in self.layers:
                module = self.model.get_submodule(layer.path)
                targets = list(module.children()) if layer.is_list else [module]
                for number, target in enumerate(targets):
                    hook = _Counter(self, layer, number)
                    hooks.callback(target.register_forward_pre_hook(hook.count, with_kwargs=True).remove)
                if self.policy.rare is RarePolicy.ALL_TOKENS:
                    parent = self.model.get_submodule(layer.path.rpartition(".")[0]) if layer.is_list else module
                    wide = _Wide(self, layer, targets)
                    hooks.callback(parent.register_forward_hook(wide.run, with_kwargs=True).remove)
            yield

    def settle(self) -> None:
        """Act on what was counted, before ranges are made of what quantizers saw.

        Raises:
            UserError: the policy is ``error`` and an expert saw too few tokens.
        """
        rare = {path: self._rare(counts) for path, counts in self.tokens.items()}
        if self.policy.rare is RarePolicy.ERROR:
            named = [f"{path} expert {k} ({self.tokens[path][k]})" for path, few in rare.items() for k in few]
            if named:
                more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
                raise UserError(
                    f"{len(named)} experts saw fewer than {self.policy.tokens} tokens of the calibration data: "
                    f"{', '.join(named[:_MOST_NAMED])}{more}; give more data, lower expert_tokens in the recipe's "
                    "calibration, or choose experts: all-tokens or share"
                )
        if self.policy.rare is RarePolicy.SHARE:
            for layer in self.layers:
                if layer.is_list and rare.get(layer.path):
                    _share_ranges(list(self.model.get_submodule(layer.path).children()), rare[layer.path])

    def _rare(self, counts: Sequence[int]) -> list[int]:
        return [k for k, count in enumerate(counts) if count < self.policy.tokens]


class _Counter:
    """A hook that counts the tokens of one layer's experts, or of one expert in a list."""

    def __init__(self, watch: ExpertWatch, layer: ExpertLayer, number: int) -> None:
        self.watch, self.layer, self.number = watch, layer, number

    def count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.watch._busy:
            return
        counts = self.watch.tokens.setdefault(self.layer.path, [0] * self.layer.count)
        if self.layer.is_list:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            counts[self.number] += x.numel() // x.shape[-1] if x is not None and x.numel() else 0
            return
        chosen = _indices((*args, *kwargs.values()))
        if chosen is not None:
            seen = torch.bincount(chosen.detach().flatten().cpu(), minlength=self.layer.count)[: self.layer.count]
            self.watch.tokens[self.layer.path] = [a + b for a, b in zip(counts, seen.tolist(), strict=True)]
        else:  # every expert is given rows of its own
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            rows = x.numel() // x.shape[-1] // self.layer.count
            self.watch.tokens[self.layer.path] = [count + rows for count in counts]


def _indices(values: tuple[Any, ...]) -> Tensor | None:
    """Which experts each token goes to: the integers among the arguments."""
    return next((v for v in values if isinstance(v, Tensor) and v.dtype in (torch.int32, torch.int64)), None)


class _Wide:
    """A hook that sends every token through every expert once more; only quantizers notice."""

    def __init__(self, watch: ExpertWatch, layer: ExpertLayer, experts: list[nn.Module]) -> None:
        self.watch, self.layer, self.experts = watch, layer, experts

    @torch.no_grad()
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.watch._busy:
            return
        self.watch._busy = True
        try:
            if self.layer.is_list:
                x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
                for expert in self.experts:
                    expert(x.reshape(-1, x.shape[-1]))
            elif (chosen := _indices((*args, *kwargs.values()))) is not None:
                wide = [self._widened(value, chosen) for value in args]
                module.forward(*wide, **{name: self._widened(value, chosen) for name, value in kwargs.items()})
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the experts of '{self.layer.path}' cannot compute every token ({error}); "
                "choose experts: share or error in the recipe's calibration"
            ) from error
        finally:
            self.watch._busy = False

    def _widened(self, value: Any, chosen: Tensor) -> Any:
        """Choices and their weights for every expert, in place of a few."""
        if value is chosen:
            return torch.arange(self.layer.count, device=value.device, dtype=value.dtype).expand(len(value), -1)
        if isinstance(value, Tensor) and value.shape == chosen.shape:
            return value.new_full((len(value), self.layer.count), 1 / self.layer.count)
        return value


def _share_ranges(experts: Sequence[nn.Module], rare: Sequence[int]) -> None:
    """Input quantizers of rare experts see what all of their siblings have seen together."""
    quantizers = [
        {path: m for path, m in expert.named_modules() if isinstance(m, ActivationQuantizer) and m.observer}
        for expert in experts
    ]
    for path in quantizers[0]:
        siblings = [of[path].observer for of in quantizers if path in of]
        together = None
        for observer in siblings:
            if observer is None or observer.count == 0:
                continue
            if together is None:
                together = copy.deepcopy(observer)
            elif observer is not together:
                together.merge(observer)
        for k in rare:
            if together is not None and path in quantizers[k]:
                quantizers[k][path].observer = copy.deepcopy(together)
