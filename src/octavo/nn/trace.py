"""One forward pass on a sample, watched: which layers ran, on which tensors, and where tensors meet.

The only place with a function mode. It is closed before this returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from octavo.nn.layers import LayerKind, is_sealed, layer_kind
from octavo.nn.meetings import CallMode, Trace
from octavo.nn.parametrized import weight_of
from octavo.nn.recurrent import is_recurrent, recurrent_macs

__all__ = ["Trace", "trace"]


def trace(model: nn.Module, run: Callable[[], Any]) -> Trace:
    """Watch ``run``, one forward pass of ``model``.

    Returns:
        What was seen. No hook and no mode is left, whatever ``run`` raises.
    """
    result = Trace()
    with ExitStack() as cleanup:
        mode = CallMode(result, model)
        watcher = _Watcher(result, mode)
        for path, module in model.named_modules():
            before = module.register_forward_pre_hook(partial(watcher.enter, path), with_kwargs=True, prepend=True)
            after = module.register_forward_hook(partial(watcher.leave, path), always_call=True, with_kwargs=True)
            cleanup.callback(before.remove)
            cleanup.callback(after.remove)
        cleanup.enter_context(_no_fast_path())
        cleanup.enter_context(torch.compiler.set_stance("force_eager"))  # what was compiled shows what it does
        cleanup.enter_context(torch.no_grad())
        cleanup.enter_context(_evaluating(model))
        cleanup.enter_context(mode)
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

    def __init__(self, result: Trace, mode: CallMode) -> None:
        self.result = result
        self.mode = mode
        self._seen: set[str] = set()

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.mode.enter(path, module, (args, kwargs))
        if path in self._seen:
            return
        self._seen.add(path)
        self.result.order.append(path)
        tensor = _first_tensor(args, kwargs)
        if tensor is not None and layer_kind(module) is not None:
            self.result.reads[path] = self.mode.number(tensor)

    def leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.mode.leave(path, output):
            return
        kind = layer_kind(module)
        if isinstance(module, nn.MultiheadAttention):
            if is_sealed(module) or path in self.result.inherited:
                for part, macs in _multihead_macs(module, args, kwargs).items():
                    self._add(f"{path}.{part}".strip("."), macs)
        elif is_recurrent(module):
            packed = [value.data for value in args if isinstance(value, PackedSequence)]
            x = packed[0] if packed else _first_tensor(args, kwargs)
            for name, macs in recurrent_macs(module, x).items():
                self._add(f"{path}.{name}".strip("."), macs)
        elif kind is not None and is_sealed(module) and isinstance(output, Tensor):
            self._add(path, _layer_macs(module, kind, _first_tensor(args, kwargs), output))
        if not path and output is not None:
            raise _SeenEnough

    def _add(self, path: str, macs: int) -> None:
        if macs:
            self.result.macs[path] = self.result.macs.get(path, 0) + macs


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _layer_macs(module: nn.Module, kind: LayerKind, x: Tensor | None, output: Tensor) -> int:
    weight = weight_of(module)
    if weight is None or x is None or kind.operation in ("embedding", "norm"):
        return 0
    if kind.operation == "conv_transposed":  # every input value meets every weight of its channel
        return x.numel() * (weight.numel() // weight.shape[0])
    return output.numel() * kind.view(weight).matrix_shape[-1]


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
