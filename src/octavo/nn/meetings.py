"""The function mode of a traced forward: every call in which tensors meet, and how a method arrives at it."""

from __future__ import annotations

import itertools
import sys
import weakref
from dataclasses import dataclass, field
from types import CodeType, FrameType, MethodDescriptorType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octavo.nn.frames import Place, caller_of, is_interface, place_of
from octavo.nn.layers import is_sealed, layer_kind
from octavo.nn.ledger import Activation, Computed, Constant, Ledger, Source, merged, parameters_of, tensors_of
from octavo.nn.multihead import MULTIHEAD_INPUTS
from octavo.nn.products import SOFTMAX, Operand, Product, product_of, projection_inside
from octavo.nn.uses import ACTIVATIONS, ADDS, OUTSIDE, Call, Event, Uses
from octavo.numerics.arrays import tensors_in


@dataclass(slots=True)
class Meeting:
    """Two tensors that meet at a call.

    Args:
        call: Where.
        product: What is computed there.
        weight: A parameter, or what the call makes of it; ``None`` where both are activations.
        is_left: The weight is the left operand.
        shape: The weight operand's.
        other: The other operand's shape.
        bias: Key of a parameter that is added there.
        reads: Number of the tensor that meets the weight.
        macs: Multiply-adds, of all executions.
        hidden: The parameter whose memory the operand shares, made before the forward.
    """

    call: Call
    product: Product
    weight: Source | Computed | None = None
    is_left: bool = False
    shape: tuple[int, ...] = ()
    other: tuple[int, ...] = ()
    bias: str = ""
    reads: int = -1
    macs: int = 0
    hidden: str = ""


@dataclass(slots=True)
class Attention:
    """A call that computes attention, or a product with probabilities that completes it.

    Args:
        call: The call of the attention function; the second product where attention is written out.
        scores: The first product, where it is written out.
        softmax: Call and operand that the probabilities are, ``None`` where they are not seen.
        macs: Multiply-adds, of all executions.
        estimated_macs: Of one execution, from the shapes, for functions that show nothing.
        fused_call: The function that hides the probabilities, empty where they are seen.
        is_multihead: It is ``F.multi_head_attention_forward``, which computes projections, too.
    """

    call: Call
    scores: Call | None = None
    softmax: tuple[Call, Operand] | None = None
    macs: int = 0
    estimated_macs: int = 0
    fused_call: str = ""
    is_multihead: bool = False


@dataclass(slots=True)
class Trace:
    """What one forward pass showed.

    Args:
        macs: Multiply-adds of plain layers, by path.
        reads: Path of a plain layer -> number of the tensor it read first; equal numbers, equal tensors.
        weights: Parameters that meet activations outside of plain layers, by call and parameter.
        products: Products of two activations, by call; those of attention are not among them.
        attention: Attention, by call.
        caches: Owner of a call that stores keys and values -> that call.
        inherited: Paths of modules that derive from ``nn.MultiheadAttention`` and come to its forward by ``super()``.
        order: Paths of all modules in order of their first call.
        read_outside: Parameters that were computed with while no module that holds them was running.
        uses: Parameter -> names of the torch functions that took it.
        graph: Who made each tensor, and who read it.
    """

    macs: dict[str, int] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    weights: dict[tuple[Call, tuple[str, ...]], Meeting] = field(default_factory=dict)
    products: dict[Call, Meeting] = field(default_factory=dict)
    attention: dict[Call, Attention] = field(default_factory=dict)
    caches: dict[str, Call] = field(default_factory=dict)
    inherited: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)
    read_outside: set[str] = field(default_factory=set)
    uses: dict[str, set[str]] = field(default_factory=dict)
    graph: Uses = field(default_factory=Uses)


FUSED = "F.scaled_dot_product_attention"


class CallMode(TorchFunctionMode):
    """Sees every torch function of a forward.

    Args:
        result: Where what is seen goes.
        model: The model.
    """

    def __init__(self, result: Trace, model: nn.Module) -> None:
        super().__init__()
        self.result = result
        self.stack: list[tuple[str, nn.Module]] = []
        self.ledger = Ledger(model)
        self._num_sealed = 0
        self._sealed = {id(module): is_sealed(module) for module in model.modules()}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self._numbers: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._count = itertools.count()
        self._frames: dict[CodeType, bool] = {}
        self._interfaces: set[tuple[str, CodeType]] = set()
        self._given: list[tuple[int, ...]] = []
        self._callers: list[Call | None] = []

    def enter(self, path: str, module: nn.Module, given: Any) -> None:
        """``module`` begins to run on ``given``."""
        kind = layer_kind(module)
        is_function = kind is not None and kind.operation == "activation" and bool(self.stack)
        self._callers.append(self._place(caller_of(sys._getframe(1)))[0] if is_function else None)
        self.stack.append((path, module))
        self._given.append(self._numbers_of(given) if self._sealed[id(module)] else ())
        self._num_sealed += self._sealed[id(module)]

    def leave(self, path: str, output: Any) -> bool:
        """The innermost module ends; ``False`` when that is not the one at ``path``."""
        if not self.stack or self.stack[-1][0] != path:
            return False
        _, module = self.stack.pop()
        given = self._given.pop()
        self._callers.pop()
        self._num_sealed -= self._sealed[id(module)]
        if self._sealed[id(module)] and not self._num_sealed:
            self._note(None, given, list(tensors_in(output)), path=path)
        if not self.stack:
            self.result.graph.note(Event(OUTSIDE, None, self._numbers_of((output,)), ()))
        return True

    def _numbers_of(self, values: Any) -> tuple[int, ...]:
        return tuple(map(self.number, tensors_in(values)))

    def _note(
        self, func: Any, given: tuple[int, ...], results: list[Tensor], *, path: str, calls: tuple[Call, ...] = ()
    ) -> None:
        """One computation: what is handed through unchanged is none."""
        numbers = [self.number(tensor) for tensor in results]
        makes = tuple(number for number in numbers if number not in given)
        if results and results[0].is_inference():
            self.result.graph.is_blind = True
        if makes:
            ndim = results[numbers.index(makes[0])].ndim
            self.result.graph.note(Event(path, func, given, makes, ndim, calls))

    def _calls_of(self, frame: FrameType, func: Any, kwargs: dict[str, Any]) -> tuple[Call, ...]:
        """The expressions that lead to a sum or an activation: its own, and that of the module that is only it."""
        try:
            is_wanted = func in ADDS or func in ACTIVATIONS
        except TypeError:  # not hashable
            return ()
        if not is_wanted or kwargs.get("alpha", 1) != 1:
            return ()
        outer = self._callers[-1]
        return (self._place(frame, func)[0], *([outer] if outer is not None else []))

    def number(self, tensor: Tensor) -> int:
        """Equal for the same tensor with the same contents."""
        version = -1 if tensor.is_inference() else tensor._version
        known = self._numbers.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != version:
            known = (weakref.ref(tensor), version, next(self._count))
            self._numbers[id(tensor)] = known
        return known[2]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.stack or self._num_sealed:
            return func(*args, **kwargs)
        inputs = list(tensors_of((*args, *kwargs.values())))
        given = tuple(map(self.number, inputs))  # before it is computed: in place a tensor becomes another one
        output = func(*args, **kwargs)
        if results := list(tensors_of((output,))):
            frame = sys._getframe(1)
            calls = self._calls_of(frame, func, kwargs)
            self._note(func, given, results, path=self.stack[-1][0], calls=calls)
            self._watch(frame, func, args, kwargs, inputs, output)
        return output

    def _watch(
        self, frame: FrameType, func: Any, args: Any, kwargs: dict[str, Any], inputs: list[Tensor], output: Any
    ) -> None:
        self._note_parameters(func, inputs)
        product = product_of(func, args)
        if product is not None and isinstance(output, Tensor):
            self._product(frame, func, product, args, kwargs, output)
        elif func is F.scaled_dot_product_attention:
            self._fused(frame, args, kwargs, output)
        elif func is F.multi_head_attention_forward:
            self._multihead(frame, args, kwargs)
        else:
            self.ledger.follow(func, inputs, output)
            if func in SOFTMAX:
                self._softmax(output)
        self._look_at_caller(frame)

    def _note_parameters(self, func: Any, inputs: list[Tensor]) -> None:
        running: set[int] = set()
        for parameter in inputs:
            if isinstance(parameter, nn.Parameter):
                names = self._names.get(id(parameter), [])
                running = running or {id(module) for _, module in self.stack}
                for name in names[:1]:
                    self.result.uses.setdefault(name, set()).add(getattr(func, "__name__", str(func)))
                if not any(id(self._modules[name.rpartition(".")[0]]) in running for name in names):
                    self.result.read_outside.update(names)

    def _place(self, frame: FrameType | None, func: Any = None) -> tuple[Call, Place]:
        path, owner = self.stack[-1]
        is_method = isinstance(func, MethodDescriptorType) or func is Tensor.__matmul__
        place = place_of(frame, owner, func.__name__.strip("_") if is_method else "")
        return Call(path, place.chain), place

    def _softmax(self, output: Tensor) -> None:
        origin = self.ledger.origin(output)
        if isinstance(origin, Activation) and origin.scores:
            self.ledger.note(output, Activation(origin.scores, is_softmax=True))

    def _product(
        self, frame: FrameType, func: Any, product: Product, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> None:
        operands = product.left.of(args, kwargs), product.right.of(args, kwargs)
        if not all(isinstance(operand, Tensor) for operand in operands):
            return
        left, right = (self.ledger.origin(operand) for operand in operands)
        made = [isinstance(origin, Source | Computed) for origin in (left, right)]
        if all(made) or (any(made) and product.is_dense and Constant() in (left, right)):
            self.ledger.note(output, merged([left, right]))
        elif left == right == Constant():
            self.ledger.note(output, left)
        elif any(made):
            self._weight(frame, func, product, operands, made[0], args, kwargs, output)
        elif product.is_dense and output.dtype.is_floating_point:
            self._activations(frame, func, product, operands, output)

    def _weight(
        self,
        frame: FrameType,
        func: Any,
        product: Product,
        operands: tuple[Tensor, Tensor],
        is_left: bool,
        args: Any,
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        weight, other = operands if is_left else operands[::-1]
        origin = self.ledger.origin(weight)
        assert isinstance(origin, Source | Computed)
        self.ledger.note(output, Activation())
        call, place = self._place(frame, func)
        macs = product.macs(*operands, output)
        if place.layer is not None:
            path = next((name for name, module in self._modules.items() if module is place.layer), "")
            if is_sealed(place.layer):
                self.result.macs[path] = self.result.macs.get(path, 0) + macs
                return
        bias = product.bias.of(args, kwargs) if product.bias is not None else None
        found = self.result.weights.setdefault(
            (call, parameters_of(origin)),
            Meeting(
                call,
                product,
                origin,
                is_left,
                tuple(weight.shape),
                tuple(other.shape),
                "".join(parameters_of(self.ledger.origin(bias))[:1]) if isinstance(bias, Tensor) else "",
                self.number(other),
            ),
        )
        found.macs += macs

    def _activations(
        self, frame: FrameType, func: Any, product: Product, operands: tuple[Tensor, Tensor], output: Tensor
    ) -> None:
        call, _ = self._place(frame, func)
        macs = product.macs(*operands, output)
        probabilities = next(
            (
                (side, origin)
                for side, operand in zip((product.left, product.right), operands, strict=True)
                if isinstance(origin := self.ledger.origin(operand), Activation) and origin.is_softmax
            ),
            None,
        )
        self.ledger.note(output, Activation(() if probabilities else (call,)))
        if call.chain.interface >= 0:
            found = self._interface(call)
            found.macs += macs
            if probabilities:
                found.softmax = call, probabilities[0]
            return
        hidden = "".join(filter(None, (self.ledger.hidden_view(operand) for operand in operands)))
        self.result.products.setdefault(call, Meeting(call, product, hidden=hidden)).macs += macs
        if probabilities:
            side, origin = probabilities
            self.result.attention.setdefault(call, Attention(call, origin.scores[0], (call, side)))

    def _interface(self, call: Call) -> Attention:
        outer = Call(call.owner, call.chain.upto(call.chain.interface))
        return self.result.attention.setdefault(outer, Attention(outer))

    def _fused(self, frame: FrameType, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call, _ = self._place(frame)
        query, key = (args[k] if len(args) > k else kwargs[n] for k, n in enumerate(("query", "key")))
        if call.chain.interface >= 0:
            found = self._interface(call)
        else:
            found = self.result.attention.setdefault(call, Attention(call))
        found.softmax, found.fused_call = (call, Operand(-1, "fused")), FUSED
        found.macs += 2 * query.numel() * key.shape[-2]
        self.ledger.note(output, Activation())

    def _multihead(self, frame: FrameType, args: Any, kwargs: dict[str, Any]) -> None:
        """``F.multi_head_attention_forward``: attention, and a product inside for each weight that it is handed."""
        call, _ = self._place(frame)
        if any(point.code is nn.MultiheadAttention.forward.__code__ for point in call.chain.points):
            self.result.inherited.add(call.owner)
            return
        names = F.multi_head_attention_forward.__code__.co_varnames
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key = given["query"], given["key"]
        found = self.result.attention.setdefault(call, Attention(call, is_multihead=True))
        found.macs += 2 * query.numel() * key.shape[0]
        tokens = {"q": query.numel() // query.shape[-1], "k": key.numel() // key.shape[-1]}
        tokens |= {"v": tokens["k"], "out": tokens["q"]}
        for name, inside in MULTIHEAD_INPUTS.items():
            weight = given.get(name)
            origin = self.ledger.origin(weight) if isinstance(weight, Tensor) else None
            if not isinstance(weight, Tensor) or not isinstance(origin, Source | Computed):
                continue
            product, shape = projection_inside(inside), tuple(weight.shape)
            meeting = Meeting(call, product, origin, shape=shape, other=(1, shape[1]))
            macs = weight.numel() * tokens.get(inside, (tokens["q"] + 2 * tokens["k"]) / 3)
            self.result.weights.setdefault((call, parameters_of(origin)), meeting).macs += round(macs)

    def _look_at_caller(self, frame: FrameType) -> None:
        """Attention and caches that hide what they do: known by the function that they are in."""
        code = frame.f_code
        known = self._frames.get(code)
        if known is None:
            known = code.co_varnames[1:3] in (("query", "key"), ("key_states", "value_states"))
            self._frames[code] = known
        if not known:
            return
        path, owner = self.stack[-1]
        if is_interface(frame, owner):
            if (path, code) not in self._interfaces:
                self._interfaces.add((path, code))
                call, place = self._place(frame)
                if place.inputs is not None and call.chain.interface >= 0:
                    query, key = place.inputs
                    self._interface(call).estimated_macs = 2 * query.numel() * key.shape[-2]
        elif path not in self.result.caches:
            call, _ = self._place(frame)
            if call.chain.cache >= 0:
                self.result.caches[path] = Call(path, call.chain.upto(call.chain.cache))
