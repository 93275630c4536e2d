"""One forward pass on a sample, watched: which layers ran, on which tensors, and where attention is computed.

The only place with a function mode. It is closed before this returns.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octavo.nn.layers import LayerKind, layer_kind
from octavo.nn.rewrite import CallPoint, call_point, is_inside, method_with_code

_INTERFACE = ("module", "query", "key", "value")
"""The first parameters of every function behind transformers' attention interface, eager or fused."""

_PRODUCTS = {
    torch.matmul, torch.bmm, torch.mm, torch.baddbmm, torch.einsum,
    Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A call expression that computes attention.

    Args:
        owner: Path of the innermost module that was running.
        chain: Call points from a method of that module down to the call itself; the last one is the call.
        is_interface: The call takes the module before query, key and value, and returns a tuple.
    """

    owner: str
    chain: tuple[CallPoint, ...]
    is_interface: bool


@dataclass(slots=True)
class Trace:
    """What one forward pass showed.

    Args:
        macs: Multiply-adds by module path: of the layer's own product, or of products of two activations.
        reads: Path of a layer -> number of the tensor it read first; equal numbers, equal tensors.
        attention: Attention calls in order of first execution, with their multiply-adds.
        order: Paths of all modules in order of their first call.
        read_outside: Parameters that were computed with while no module that holds them was running.
    """

    macs: dict[str, int] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    attention: dict[AttentionCall, int] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    read_outside: set[str] = field(default_factory=set)


def trace(model: nn.Module, run: Callable[[], Any]) -> Trace:
    """Watch ``run``, one forward pass of ``model``.

    Returns:
        What was seen. No hook and no mode is left, whatever ``run`` raises.
    """
    result = Trace()
    stack: list[tuple[str, nn.Module]] = []
    with ExitStack() as cleanup:
        watcher = _Watcher(result)
        for path, module in model.named_modules():
            before = module.register_forward_pre_hook(
                partial(watcher.enter, stack, path), with_kwargs=True, prepend=True
            )
            after = module.register_forward_hook(
                partial(watcher.leave, stack, path), always_call=True, with_kwargs=True
            )
            cleanup.callback(before.remove)
            cleanup.callback(after.remove)
        cleanup.enter_context(_no_fast_path())
        cleanup.enter_context(torch.no_grad())
        cleanup.enter_context(_evaluating(model))
        cleanup.enter_context(_CallMode(result, stack, model))
        with suppress(_SeenEnough):
            run()
    return result


class _SeenEnough(Exception):
    """The model's own forward has returned once: what else ``run`` would do shows nothing new."""


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """torch's fused transformer layer hides everything inside; it computes the same."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no running statistics; every module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Watcher:
    """Module hooks: who runs, on which tensor, with how many multiply-adds."""

    def __init__(self, result: Trace) -> None:
        self.result = result
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._seen: set[str] = set()
        self._numbers = itertools.count()

    def enter(self, stack: list[tuple[str, nn.Module]], path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append((path, module))
        if path in self._seen:
            return
        self._seen.add(path)
        self.result.order.append(path)
        tensor = _first_tensor(args, kwargs)
        if tensor is not None and layer_kind(module) is not None:
            self.result.reads[path] = self._number(tensor)

    def _number(self, tensor: Tensor) -> int:
        version = -1 if tensor.is_inference() else tensor._version
        known = self._tensors.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != version:
            known = (weakref.ref(tensor), version, next(self._numbers))
            self._tensors[id(tensor)] = known
        return known[2]

    def leave(
        self, stack: list[tuple[str, nn.Module]], path: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        if not stack or stack[-1][0] != path:
            return
        stack.pop()
        kind = layer_kind(module)
        if isinstance(module, nn.MultiheadAttention):
            for part, macs in _multihead_macs(module, args, kwargs).items():
                self._add(f"{path}.{part}".strip("."), macs)
        elif kind is not None and isinstance(output, Tensor):
            self._add(path, _layer_macs(module, kind, _first_tensor(args, kwargs), output))
        if not path and output is not None:
            raise _SeenEnough

    def _add(self, path: str, macs: int) -> None:
        if macs:
            self.result.macs[path] = self.result.macs.get(path, 0) + macs


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _layer_macs(module: nn.Module, kind: LayerKind, x: Tensor | None, output: Tensor) -> int:
    weight = module._parameters.get("weight")
    if weight is None or x is None or kind.operation in ("embedding", "norm"):
        return 0
    if kind.operation == "conv_transposed":  # every input value meets every weight of its channel
        return x.numel() * (weight.numel() // weight.shape[0])
    return output.numel() * kind.view(weight).matrix_shape[1]


def _multihead_macs(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Multiply-adds of the attention itself (under the empty name) and of each projection."""
    query, key = (args[k] if len(args) > k else kwargs[name] for k, name in enumerate(("query", "key")))
    num_queries, num_keys = (t.numel() // t.shape[-1] for t in (query, key))
    batch = 1 if query.dim() == 2 else query.shape[0 if module.batch_first else 1]
    macs = {"": 2 * num_queries * (num_keys // batch) * module.embed_dim}
    for name, parameter in module.named_parameters():
        if name == "in_proj_weight":
            macs["in_proj"] = (num_queries + 2 * num_keys) * parameter.numel() // 3
        elif name.endswith("weight"):
            tokens = num_keys if name.startswith(("k_", "v_")) else num_queries
            macs[name.removesuffix("_weight").removesuffix(".weight")] = tokens * parameter.numel()
    return macs


_MODULE_CALL = nn.Module._call_impl.__code__
"""Above this frame the caller of the module begins."""


def _is_first_argument(owner: nn.Module, frame: Any) -> bool:
    code = frame.f_code
    return bool(code.co_argcount) and frame.f_locals.get(code.co_varnames[0]) is owner


def _by_function(points: list[CallPoint]) -> tuple[CallPoint, ...]:
    """From the outermost call inwards; a call in a function that is defined inside another counts as the outer's."""
    chain: list[CallPoint] = []
    rest = points
    while rest:
        code = rest[0].code
        last = max(k for k, point in enumerate(rest) if k == 0 or is_inside(point.code, code))
        chain.append(CallPoint(code, rest[last].position))
        rest = rest[last + 1 :]
    return tuple(chain)


def _opened(values: Iterable[Any]) -> Iterator[Any]:
    """``values`` with what is inside lists and tuples (``torch.cat``)."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


class _CallMode(TorchFunctionMode):
    """Sees every torch function: attention calls and products of two activations."""

    def __init__(self, result: Trace, stack: list[tuple[str, nn.Module]], model: nn.Module) -> None:
        super().__init__()
        self.result = result
        self.stack = stack
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sealed = any(isinstance(module, nn.MultiheadAttention) for _, module in self.stack)
        if self.stack and not sealed:
            if isinstance(output, Tensor) or (type(output) is tuple and any(isinstance(t, Tensor) for t in output)):
                self._parameters([*_opened(args), *_opened((kwargs or {}).values())])
            if func is F.scaled_dot_product_attention:
                self._attention(sys._getframe(1), args, kwargs or {}, fused=True)
            elif func in _SOFTMAX:
                self._attention(sys._getframe(1), (), {}, fused=False)
            elif func in _PRODUCTS and isinstance(output, Tensor):
                self._product(args, output)
        return output

    def _parameters(self, values: Iterable[Any]) -> None:
        running = {id(module) for _, module in self.stack}
        for parameter in values:
            if isinstance(parameter, nn.Parameter):
                names = self._names.get(id(parameter), [])
                if not any(id(self._modules[name.rpartition(".")[0]]) in running for name in names):
                    self.result.read_outside.update(names)

    def _attention(self, frame: Any, args: Any, kwargs: Any, *, fused: bool) -> None:
        path, owner = self.stack[-1]
        points: list[CallPoint] = []
        is_interface = False
        query, key = (args[k] if len(args) > k else kwargs.get(n) for k, n in enumerate(("query", "key")))
        while frame is not None and frame.f_code is not _MODULE_CALL:
            code = frame.f_code
            points.append(call_point(frame))
            if code.co_varnames[:4] == _INTERFACE and frame.f_locals.get("module") is owner:
                is_interface, points = True, []
                query, key = frame.f_locals["query"], frame.f_locals["key"]
            elif _is_first_argument(owner, frame) and method_with_code(type(owner), code) is not None:
                break
            frame = frame.f_back
        if not (fused or is_interface):
            return
        call = AttentionCall(path, _by_function(points[::-1]), is_interface)
        macs = 2 * query.numel() * key.shape[-2]
        self.result.attention[call] = self.result.attention.get(call, 0) + macs

    def _product(self, args: Any, output: Tensor) -> None:
        path, module = self.stack[-1]
        tensors = [t for t in args if isinstance(t, Tensor)]
        if layer_kind(module) is None and len(tensors) >= 2 and output.dtype.is_floating_point:
            self.result.products[path] = self.result.products.get(path, 0) + output.numel() * tensors[0].shape[-1]
