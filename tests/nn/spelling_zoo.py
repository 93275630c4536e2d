"""Modules that multiply in every way that code is written, each with one batch and the sites that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sites = dict[str, str]
WEIGHT = "weight input output"
TABLE = "weight output"
PRODUCT = "left right"
ATTENTION = "query key value softmax attention_output"


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2)


class OneWeight(nn.Module):
    """A parameter called ``weight`` of shape ``(6, 8)``: the site is called as the module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = parameter(6, 8), parameter(6)


class FunctionalLinear(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Transposed(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight.t()) + self.bias


class Operator(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class OperatorInPlace(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        y @= self.weight.mT
        return y


class WeightInFront(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x.transpose(-2, -1)


class Method(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return x.matmul(self.weight.transpose(0, 1))


class MethodOverLines(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return (
            (2 * x)
            .matmul(
                self.weight.t()
            )
            .abs()
        )  # fmt: skip


class Cast(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.to(torch.bfloat16)).float()


class Added(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x[0], self.weight.t())


class Einsum(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class EinsumOfList(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,oi->bto", [x, self.weight])


def project(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


class ThroughFunction(OneWeight):
    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


class TwiceTheSame(OneWeight):
    """One parameter, two calls: the second follows the first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(x.flip(-1), self.weight)


class Subclass(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(2 * x, self.weight, self.bias)


class SubclassThroughSuper(Subclass):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class SamePadding(nn.Conv1d):
    def __init__(self) -> None:
        super().__init__(5, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1)))


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.back = parameter(6, 5, 3), parameter(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(F.conv1d(x, self.kernel), self.back)


class ScaledEmbedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class TiedHead(nn.Module):
    """A parent that computes with the table of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.embed(ids).tanh(), self.embed.weight)


class Stack(nn.Module):
    """One matrix for each of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = parameter(2, 8, 6), parameter(2, 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(torch.zeros(1), torch.bmm(x, self.up), self.down.transpose(1, 2))


class StackInLoop(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x[k] @ self.up[k], self.down[k]) for k in range(2)])


class StackByIndex(Stack):
    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.tensor([1, 0])
        return x.bmm(self.up[chosen]).bmm(self.down[chosen].mT)


class Listed(nn.Module):
    """One call expression, two parameters: each is rounded, the input has one quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([parameter(8, 8), parameter(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


class ReadFromOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.first.weight.t()) + F.linear(x, self.second.weight.t())[..., :1]


class Graph(nn.Module):
    """A graph convolution: the adjacency is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(8, 6)
        self.register_buffer("adjacency", torch.rand(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.adjacency @ (x @ self.weight))


class Similarity(nn.Module):
    """Two activations, no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bid,bjd->bij", self.proj(x), x[..., :6])


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)


class WrittenOut(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.transpose(-2, -1) / 3, -1) @ v


class WithBiasAndMask(Attends):
    def __init__(self) -> None:
        super().__init__()
        self.table = parameter(1, 5, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = torch.baddbmm(self.table.expand(2, 5, 5), q, k.mT, beta=0.5, alpha=0.3)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(scores.dtype).min)
        probabilities = F.softmax(scores.float(), dim=-1, dtype=torch.float32).type_as(q)
        return torch.bmm(self.drop(probabilities), v)


class InTwoMethods(Attends):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bid,bjd->bij", q, k)

    def context(self, p: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bij,bjd->bid", p, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.context(nn.Softmax(dim=-1)(self.scores(q, k)), v)


class Transposing(Attends):
    """Values stand in front: ``v.T @ p.T``."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (v.mT @ (q @ k.mT).softmax(-1).mT).mT


class Fused(Attends):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)


class FusedWithGroups(nn.Module):
    """Four query heads over two key heads, and a mask of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (4, 4)).transpose(1, 2).chunk(2, 1)
        mask = torch.ones(5, 5).tril().bool()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Processor:
    """As diffusers writes them: the attention module is an argument."""

    def __call__(self, attn: WithProcessor, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, (k, v) = attn.to_q(x), attn.to_kv(x if context is None else context).chunk(2, -1)
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0))


class WithProcessor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(8, 8), nn.Linear(8, 16)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.1)])
        self.processor = Processor()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.processor(self, x, context=x.flip(1), **options)


class LinearAttention(Attends):
    """Softmax of projections, not of a product: two products of two activations."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class Pooling(nn.Module):
    """What the attention pooling of OpenAI's CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=8, num_heads=2,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0, out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True, training=self.training, need_weights=False,
        )  # fmt: skip
        return y[0]


def tokens() -> Tensor:
    return torch.randn(2, 5, 8)


def ids() -> Tensor:
    return torch.tensor([[1, 2, 3], [4, 5, 6]])


_ROOT = {"(model)": WEIGHT}
_WAYS: list[tuple[type[nn.Module], Callable[[], Tensor], Sites]] = [
    *(
        (cls, tokens, _ROOT)
        for cls in (
            FunctionalLinear, Transposed, Operator, OperatorInPlace, WeightInFront, Method, MethodOverLines, Cast,
            Added, Einsum, EinsumOfList, ThroughFunction, Subclass, SubclassThroughSuper,
        )
    ),
    (TwiceTheSame, tokens, {"(model)": WEIGHT, "(model)#linear1": WEIGHT}),
    (SamePadding, tokens, {"(model)": WEIGHT}),
    (FunctionalConv, tokens, {"(model)#conv0": WEIGHT, "(model)#conv_transposed0": WEIGHT}),
    (ScaledEmbedding, ids, {"(model)": TABLE}),
    (TiedHead, ids, {"embed": TABLE, "(model)#linear0": WEIGHT}),
    *(
        (cls, tokens, {"(model)#linear0": WEIGHT, "(model)#linear1": WEIGHT})
        for cls in (Stack, StackInLoop, StackByIndex)
    ),
    (Listed, tokens, {"(model)#linear0": WEIGHT, "(model)#linear1": "weight"}),
    (ReadFromOutside, tokens, {"first": WEIGHT, "(model)#linear0": WEIGHT, "second": WEIGHT}),
    (Graph, tokens, {"(model)": WEIGHT, "(model)#matmul0": PRODUCT}),
    (Similarity, tokens, {"proj": WEIGHT, "(model)#matmul0": PRODUCT}),
    *(
        (cls, tokens, {"qkv": WEIGHT, "(model)": ATTENTION})
        for cls in (WrittenOut, WithBiasAndMask, InTwoMethods, Transposing, Fused)
    ),
    (FusedWithGroups, tokens, {"q": WEIGHT, "kv": WEIGHT, "(model)": ATTENTION}),
    (WithProcessor, tokens, {"to_q": WEIGHT, "to_kv": WEIGHT, "to_out.0": WEIGHT, "(model)": ATTENTION}),
    (LinearAttention, tokens, {"qkv": WEIGHT, "(model)#matmul0": PRODUCT, "(model)#matmul1": PRODUCT}),
    (Pooling, tokens, {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "c_proj"), "weight input"), "(model)": ATTENTION
    }),
]  # fmt: skip
WAYS = {cls.__name__: (cls, make, sites) for cls, make, sites in _WAYS}
"""Name -> class, its batch, and name of every site -> slots that it offers."""
