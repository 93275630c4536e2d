"""Quantizers at call expressions: what a call becomes, and the methods of a class in which such calls are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from octavo.nn.attention import unfused_attention
from octavo.nn.expressions import Position, Redirect
from octavo.nn.extras import InputTransform, StackBranch
from octavo.nn.frames import Chain
from octavo.nn.multihead import functional_multihead
from octavo.nn.products import INSIDE, RESULT, Operand
from octavo.nn.rewrite import OWNER, NoSourceError, Redirected, method_with_code, redirected, replace_inner


@dataclass(frozen=True, slots=True)
class Tap:
    """One quantizer at a call.

    Args:
        child: Its name among the children of the call's owner.
        operand: What passes it.
        axis: Where the operand's channels are, from its end: a quantizer has groups of channels along the last axis.
    """

    child: str
    operand: Operand
    axis: int = -1


@dataclass(frozen=True, slots=True)
class TappedCall:
    """A call expression with its quantizers.

    Args:
        chain: How the owner's method arrives there.
        taps: Quantizers of operands and of the result.
        softmax: Child that rounds the probabilities of a fused attention call, empty for none.
    """

    chain: Chain
    taps: tuple[Tap, ...] = ()
    softmax: str = ""

    @property
    def is_interface(self) -> bool:
        """Whether this is the call of a function of transformers' attention interface."""
        return self.chain.interface == len(self.chain.points) - 1


def _meeting(calls: Sequence[TappedCall]) -> Redirect:
    """A call whose operands and result pass children of ``owner``; one that is not there passes values on."""
    taps = list(dict.fromkeys(tap for call in calls for tap in call.taps))
    inside = {tap.operand.name: tap.child for tap in taps if tap.operand.index == INSIDE}
    if inside:
        return _multihead(inside)
    inputs = [tap for tap in taps if tap.operand != RESULT]
    results = [t.child for t in taps if t.operand == RESULT]
    softmax = next((call.softmax for call in calls if call.softmax), "")

    def meet(owner: nn.Module, callee: Any, *args: Any, **kwargs: Any) -> Any:
        values = list(args)
        unrounded: dict[Operand, Any] = {}
        for tap in inputs:
            module = owner._modules.get(tap.child)
            if module is not None:
                _round_operand(partial(_changed, module, unrounded, tap), values, kwargs, tap.operand)
        probabilities = owner._modules.get(softmax)
        if probabilities is not None:
            output = unfused_attention(probabilities, *values, **kwargs)
        else:
            output = callee(*values, **kwargs)
        for child in results:
            quantizer = owner._modules.get(child)
            if quantizer is not None:
                output = (quantizer(output[0]), *output[1:]) if isinstance(output, tuple) else quantizer(output)
        return output

    return meet


def _multihead(inside: Mapping[str, str]) -> Redirect:
    """``F.multi_head_attention_forward`` with quantizers inside: name of a value there -> child of ``owner``."""

    def attend(owner: nn.Module, callee: Any, *args: Any, **kwargs: Any) -> Any:
        return functional_multihead({name: owner._modules.get(c) for name, c in inside.items()}, *args, **kwargs)

    return attend


def _changed(module: nn.Module, unrounded: dict[Operand, Any], tap: Tap, x: Any) -> Any:
    """An operand through what is done to it, through its quantizer, or with what it was before that beside it."""
    if isinstance(module, StackBranch):
        return module.join(x, unrounded.get(tap.operand, x))
    if isinstance(module, InputTransform):
        return module(x)
    unrounded[tap.operand] = x
    return module(x) if tap.axis == -1 else module(x.movedim(tap.axis, -1)).movedim(-1, tap.axis)


def _round_operand(
    quantizer: Callable[[Any], Any], values: list[Any], kwargs: dict[str, Any], operand: Operand
) -> None:
    if operand.index >= len(values):
        if operand.name in kwargs:
            kwargs[operand.name] = quantizer(kwargs[operand.name])
    elif operand.item < 0:
        values[operand.index] = quantizer(values[operand.index])
    else:
        parts = list(values[operand.index])
        parts[operand.item] = quantizer(parts[operand.item])
        values[operand.index] = parts


def _enter(inner: Sequence[Redirected], around: Redirect | None, otherwise: Redirect | None) -> Redirect:
    """A call of a function whose code is among ``inner``, redirected inside.

    Args:
        inner: Functions that the call may lead to.
        around: What else happens to such a call.
        otherwise: What happens to a call of anything else.
    """
    clones: dict[FunctionType, FunctionType] = {}

    def enter(owner: nn.Module, callee: Any, *args: Any, **kwargs: Any) -> Any:
        function, first, named = _plain(callee)
        code = getattr(function, "__code__", None)
        for within in inner:  # no dict of codes: torch.compile cannot look into one
            if code is within.code:
                if function not in clones:
                    clones[function] = within.made_from(function)
                clone = clones[function]
                named = {**named, OWNER: owner}
                if around is None:
                    return clone(*first, *args, **{**named, **kwargs})
                return around(owner, partial(clone, *first, **named), *args, **kwargs)
        return callee(*args, **kwargs) if otherwise is None else otherwise(owner, callee, *args, **kwargs)

    return enter


def _plain(callee: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The function that ``callee`` calls, and the arguments that it puts first: of methods, partials, objects."""
    if isinstance(callee, partial):
        function, first, named = _plain(callee.func)
        return function, (*first, *callee.args), {**named, **callee.keywords}
    if isinstance(callee, MethodType):
        return callee.__func__, (callee.__self__,), {}
    call = type(callee).__call__
    return (callee, (), {}) if not isinstance(call, FunctionType) else (call, (callee,), {})


def _redirects(cls: type, calls: Sequence[TappedCall], depth: int) -> dict[Position, tuple[str, Redirect]]:
    """Redirects for the functions at ``depth`` of the calls' chains, which all share that function."""
    points: dict[Position, list[TappedCall]] = {}
    for call in calls:
        points.setdefault(call.chain.points[depth].position, []).append(call)
    return {position: (_method(below, depth), _redirect_at(cls, below, depth)) for position, below in points.items()}


def _method(calls: Sequence[TappedCall], depth: int) -> str:
    return next((call.chain.points[depth].method for call in calls if call.chain.points[depth].method), "")


def _redirect_at(cls: type, calls: Sequence[TappedCall], depth: int) -> Redirect:
    """One call expression, through which all of ``calls`` go: it is one of them, or leads to them."""
    here = [call for call in calls if len(call.chain.points) == depth + 1]
    deeper: dict[CodeType, list[TappedCall]] = {}
    for call in calls:
        if len(call.chain.points) > depth + 1:
            deeper.setdefault(call.chain.points[depth + 1].code, []).append(call)
    meet = _meeting(here) if here else None
    if meet is not None and not deeper:
        return meet
    inner = [
        redirected(code, _redirects(cls, group, depth + 1), takes_owner=True, cls=cls) for code, group in deeper.items()
    ]
    wraps = any(call.is_interface or call.chain.cache == depth for call in here)
    return _enter(inner, meet if wraps else None, meet)


@cache
def redirecting_methods(cls: type[nn.Module], calls: tuple[TappedCall, ...]) -> Mapping[str, Any]:
    """Methods of ``cls`` whose calls pass the quantizers.

    Raises:
        NoSourceError: a function on the way to a call cannot be compiled again.
    """
    by_code: dict[CodeType, list[TappedCall]] = {}
    for call in calls:
        by_code.setdefault(call.chain.points[0].code, []).append(call)
    methods: dict[str, Any] = {}
    for code, group in by_code.items():
        found = method_with_code(cls, code)
        if found is None:
            raise NoSourceError(f"{code.co_name} is not a method of {cls.__name__}")
        name, inner = found
        new = redirected(code, _redirects(cls, group, 0), takes_owner=False, cls=cls).made_from(inner)
        outer = methods.get(name) or next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
        methods[name] = replace_inner(outer, inner, new)
    return methods
