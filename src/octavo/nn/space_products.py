"""Rules for products: what they sum over is one space, what they make is that of the other axis."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from octavo.nn.space_sums import Sums
from octavo.nn.space_tags import READS, WRITES, Tag, Tags


class Products(Sums):
    """Products of matrices, convolutions, attention."""

    def mm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """``(m, k) x (k, n)``, and stacks of it."""
        a, b = self.tags(args[0]), self.tags(args[1])
        self.note(out, self.product(a, b))

    def addmm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A product, and something added to it."""
        self.note(out, self.product(self.tags(args[1]), self.tags(args[2])))
        self.sum_of(args[0], out, out)

    def product(self, a: Tags, b: Tags) -> Tags:
        """Tags of a product of two matrices, or stacks of them."""
        self.contract(a[-1], b[-2])
        stack: Tags = [None] * (len(a) - 2)
        for tag in (*a[:-2], *b[:-2]):
            self.nail_tag(tag, f"it numbers the products{self.here()}")
        is_mixed = all(tag is None or tag.member is None for tag in (*a, *b))
        if is_mixed and b[-1] is not None:
            b[-1].space.root.is_mixed = True
        return [*stack, self.written(a[-2]), self.written(b[-1])]

    def contract(self, one: Tag | None, two: Tag | None) -> None:
        """A product sums over both."""
        if one is None or two is None:
            self.nail_tag(one or two, f"a product sums over it and something else{self.here()}")
            return
        one.space.join(two.space)
        self.role(one, READS)
        self.role(two, READS)

    def embedding(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows of a table."""
        first, second = self.tags(args[0])
        self.nail_tag(first, "an index chooses from it")
        self.note(out, [*([None] * args[1].ndim), self.written(second)])

    def grouped_mm(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows of the first by one of a stack of matrices each."""
        a, b = self.tags(args[0]), self.tags(args[1])
        if len(a) == 2:
            self.nail_tag(b[0], f"it numbers the products{self.here()}")
            b = b[1:]
        self.note(out, self.product(a, b))

    def convolution(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A product over channels and places."""
        x, weight, bias, is_transposed, groups = self.tags(args[0]), self.tags(args[1]), args[2], args[6], args[8]
        first, second = (1, 0) if is_transposed else (0, 1)
        for tag in (*x[2:], *weight[2:]):
            self.nail_tag(tag, f"a convolution runs along it{self.here()}")
        if groups != 1:
            for tag in (x[1], *weight[:2]):
                self.nail_tag(tag, f"a convolution in groups{self.here()}")
        self.contract(x[1], weight[second])
        made = self.written(weight[first])
        if bias is not None and made is not None:
            (tag,) = self.tags(bias)
            self.role(tag, WRITES)
            made = Tag(made.space.join(tag.space)) if tag is not None else made
            if tag is None:
                made.space.nail("its bias is no parameter")
        self.note(out, [self.written(x[0]), made, *([None] * (out.ndim - 2))])

    def attention(self, args: Any, kwargs: Any, out: Any) -> None:
        """A fused attention: queries meet keys, probabilities meet values."""
        q, k, v = (self.tags(tensor) for tensor in args[:3])
        self.contract(q[-1], k[-1])
        for tag in (*q[:-1], *k[:-1], *v[:-1]):
            self.nail_tag(tag, f"it numbers the products{self.here()}")
        if v[-1] is not None:
            v[-1].space.root.is_mixed = True
        self.note(out[0], [*([None] * (out[0].ndim - 1)), self.written(v[-1])])
