"""Modules of a user's own that compute attention in every way that code is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

Batch = Any


class Attends(nn.Module):
    """Projects, splits heads, and leaves the attention to the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 6)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))


class Directly(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class WithKeywords(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(value=v, key=k, query=q, is_causal=True, scale=0.3))


class WithUnpackedArguments(Attends):
    def forward(self, x: Tensor) -> Tensor:
        options = {"is_causal": True, "dropout_p": 0.0}
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), **options))


class FromImportedName(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(scaled_dot_product_attention(q, k, v))


class RenamedImport(Attends):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(sdpa(*self.heads(x)))


class ImportedInside(Attends):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.functional import scaled_dot_product_attention as attend

        return self.merge(attend(*self.heads(x)))


def helper(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def outer_helper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return helper(q, k, v, causal=True)


class ThroughHelpers(Attends):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(outer_helper(*self.heads(x)))


class ThroughMethod(Attends):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.attend(*self.heads(x)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class ThroughInheritedMethod(ThroughMethod):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * super().attend(q, k, v)


class ThroughStaticMethod(Attends):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.attend(*self.heads(x)))

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class ThroughClosure(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)

        def attend(causal: bool) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return self.merge(attend(True))


class ThroughLambda(Attends):
    def forward(self, x: Tensor) -> Tensor:
        attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
        return self.merge(attend(*self.heads(x)))


class ThroughPartial(Attends):
    def forward(self, x: Tensor) -> Tensor:
        attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
        return self.merge(attend(*self.heads(x)))


class ThroughTable(Attends):
    KINDS: dict[str, Callable[..., Tensor]] = {"fused": F.scaled_dot_product_attention}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        attend = self.KINDS["fused"]
        return self.merge(attend(*self.heads(x)))


class Twice(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        first = F.scaled_dot_product_attention(q, k, v)
        return self.merge(first + F.scaled_dot_product_attention(q, k, first, is_causal=True))


class TwiceInOneExpression(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q, F.scaled_dot_product_attention(q, k, v), v))


class TwiceThroughOneHelper(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(helper(q, k, v) + helper(q, v, k, causal=True))


class InLoop(Attends):
    """One call expression, two calls: they share their quantizers."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        for _ in range(2):
            v = F.scaled_dot_product_attention(q, k, v)
        return self.merge(v)


class InComprehension(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(sum(F.scaled_dot_product_attention(part, k, v) for part in (q, 2 * q)))


def logged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return wrapper


class PrivateNames(Attends):
    def forward(self, x: Tensor) -> Tensor:
        return self.__attend(*self.heads(x))

    def __attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        __causal = True
        return self.__merge(F.scaled_dot_product_attention(q, k, v, is_causal=__causal))

    def __merge(self, y: Tensor) -> Tensor:
        return self.merge(y)


class AnnotationsThatCannotBeEvaluated(Attends):
    def forward(self, x: Tensor) -> NotThere:  # type: ignore[name-defined]  # noqa: F821
        def attend(q: NotThere) -> NotThere:  # type: ignore[name-defined]  # noqa: F821
            return F.scaled_dot_product_attention(q, k, v)

        q, k, v = self.heads(x)
        return self.merge(attend(q))


class Kernel:
    """Not a module, but called like one."""

    def __init__(self, *, causal: bool) -> None:
        self.causal = causal

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self(q, k, v)


class ThroughCallableObject(Attends):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(Kernel(causal=True)(*self.heads(x)))


class ThroughMethodOfObject(Attends):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(Kernel(causal=False).run(*self.heads(x)))


class ThroughPartialHelper(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merge(functools.partial(helper, q, causal=True)(k, v))


class ThroughEither(Attends):
    """One call expression leads to the fused function, to a helper, and to another helper."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        total = q
        for attend in (F.scaled_dot_product_attention, helper, outer_helper):
            total = total + attend(q, k, v)
        return self.merge(total)


class ThroughTorchFunctional(nn.Module):
    """What the attention pooling of OpenAI's CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=16,
            num_heads=2,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return y[0]


class Decorated(Attends):
    @logged
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.attend(*self.heads(x)))

    @logged
    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class UsesDefaultsAndSuper(Directly):
    def forward(self, x: Tensor, *, gain: float = 1.5) -> Tensor:
        return gain * super().forward(x)


class InChild(nn.Module):
    """The attention is a child's; the parent only passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Directly(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class OddIndentation(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        text = "ä€"; y = F.scaled_dot_product_attention(  # noqa: E702
            q,
            k,
            v,
            is_causal=len(text) == 2,
        )  # fmt: skip
        return self.merge(y)


WAYS: dict[str, tuple[type[nn.Module], int]] = {
    cls.__name__: (cls, count)
    for cls, count in {
        Directly: 1,
        WithKeywords: 1,
        WithUnpackedArguments: 1,
        FromImportedName: 1,
        RenamedImport: 1,
        ImportedInside: 1,
        ThroughHelpers: 1,
        ThroughMethod: 1,
        ThroughInheritedMethod: 1,
        ThroughStaticMethod: 1,
        ThroughClosure: 1,
        ThroughLambda: 1,
        ThroughPartial: 1,
        ThroughTable: 1,
        Twice: 2,
        TwiceInOneExpression: 2,
        TwiceThroughOneHelper: 2,
        InLoop: 1,
        InComprehension: 1,
        PrivateNames: 1,
        AnnotationsThatCannotBeEvaluated: 1,
        ThroughCallableObject: 1,
        ThroughMethodOfObject: 1,
        ThroughPartialHelper: 1,
        ThroughEither: 3,
        Decorated: 1,
        UsesDefaultsAndSuper: 1,
        InChild: 1,
        OddIndentation: 1,
    }.items()
}
"""Name -> class and the number of its call expressions."""
