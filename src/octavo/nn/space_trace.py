"""One forward pass, watched operation by operation, to find the spaces of a model (``spaces``).

Below torch's functions there are few operations, whatever the spelling; each has a rule here, and one without a rule
nails what it touches. Norms are looked at as modules, since each family writes them in its own way: a module with a
scale for each channel is one if, tried on what it gets, turning its input turns its output.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.nn.norms import NormKind, norm_kind
from octavo.nn.spaces import Member, Space


@dataclass(frozen=True, slots=True)
class Tag:
    """The space of an axis, and the parameter's axis that it is, where the tensor is a parameter or a view of one."""

    space: Space
    member: Member | None = None


Tags = list[Tag | None]
READS, WRITES = "reads", "writes"


@dataclass(slots=True)
class SpaceTrace:
    """What was seen.

    Args:
        spaces: Every space of a parameter; several of them may have one root.
        roles: Parameter's axis -> whether it was summed over, or made channels, and in which module.
        norms: Path of a norm -> what it is, and the space of its input and of its output.
    """

    spaces: list[Space] = field(default_factory=list)
    roles: dict[Member, set[tuple[str, str]]] = field(default_factory=dict)
    norms: dict[str, tuple[NormKind, Space, Space]] = field(default_factory=dict)

    def roles_of(self, member: Member) -> set[tuple[str, str]]:
        """What is done with a run of an axis, by itself or with more of it: ``(role, module)``."""
        return {
            role
            for known, roles in self.roles.items()
            if (known.key, known.axis) == (member.key, member.axis)
            and known.start < member.stop
            and member.start < known.stop
            for role in roles
        }


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


class _SpaceMode(TorchDispatchMode):
    """Follows tensors. They are known by identity, and held weakly."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.result = SpaceTrace()
        self._known: dict[int, tuple[weakref.ref[Tensor], Tags]] = {}
        self._sleeps = 0
        self._stack: list[str] = []
        self._pending: list[tuple[str, NormKind, Tensor]] = []
        for key, parameter in model.named_parameters():
            if parameter.is_floating_point():
                self._note(parameter, [self._own_tag(key, axis, size) for axis, size in enumerate(parameter.shape)])

    def _own_tag(self, key: str, axis: int, size: int) -> Tag:
        member = Member(key, axis, 0, size)
        space = Space(size, members={member})
        self.result.spaces.append(space)
        return Tag(space, member)

    # Modules

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module begins."""
        if self._sleeps:
            self._sleeps += 1
            return
        self._stack.append(path)
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
            for leaf in _tensors(output):
                self.nail(leaf, "the model returns it")
        if self._stack and self._stack[-1] == path:
            self._stack.pop()

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
        self._note(output, [*(self._written(tag) for tag in before[:-1]), Tag(made)])

    # What is known of tensors

    def _note(self, tensor: Tensor, tags: Tags) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), tags)

    def tags(self, tensor: Tensor) -> Tags:
        """One for each axis."""
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor or len(known[1]) != tensor.ndim:
            return [None] * tensor.ndim
        return list(known[1])

    def nail(self, tensor: Tensor, reason: str) -> None:
        """No axis of ``tensor`` can be turned."""
        for tag in self.tags(tensor):
            if tag is not None:
                tag.space.nail(reason)

    def _nail(self, tag: Tag | None, reason: str) -> None:
        if tag is not None:
            tag.space.nail(reason)

    def _role(self, tag: Tag | None, role: str) -> None:
        if tag is not None and tag.member is not None:
            self.result.roles.setdefault(tag.member, set()).add((role, self._place))

    @property
    def _place(self) -> str:
        return self._stack[-1] if self._stack else ""

    def _here(self) -> str:
        return f" in '{self._place}'" if self._place else ""

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._sleeps:
            name = func._schema.name.removeprefix("aten::")
            rule = _RULES.get(name.rstrip("_") if func._schema.is_mutable else name) or _attention_rule(name)
            if rule is None:
                self._unknown(name, args, kwargs)
            else:
                rule(self, args, kwargs, out)
        return out

    def _unknown(self, name: str, args: Any, kwargs: Any) -> None:
        for tensor in _tensors((args, kwargs)):
            self.nail(tensor, f"'{name.rstrip('_')}'{self._here()} looks at single channels of it")

    def keep(self, args: Any, kwargs: Any, out: Any) -> None:
        """The same axes: casts, copies, a factor for all."""
        if isinstance(out, Tensor) and out is not args[0]:
            self._note(out, self.tags(args[0]))

    def fresh(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Zeros, or memory that is written to later: whatever it meets."""
        self._note(out, [Tag(Space(size)) for size in out.shape])

    def ignore(self, args: Any, kwargs: Any, out: Any) -> None:
        """Values are not looked at."""

    def add(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A sum, with broadcasting."""
        self._sum(args[0], args[1], out)

    def _sum(self, a: Any, b: Any, out: Tensor) -> None:
        both = [value if isinstance(value, Tensor) else None for value in (a, b)]
        tags: Tags = []
        for back in range(out.ndim, 0, -1):
            one, two = (self._tag_from_end(value, back, out.shape[-back]) for value in both)
            if one is None or two is None:
                what = "something that is no part of it is added to it" + self._here()
                self._nail(one or two, what)
                known = one or two
                if known is not None and known.member is None and back == 1:
                    known.space.root.is_sum |= all(value is not None and value.ndim == out.ndim for value in both)
                tags.append(None)
                continue
            space = one.space.join(two.space)
            space.is_sum |= one.member is None and two.member is None and back == 1
            self._role(one, WRITES)
            self._role(two, WRITES)
            tags.append(Tag(space))
        self._note(out, tags)

    def _tag_from_end(self, value: Tensor | None, back: int, size: int) -> Tag | None:
        if value is None or value.ndim < back or value.shape[-back] != size:
            return None
        return self.tags(value)[-back]

    def scale(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A product or quotient, element by element, with broadcasting."""
        a, b = args[0], args[1]
        tags: Tags = []
        for back in range(out.ndim, 0, -1):
            found = []
            for value, other in ((a, b), (b, a)):
                tag = self._tag_from_end(value if isinstance(value, Tensor) else None, back, out.shape[-back])
                varies = isinstance(other, Tensor) and other.ndim >= back and other.shape[-back] > 1
                if tag is not None and varies:
                    tag.space.nail(f"it is multiplied channel by channel{self._here()}")
                if tag is not None:
                    found.append(tag)
            tags.append(found[0] if found and out.shape[-back] > 1 else None)
        self._note(out, tags)

    def div(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A quotient: what divides cannot be turned."""
        if isinstance(args[1], Tensor) and args[1].numel() > 1:
            divisor = [tag for tag in self.tags(args[1]) if tag is not None]
            for tag in divisor:
                tag.space.nail(f"something is divided by it{self._here()}")
        if kwargs.get("rounding_mode") is not None:
            self._unknown("div", args, kwargs)
        self.scale(args, kwargs, out)

    def where(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A choice that is the same for all channels."""
        self._masked(args[0], args[1:3])
        self._sum(args[1], args[2], out)

    def masked_fill(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Zeros for all channels of some rows; other values only where nobody looks."""
        self._masked(args[1], args[:1])
        if isinstance(args[2], Tensor) or args[2] != 0:
            self.nail(args[0], f"values are put into it{self._here()}")
        self.keep(args, kwargs, out)

    def masked_scatter(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows of another tensor in the place of some rows."""
        self._masked(args[1], (args[0], args[2]))
        one, two = self.tags(args[0])[-1], self.tags(args[2])[-1]
        tags = self.tags(args[0])
        if one is None or two is None or args[0].shape[-1] != args[2].shape[-1]:
            self._nail(one or two, f"something that is no part of it is put into it{self._here()}")
        else:
            tags[-1] = Tag(one.space.join(two.space))
        self._note(out, tags)

    def _masked(self, mask: Tensor, values: Sequence[Any]) -> None:
        """Nail the last axis of ``values`` where a mask differs from channel to channel."""
        varies = mask.ndim and mask.shape[-1] > 1 and mask.stride(-1) != 0
        if varies and mask.ndim and not bool((mask == mask[..., :1]).all()):
            for value in values:
                if isinstance(value, Tensor) and value.ndim:
                    self._nail(self.tags(value)[-1], f"it is masked channel by channel{self._here()}")

    def mm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """``(m, k) x (k, n)``, and stacks of it."""
        a, b = self.tags(args[0]), self.tags(args[1])
        self._note(out, self._product(a, b))

    def addmm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A product, and something added to it."""
        self._note(out, self._product(self.tags(args[1]), self.tags(args[2])))
        self._sum(args[0], out, out)

    def _product(self, a: Tags, b: Tags) -> Tags:
        self._contract(a[-1], b[-2])
        stack: Tags = [None] * (len(a) - 2)
        for tag in (*a[:-2], *b[:-2]):
            self._nail(tag, f"it numbers the products{self._here()}")
        is_mixed = all(tag is None or tag.member is None for tag in (*a, *b))
        if is_mixed and b[-1] is not None:
            b[-1].space.root.is_mixed = True
        return [*stack, self._written(a[-2]), self._written(b[-1])]

    def _written(self, tag: Tag | None) -> Tag | None:
        self._role(tag, WRITES)
        return None if tag is None else Tag(tag.space)

    def _contract(self, one: Tag | None, two: Tag | None) -> None:
        if one is None or two is None:
            self._nail(one or two, f"a product sums over it and something else{self._here()}")
            return
        one.space.join(two.space)
        self._role(one, READS)
        self._role(two, READS)

    def embedding(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows of a table."""
        first, second = self.tags(args[0])
        self._nail(first, "an index chooses from it")
        self._note(out, [*([None] * args[1].ndim), self._written(second)])

    def grouped_mm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows of the first by one of a stack of matrices each."""
        a, b = self.tags(args[0]), self.tags(args[1])
        if len(a) == 2:
            self._nail(b[0], f"it numbers the products{self._here()}")
            b = b[1:]
        self._note(out, self._product(a, b))

    def convolution(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A product over channels and places."""
        x, weight, bias, is_transposed, groups = self.tags(args[0]), self.tags(args[1]), args[2], args[6], args[8]
        first, second = (1, 0) if is_transposed else (0, 1)
        for tag in (*x[2:], *weight[2:]):
            self._nail(tag, f"a convolution runs along it{self._here()}")
        if groups != 1:
            for tag in (x[1], *weight[:2]):
                self._nail(tag, f"a convolution in groups{self._here()}")
        self._contract(x[1], weight[second])
        made = self._written(weight[first])
        if bias is not None and made is not None:
            (tag,) = self.tags(bias)
            self._role(tag, WRITES)
            made = Tag(made.space.join(tag.space)) if tag is not None else made
            if tag is None:
                made.space.nail("its bias is no parameter")
        self._note(out, [self._written(x[0]), made, *([None] * (out.ndim - 2))])

    def attention(self, args: Any, kwargs: Any, out: Any) -> None:
        """A fused attention: queries meet keys, probabilities meet values."""
        q, k, v = (self.tags(tensor) for tensor in args[:3])
        self._contract(q[-1], k[-1])
        for tag in (*q[:-1], *k[:-1], *v[:-1]):
            self._nail(tag, f"it numbers the products{self._here()}")
        if v[-1] is not None:
            v[-1].space.root.is_mixed = True
        self._note(out[0], [*([None] * (out[0].ndim - 1)), self._written(v[-1])])

    # Axes

    def view(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Other axes in the same order."""
        self._note(out, self._regrouped(self.tags(args[0]), tuple(args[0].shape), tuple(out.shape)))

    def _regrouped(self, tags: Tags, before: tuple[int, ...], after: tuple[int, ...]) -> Tags:
        found: Tags = [None] * len(after)
        if not math.prod(before):
            return found
        for ins, outs in _groups(before, after):
            last_in, last_out = (
                next((k for k in reversed(ins) if before[k] > 1), None),
                next((k for k in reversed(outs) if after[k] > 1), None),
            )
            for k in ins:
                if k != last_in:
                    self._nail(tags[k] if before[k] > 1 else None, f"it is laid out along another axis{self._here()}")
            tag = None if last_in is None else tags[last_in]
            if tag is None or last_in is None or last_out is None:
                continue
            one, two = before[last_in], after[last_out]
            if one % two and two % one:
                tag.space.nail(f"it is laid out anew{self._here()}")
                continue
            tag.space.cut(min(one, two)) if one != two else None
            found[last_out] = tag
        return found

    def permute(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Axes in another order."""
        tags = self.tags(args[0])
        self._note(out, [tags[axis] for axis in args[1]])

    def transpose(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Two axes exchanged."""
        tags = self.tags(args[0])
        one, two = (args[1], args[2]) if len(args) > 2 else (0, len(tags) - 1)
        if len(tags) > 1:
            tags[one], tags[two] = tags[two], tags[one]
        self._note(out, tags)

    def expand(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Axes of one repeated."""
        tags = self.tags(args[0])
        padded: Tags = [*([None] * (out.ndim - len(tags))), *tags]
        sizes = (1,) * (out.ndim - len(tags)) + tuple(args[0].shape)
        self._note(out, [t if size == now else None for t, size, now in zip(padded, sizes, out.shape, strict=True)])

    def repeat(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Copies behind each other."""
        tags, times = self.tags(args[0]), list(args[1])
        tags = [*([None] * (out.ndim - len(tags))), *tags]
        for tag, count in zip(tags, times, strict=True):
            if count != 1:
                self._nail(tag, f"it is laid out anew{self._here()}")
        self._note(out, [tag if count == 1 else None for tag, count in zip(tags, times, strict=True)])

    def unsqueeze(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """An axis of one more."""
        tags = self.tags(args[0])
        axis = args[1] if args[1] >= 0 else args[1] + out.ndim
        self._note(out, [*tags[:axis], None, *tags[axis:]])

    def squeeze(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Axes of one less."""
        self.view(args, kwargs, out)

    def select(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """One index of an axis."""
        tags = self.tags(args[0])
        axis = args[1] % len(tags)
        self._nail(tags[axis], f"an index chooses from it{self._here()}")
        self._note(out, [tag for k, tag in enumerate(tags) if k != axis])

    def slice(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A run of an axis."""
        axis = (args[1] if len(args) > 1 else 0) % args[0].ndim
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        step = args[4] if len(args) > 4 else 1
        size = args[0].shape[axis]
        self._run(args[0], out, axis, max(0, start + size if start < 0 else start), step)

    def _run(self, tensor: Tensor, out: Tensor, axis: int, start: int, step: int = 1) -> None:
        tags = self.tags(tensor)
        tag = tags[axis]
        if tag is not None and out.shape[axis] != tensor.shape[axis]:
            if step != 1 or tensor.shape[axis] != tag.space.root.block:
                tag.space.nail(f"a part of it is used by itself{self._here()}")
                tags[axis] = None
            else:
                stop, own = start + out.shape[axis], tag.member
                member = own and Member(own.key, own.axis, own.start + start, own.start + stop)
                tags[axis] = Tag(tag.space.root.part(start, stop), member)
        self._note(out, tags)

    def split(self, args: Any, kwargs: Any, out: Any) -> None:
        """All of an axis, in runs."""
        axis = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].ndim
        start = 0
        for part in out:
            self._run(args[0], part, axis, start)
            start += part.shape[axis]

    def unbind(self, args: Any, kwargs: Any, out: Any) -> None:
        """All of an axis, one by one."""
        axis = args[1] if len(args) > 1 else 0
        for part in out:
            self.select((args[0], axis), {}, part)

    def cat(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Tensors behind each other."""
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
        full = [tensor for tensor in args[0] if tensor.ndim == out.ndim]
        self._joined([self.tags(tensor) for tensor in full], out, axis)

    def stack(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Tensors along a new axis."""
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
        tags = [self.tags(tensor) for tensor in args[0]]
        self._joined([[*own[:axis], None, *own[axis:]] for own in tags], out, axis)

    def _joined(self, tags: list[Tags], out: Tensor, axis: int) -> None:
        found: Tags = []
        for k in range(out.ndim):
            here = [own[k] for own in tags]
            known = [tag for tag in here if tag is not None]
            if k == axis or len(known) < len(here):
                for tag in known:
                    tag.space.nail(f"it is put beside something else{self._here()}")
                found.append(None)
                continue
            for tag in known:
                self._role(tag, WRITES)
                tag.space.join(known[0].space)
            found.append(Tag(known[0].space))
        self._note(out, found)

    def reduce(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A sum or mean over axes."""
        tags = self.tags(args[0])
        given = args[1] if len(args) > 1 else kwargs.get("dim")
        axes = range(len(tags)) if given in (None, []) else [axis % len(tags) for axis in given]
        for axis in axes:
            self._nail(tags[axis], f"it is summed up{self._here()}")
        keeps = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        rest = [None if k in axes else tag for k, tag in enumerate(tags) if keeps or k not in axes]
        self._note(out, rest)

    def index(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows chosen by tensors of indices."""
        tags, rest = self._behind(args[0], args[1])
        self._note(out, [*([None] * (out.ndim - rest)), *tags[len(tags) - rest :]])

    def _behind(self, tensor: Tensor, indices: Sequence[Tensor | None]) -> tuple[Tags, int]:
        """Tags, and how many axes lie behind the last that is indexed; the others are nailed."""
        tags, used = self.tags(tensor), 0
        for entry in indices:
            used += entry.ndim if entry is not None and entry.dtype in (torch.bool, torch.uint8) else 1
        for tag in tags[:used]:
            self._nail(tag, f"an index chooses from it{self._here()}")
        return tags, len(tags) - used

    def index_select(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows chosen by indices."""
        tags = self.tags(args[0])
        axis = args[1] % len(tags)
        self._nail(tags[axis], f"an index chooses from it{self._here()}")
        self._note(out, [None if k == axis else tag for k, tag in enumerate(tags)])

    def index_add(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows added to chosen rows."""
        self._into(args[0], args[3], out, args[1] % args[0].ndim)

    def index_put(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows put in the place of chosen rows."""
        tags, rest = self._behind(args[0], args[1])
        value = self.tags(args[2])
        for back in range(1, rest + 1):
            one, two = tags[-back], value[-back] if len(value) >= back else None
            if one is not None and two is not None and args[0].shape[-back] == args[2].shape[-back]:
                tags[-back] = Tag(one.space.join(two.space))
            else:
                self._nail(one or two, f"something that is no part of it is put into it{self._here()}")
                tags[-back] = None
        self._note(out, [None if k < len(tags) - rest else tag for k, tag in enumerate(tags)])

    def copy(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Values written over others."""
        self._into(args[0], args[1], out, -1)

    def _into(self, target: Tensor, value: Tensor, out: Tensor, axis: int) -> None:
        """Joins all axes but one, which counts rows."""
        tags, other = self.tags(target), self.tags(value)
        for back in range(1, len(tags) + 1):
            k = len(tags) - back
            one, two = tags[k], other[-back] if len(other) >= back else None
            if k == axis:
                self._nail(one, f"an index chooses from it{self._here()}")
                self._nail(two, f"an index chooses from it{self._here()}")
            elif one is not None and two is not None and target.shape[k] == value.shape[-back]:
                tags[k] = Tag(one.space.join(two.space))
            else:
                self._nail(one or two, f"something that is no part of it is put into it{self._here()}")
                tags[k] = None
        self._note(out, tags)


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


def _tensors(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case Mapping():
            for item in value.values():
                yield from _tensors(item)
        case list() | tuple():
            for item in value:
                yield from _tensors(item)


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest groups of axes of both shapes that hold the same number of values, which is not 0.

    >>> list(_groups((2, 12), (2, 3, 4)))
    [([0], [0]), ([1], [1, 2])]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        first, second, ins, outs = i, j, 1, 1
        while True:
            if i < len(before) and (ins < outs or i == first):
                ins, i = ins * before[i], i + 1
            elif j < len(after):
                outs, j = outs * after[j], j + 1
            if ins == outs and (j > second or j == len(after)):
                break
        yield list(range(first, i)), list(range(second, j))
