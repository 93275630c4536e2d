"""From a running torch function to the call expressions that lead to it, seen from the module that runs."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

from torch import nn

from octavo.nn.expressions import CallPoint, call_point
from octavo.nn.rewrite import is_inside, method_with_code

_INTERFACE = ("module", "query", "key", "value")
"""The first parameters of every function behind transformers' attention interface, eager or fused."""

_CACHE_UPDATE = ("self", "key_states", "value_states")
"""The first parameters of ``update`` of transformers' caches."""

_TORCH_ENTRANCES = frozenset({"torch.overrides", "torch.functional", "torch.nn.functional", "torch._tensor"})
"""Modules of torch whose Python functions stand between a user's call and the function mode."""

_MODULE_CALL = nn.Module._call_impl.__code__
"""Above this frame the caller of the module begins."""
_MODULE_ENTRANCE = nn.Module.__call__.__code__  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Chain:
    """How a method of a module arrives at a call.

    Args:
        points: From the method down; the last one is the call itself.
        interface: Index of the point that calls a function of transformers' attention interface, -1 for none.
        cache: Index of the point that stores into a cache, -1 for none.
    """

    points: tuple[CallPoint, ...]
    interface: int = -1
    cache: int = -1

    def upto(self, index: int) -> Chain:
        """The part that leads to the call at ``index``."""
        return Chain(self.points[: index + 1], self.interface if self.interface <= index else -1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a torch function was called.

    Args:
        chain: Call expressions from the running module's method.
        layer: A module whose own ``forward`` is on the way although it was not called as a module.
        inputs: Query and key of the attention interface's function, where there is one on the way.
    """

    chain: Chain
    layer: nn.Module | None = None
    inputs: tuple[Any, Any] | None = None


def place_of(frame: FrameType | None, owner: nn.Module, method: str = "") -> Place:
    """Where the torch function that a function mode handles right now was called.

    Args:
        frame: The one that called the mode.
        owner: The innermost running module.
        method: The tensor method that was called, empty for a function.
    """
    while frame is not None and frame.f_globals.get("__name__") in _TORCH_ENTRANCES:
        frame = frame.f_back
    points: list[CallPoint] = []
    layer: nn.Module | None = None
    inputs: tuple[Any, Any] | None = None
    interface: CodeType | None = None
    cache: CodeType | None = None
    while frame is not None and frame.f_code is not _MODULE_CALL:
        code = frame.f_code
        point = call_point(frame)
        points.append(replace(point, method=method) if not points else point)
        if is_interface(frame, owner):
            interface, inputs = code, (local(frame, "query"), local(frame, "key"))
        elif is_cache_update(frame):
            cache = code
        first = _first_argument(frame)
        if first is owner and method_with_code(type(owner), code) is not None:
            break
        if isinstance(first, nn.Module) and first is not owner and _is_forward(first, code):
            layer = first
        frame = frame.f_back
    chain = _by_function(points[::-1])
    codes = [point.code for point in chain]
    return Place(Chain(chain, _before(codes, interface), _before(codes, cache)), layer, inputs)


def caller_of(frame: FrameType | None) -> FrameType | None:
    """The frame that calls the module in whose hooks ``frame`` runs."""
    while frame is not None and frame.f_code is not _MODULE_ENTRANCE:
        frame = frame.f_back
    return None if frame is None else frame.f_back


def is_interface(frame: FrameType, owner: nn.Module) -> bool:
    """Whether ``frame`` runs a function of transformers' attention interface for ``owner``."""
    return frame.f_code.co_varnames[:4] == _INTERFACE and local(frame, "module") is owner


def _before(codes: list[CodeType], code: CodeType | None) -> int:
    """Index of the call that leads into ``code``."""
    return codes.index(code) - 1 if code in codes else -1


def is_cache_update(frame: FrameType) -> bool:
    """Whether ``frame`` runs ``update`` of a whole cache of transformers (not of one of its layers)."""
    code = frame.f_code
    if code.co_name != "update" or code.co_varnames[:3] != _CACHE_UPDATE:
        return False
    return any(base.__name__ == "Cache" for base in type(local(frame, "self")).__mro__)


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return local(frame, code.co_varnames[0]) if code.co_argcount else None


def local(frame: FrameType, name: str) -> Any:
    """A local variable of a running function, without keeping its other variables alive until it returns."""
    known = frame.f_locals
    value = known.get(name)
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        known.clear()  # before Python 3.13 a copy that the frame keeps
    return value


def _is_forward(module: nn.Module, code: CodeType) -> bool:
    found = method_with_code(type(module), code)
    return found is not None and found[0] == "forward"


def _by_function(points: list[CallPoint]) -> tuple[CallPoint, ...]:
    """From the outermost call inwards; a call in a function that is defined inside another counts as the outer's."""
    chain: list[CallPoint] = []
    rest = points
    while rest:
        code = rest[0].code
        last = max(k for k, point in enumerate(rest) if k == 0 or is_inside(point.code, code))
        chain.append(CallPoint(code, rest[last].position, rest[last].method))
        rest = rest[last + 1 :]
    return tuple(chain)
