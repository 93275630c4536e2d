"""What the class of a module becomes while it is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from octavo.nn.extras import LOW_RANK, StackBranch
from octavo.nn.redirects import TappedCall, redirecting_methods


@dataclass(frozen=True, slots=True)
class Change:
    """Everything that is different about one module.

    Args:
        counterpart: The class that computes in its place, ``None`` where it computes as before.
        is_below: The class keeps its own forward and arrives at the counterpart's by ``super()``.
        calls: Calls in its methods that pass quantizers.
        reads: Parameters that are rounded when they are read, and the children that do it.
    """

    counterpart: type[nn.Module] | None = None
    is_below: bool = False
    calls: tuple[TappedCall, ...] = ()
    reads: tuple[tuple[str, str], ...] = ()


def changed_class(cls: type[nn.Module], change: Change) -> type[nn.Module]:
    """A subclass of ``cls`` with the change, that remembers the class before all changes (``octavo_original``)."""
    calls, reads = tuple(dict.fromkeys(change.calls)), tuple(dict.fromkeys(change.reads))
    if change.counterpart is not None and calls and not change.is_below:  # its forward is around the redirected one
        cls, calls = _changed(cls, (cls,), calls, ()), ()
    return _changed(cls, _bases(cls, change), calls, reads)


def _bases(cls: type[nn.Module], change: Change) -> tuple[type[nn.Module], ...]:
    match change.counterpart:
        case None:
            return (cls,)
        case counterpart if issubclass(counterpart, cls):
            return (counterpart,)
        case counterpart:
            return (cls, counterpart) if change.is_below else (counterpart, cls)


@cache
def _changed(
    cls: type[nn.Module],
    bases: tuple[type[nn.Module], ...],
    calls: tuple[TappedCall, ...],
    reads: tuple[tuple[str, str], ...],
) -> type[nn.Module]:
    body: dict[str, Any] = {
        **redirecting_methods(cls, calls),
        **{name: _rounded(name, child) for name, child in reads},
        "octavo_original": vars(cls).get("octavo_original", cls),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    name = cls.__name__ if bases == (cls,) or cls.__name__.startswith("Quant") else f"Quant{cls.__name__}"
    return type(name, bases, body)


def _rounded(name: str, child: str) -> property:
    """A parameter that is rounded whenever it is read, whoever reads it; a stack has its branches beside it."""

    def read(self: nn.Module) -> Any:
        quantizer, branch = self._modules[child], self._modules.get(f"{name}_{LOW_RANK}")
        assert quantizer is not None
        rounded = quantizer(self._parameters[name])
        return branch.beside(rounded) if isinstance(branch, StackBranch) else rounded

    return property(read)
