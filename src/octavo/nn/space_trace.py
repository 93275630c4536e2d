"""One forward pass, watched operation by operation, to find the spaces of a model (``spaces``).

Below torch's functions there are few operations, whatever the spelling; each has a rule here, and one without a rule
nails what it touches. Norms are looked at as modules, since each family writes them in its own way: a module with a
scale for each channel is one if, tried on what it gets, turning its input turns its output.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.nn.norms import NormKind, norm_kind
from octavo.nn.space_axes import Axes
from octavo.nn.space_products import Products
from octavo.nn.space_rows import Rows
from octavo.nn.space_tags import SpaceTrace, Tag, tensors_within
from octavo.nn.spaces import Member, Space

__all__ = ["SpaceTrace", "trace_spaces"]


def trace_spaces(model: nn.Module, run: Callable[[], Any]) -> SpaceTrace:
    """Watch ``run``, one forward pass of ``model``; it returns what the model returned."""
    mode = _SpaceMode(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as cleanup:
        for path, module in model.named_modules():
            before = module.register_forward_pre_hook(partial(mode.enter, path), with_kwargs=True, prepend=True)
            after = module.register_forward_hook(partial(mode.leave, path), with_kwargs=True, always_call=True)
            cleanup.callback(before.remove)
            cleanup.callback(after.remove)
        torch.backends.mha.set_fastpath_enabled(False)
        cleanup.callback(torch.backends.mha.set_fastpath_enabled, fast)
        cleanup.enter_context(torch.compiler.set_stance("force_eager"))
        cleanup.enter_context(torch.no_grad())
        cleanup.enter_context(mode)
        run()
    return mode.result


class _SpaceMode(Products, Axes, Rows, TorchDispatchMode):
    """Sees every operation, and every module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._sleeps = 0
        self._pending: list[tuple[str, NormKind, Tensor]] = []
        for key, parameter in model.named_parameters():
            if parameter.is_floating_point():
                self.note(parameter, [self._own_tag(key, axis, size) for axis, size in enumerate(parameter.shape)])

    def _own_tag(self, key: str, axis: int, size: int) -> Tag:
        member = Member(key, axis, 0, size)
        space = Space(size, members={member})
        self.result.spaces.append(space)
        return Tag(space, member)

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module begins."""
        if self._sleeps:
            self._sleeps += 1
            return
        self.running.append(path)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or not x.is_floating_point() or self.tags(x)[-1:] in ([], [None]):
            return
        self._sleeps = 1
        kind = norm_kind(module, x)
        if kind is None:
            self._sleeps = 0
        else:
            self._pending.append((path, kind, x))

    def leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module ends."""
        if self._sleeps > 1:
            self._sleeps -= 1
            return
        if self._sleeps:
            self._sleeps = 0
            path, kind, x = self._pending.pop()
            if isinstance(output, Tensor):
                self._norm(path, kind, x, output)
        elif not path:
            for leaf in tensors_within(output):
                self.nail(leaf, "the model returns it")
        if self.running and self.running[-1] == path:
            self.running.pop()

    def _norm(self, path: str, kind: NormKind, x: Tensor, output: Tensor) -> None:
        before = self.tags(x)
        read, made = before[-1], Space(output.shape[-1])
        assert read is not None
        if path in self.result.norms:
            _, space_in, space_out = self.result.norms[path]
            space_in.join(read.space)
            space_out.join(made)
        self.result.norms[path] = (kind, read.space, made)
        read.space.root.norms_in.add(path)
        made.root.norms_out.add(path)
        self.note(output, [*(self.written(tag) for tag in before[:-1]), Tag(made)])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._sleeps:
            name = func._schema.name.removeprefix("aten::")
            rule = _RULES.get(name.rstrip("_") if func._schema.is_mutable else name) or _attention_rule(name)
            if rule is None:
                self.unknown(name, args, kwargs)
            else:
                rule(self, args, kwargs, out)
        return out


def _attention_rule(name: str) -> Callable[..., None] | None:
    return _SpaceMode.attention if name.startswith("_scaled_dot_product_") else None


_M = _SpaceMode
_RULES: dict[str, Callable[..., None]] = {
    name: rule
    for names, rule in (
        ("_to_copy clone detach alias contiguous neg lift_fresh _conj to", _M.keep),
        ("zeros zeros_like new_zeros empty empty_like new_empty empty_strided new_empty_strided", _M.fresh),
        ("ones_like new_ones full_like new_full zero _assert_async arange sym_size is_same_size", _M.ignore),
        ("add sub", _M.add),
        ("mul", _M.scale),
        ("div", _M.div),
        ("where", _M.where),
        ("masked_fill", _M.masked_fill),
        ("masked_scatter", _M.masked_scatter),
        ("mm bmm", _M.mm),
        ("addmm baddbmm", _M.addmm),
        ("_grouped_mm", _M.grouped_mm),
        ("embedding", _M.embedding),
        ("convolution", _M.convolution),
        ("view _unsafe_view reshape _reshape_alias", _M.view),
        ("permute", _M.permute),
        ("transpose t", _M.transpose),
        ("expand", _M.expand),
        ("repeat", _M.repeat),
        ("unsqueeze", _M.unsqueeze),
        ("squeeze", _M.squeeze),
        ("select", _M.select),
        ("slice", _M.slice),
        ("split split_with_sizes", _M.split),
        ("unbind", _M.unbind),
        ("cat", _M.cat),
        ("stack", _M.stack),
        ("sum mean", _M.reduce),
        ("index", _M.index),
        ("index_select", _M.index_select),
        ("index_add", _M.index_add),
        ("index_put", _M.index_put),
        ("copy", _M.copy),
    )
    for name in names.split()
}
"""aten's operations; those in place are called as those that are not."""
