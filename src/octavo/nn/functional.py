"""Sites of what was seen outside of plain layers: functional products, attention, caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from octavo.nn.alternatives import with_alternatives
from octavo.nn.extras import INPUT_TRANSFORM, LOW_RANK
from octavo.nn.layers import INSTANCE_FORWARD, has_instance_forward, is_sealed
from octavo.nn.ledger import Computed, Source
from octavo.nn.meetings import Attention, Meeting, Trace
from octavo.nn.products import INSIDE, RESULT, Operand, Role, Roles
from octavo.nn.redirects import NoSourceError, Tap, TappedCall, redirecting_methods
from octavo.nn.site import Site, joined, make_facts
from octavo.nn.uses import Call
from octavo.nn.views import WeightView
from octavo.spec.facts import QUANTIZER_NAMES, Slot

_INPUTS = (Slot.QUERY, Slot.KEY, Slot.VALUE)
_CACHES = ((Slot.KEY_CACHE, Operand(0, "key_states")), (Slot.VALUE_CACHE, Operand(1, "value_states")))
ROOT = "(model)"


def functional_sites(model: nn.Module, seen: Trace) -> list[Site]:
    """Sites of everything in ``seen`` that is no plain layer, with the parameters that meet activations there.

    A site's name is its module's path where it is the only one of its kind there, a layer or an attention, and else
    ``path#operation`` with a number, in order of first execution.
    """
    makers = _Makers(model, seen)
    sites = [*makers.weights(), *makers.attention(), *makers.products()]
    return [_reachable(model, site) for site in sites]


class _Makers:
    """Names sites, and the quantizers that are children of their calls' owners."""

    def __init__(self, model: nn.Module, seen: Trace) -> None:
        self.model = model
        self.seen = seen
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.numbers: Counter[tuple[str, str]] = Counter()
        ran = set(seen.order)
        self.taken = {path or ROOT for path, m in model.named_modules() if is_sealed(m) and path in ran}

    def _name(self, owner: str, operation: str, wanted: str | None) -> tuple[str, str]:
        """Name of a new site, and the prefix of its quantizers among the owner's children."""
        number = self.numbers[owner, operation]
        self.numbers[owner, operation] += 1
        if wanted is not None and (wanted or ROOT) not in self.taken:
            self.taken.add(wanted or ROOT)
            return wanted or ROOT, "" if wanted == owner else f"{operation}{number}_"
        return f"{owner or ROOT}#{operation}{number}", f"{operation}{number}_"

    def weights(self) -> Iterator[Site]:
        """Parameters that meet activations."""
        meetings = self.seen.weights.items()
        met = Counter((call, _other(meeting)) for (call, _), meeting in meetings)
        read = Counter(id(self.parameters[key]) for (_, keys), _ in meetings for key in keys)
        tapped: set[tuple[Call, Operand]] = set()
        for (call, keys), meeting in meetings:
            place = (call, _other(meeting))
            is_alone = met[place] == 1 and all(read[id(self.parameters[key])] == 1 for key in keys)
            yield self._weight(meeting, keys, is_first=place not in tapped, is_alone=is_alone)
            tapped.add(place)

    def _weight(self, meeting: Meeting, keys: tuple[str, ...], *, is_first: bool, is_alone: bool) -> Site:
        call, product = meeting.call, meeting.product
        keys = tuple(self._alias(key, call.owner) for key in keys)
        key = keys[0]
        holder, _, parameter = key.rpartition(".")
        name, prefix = self._name(call.owner, product.operation, holder if parameter == "weight" else None)
        view, why = self._view(meeting, key)
        slots = (Slot.WEIGHT, Slot.INPUT, Slot.OUTPUT) if product.is_dense else (Slot.WEIGHT, Slot.OUTPUT)
        operands = {Slot.INPUT: _other(meeting), Slot.OUTPUT: RESULT}
        if product.left.index == INSIDE:
            slots = (Slot.WEIGHT, Slot.INPUT)
        slots = slots if is_first else (Slot.WEIGHT,)
        taps = {slot: prefix + QUANTIZER_NAMES[slot] for slot in slots if slot is not Slot.WEIGHT}
        axis = _channel_axis(meeting)
        axes = {Slot.INPUT: -1 if axis is None else axis}
        tapped = tuple(Tap(child, operands[slot], axes.get(slot, -1)) for slot, child in taps.items())
        is_placed = is_alone and Slot.INPUT in taps and len(keys) == 1 and not self._is_layer(key)
        at_input = (call.owner, prefix + INPUT_TRANSFORM, axis) if is_placed and axis is not None else None
        if at_input is not None:  # before the quantizer
            beside = Tap(prefix + LOW_RANK, operands[Slot.INPUT])
            tapped = (Tap(at_input[1], operands[Slot.INPUT]), *tapped, beside)
        calls = tuple(TappedCall(chain, tapped) for chain in with_alternatives(call.chain))
        module = self.model.get_submodule(holder)
        mine = [key, *keys[1:], *filter(None, [meeting.bias])]
        if name == (holder or ROOT):
            mine += [joined(holder, other) for other in module._parameters]
        facts = make_facts(
            name,
            product.operation,
            module,
            {k: self.parameters[k] for k in dict.fromkeys(mine) if k in self.parameters},
            slots=() if why else slots,
            weight_shape=view.matrix_shape if view else (),
            weight_name=key if view else "",
            macs=meeting.macs,
            obstacle=why,
        )
        child = QUANTIZER_NAMES[Slot.WEIGHT] if parameter == "weight" else f"{parameter}_{QUANTIZER_NAMES[Slot.WEIGHT]}"
        places = {slot: (call.owner, name_) for slot, name_ in taps.items()} | {Slot.WEIGHT: (holder, child)}
        return Site(
            facts,
            call.owner,
            key if view else "",
            view,
            {call.owner: calls} if taps else {},
            places,
            True,
            meeting.reads,
            at_input,
        )

    def _is_layer(self, key: str) -> bool:
        """Whether a parameter is also that of a layer that runs as its module: by any of its names."""
        names = (name for name, p in self.parameters.items() if p is self.parameters[key])
        return any((name.rpartition(".")[0] or ROOT) in self.taken and name.endswith("weight") for name in names)

    def _alias(self, key: str, owner: str) -> str:
        """The name of a shared parameter in ``owner``, where it has one there."""
        near = joined(owner, key.rpartition(".")[2])
        return near if self.parameters.get(near) is self.parameters[key] else key

    def _view(self, meeting: Meeting, key: str) -> tuple[WeightView | None, str]:
        """The weight as a matrix, or why it cannot be seen as one."""
        origin = meeting.weight
        if isinstance(origin, Computed):
            return None, f"its weight is computed from {' and '.join(origin.keys)} before it meets the input"
        assert isinstance(origin, Source)
        module = self.model.get_submodule(key.rpartition(".")[0])
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return None, "an embedding with max_norm changes its weight during the forward"
        shape = tuple(self.parameters[key].shape)
        view = weight_view(shape, origin, meeting)
        return view, "" if view else f"its weight of shape {list(shape)} is not used as a matrix, or a stack of them"

    def products(self) -> Iterator[Site]:
        """Products of two activations that are not attention's."""
        used = {c for found in self.seen.attention.values() for c in (found.call, found.scores)}
        for call, meeting in self.seen.products.items():
            if call in used:
                continue
            name, prefix = self._name(call.owner, "matmul", None)
            operands = {Slot.LEFT: meeting.product.left, Slot.RIGHT: meeting.product.right}
            children = {slot: prefix + QUANTIZER_NAMES[slot] for slot in operands}
            why = f"it reads the memory of {meeting.hidden} through a view made before" if meeting.hidden else ""
            facts = make_facts(
                name,
                "matmul",
                self.model.get_submodule(call.owner),
                {},
                slots=() if why else tuple(operands),
                macs=meeting.macs,
                obstacle=why,
            )
            calls = (TappedCall(call.chain, tuple(Tap(children[slot], op) for slot, op in operands.items())),)
            places = {slot: (call.owner, child) for slot, child in children.items()}
            yield Site(facts, call.owner, calls={call.owner: calls}, places=places)

    def attention(self) -> Iterator[Site]:
        """Attention calls with their caches; a cache alone where its owner computes no attention."""
        caches = dict(self.seen.caches)
        for found in self.seen.attention.values():
            owner = found.call.owner
            name, prefix = self._name(owner, "attention", owner)
            calls, slots = self._attention_calls(found, prefix)
            macs = (found.macs or found.estimated_macs) + sum(
                self.seen.products[call].macs for call in (found.scores, found.call) if found.scores and call
            )
            site = self._site(owner, name, prefix, calls, slots, macs, caches.pop(owner, None))
            yield replace(site, facts=replace(site.facts, fused_call=found.fused_call))
        for owner, call in caches.items():
            name, prefix = self._name(owner, "cache", None)
            yield self._site(owner, name, prefix, [], (), 0, call)

    def _site(
        self,
        owner: str,
        name: str,
        prefix: str,
        calls: list[tuple[str, TappedCall]],
        slots: tuple[Slot, ...],
        macs: int,
        cache: Call | None,
    ) -> Site:
        if cache is not None:
            taps = tuple(Tap(prefix + QUANTIZER_NAMES[slot], operand) for slot, operand in _CACHES)
            calls = [*calls, (owner, TappedCall(cache.chain, taps))]
            slots = (*slots, *(slot for slot, _ in _CACHES))
        module = self.model.get_submodule(owner)
        parameters = _own(owner, module) if name == (owner or ROOT) else {}
        facts = make_facts(name, "attention", module, parameters, slots=slots, macs=macs)
        by_owner: dict[str, tuple[TappedCall, ...]] = {}
        homes: dict[str, str] = {}
        for path, call in calls:
            by_owner[path] = (*by_owner.get(path, ()), call)
            homes |= dict.fromkeys([*(tap.child for tap in call.taps), call.softmax], path)
        children = {slot: prefix + QUANTIZER_NAMES[slot] for slot in slots}
        places = {slot: (homes[child], child) for slot, child in children.items()}
        return Site(facts, owner, calls=by_owner, places=places)

    def _attention_calls(self, found: Attention, prefix: str) -> tuple[list[tuple[str, TappedCall]], tuple[Slot, ...]]:
        call, softmax = found.call, prefix + QUANTIZER_NAMES[Slot.SOFTMAX]
        inputs = [Tap(prefix + QUANTIZER_NAMES[slot], Operand(k, slot.value)) for k, slot in enumerate(_INPUTS)]
        result = Tap(prefix + QUANTIZER_NAMES[Slot.ATTENTION_OUTPUT], RESULT)
        visible = (*_INPUTS, Slot.SOFTMAX, Slot.ATTENTION_OUTPUT)
        if found.is_multihead:
            taps = tuple(Tap(prefix + QUANTIZER_NAMES[slot], Operand(INSIDE, slot.value)) for slot in visible)
            return [(call.owner, TappedCall(call.chain, taps))], visible
        if found.scores is not None and found.softmax is not None:
            first, second = self.seen.products[found.scores].product, self.seen.products[call].product
            probabilities = found.softmax[1]
            value = second.right if probabilities == second.left else second.left
            scores = (Tap(inputs[0].child, first.left), Tap(inputs[1].child, first.right))
            context = (Tap(inputs[2].child, value), Tap(softmax, probabilities), result)
            return [
                (found.scores.owner, TappedCall(found.scores.chain, scores)),
                (call.owner, TappedCall(call.chain, context)),
            ], visible
        is_interface = call.chain.interface == len(call.chain.points) - 1
        if is_interface:  # its first argument is the module
            inputs = [replace(tap, operand=replace(tap.operand, index=tap.operand.index + 1)) for tap in inputs]
        taps = (*inputs, result)
        if found.softmax is None:
            return [(call.owner, TappedCall(call.chain, taps))], (*_INPUTS, Slot.ATTENTION_OUTPUT)
        inner, operand = found.softmax
        if inner == call:
            return [(call.owner, TappedCall(call.chain, taps, softmax))], visible
        within = (
            TappedCall(inner.chain, softmax=softmax)
            if operand.index < 0
            else TappedCall(inner.chain, (Tap(softmax, operand),))
        )
        return [(call.owner, TappedCall(call.chain, taps)), (inner.owner, within)], visible


def _other(meeting: Meeting) -> Operand:
    """The operand that meets the weight."""
    return meeting.product.right if meeting.is_left else meeting.product.left


def _channel_axis(meeting: Meeting) -> int | None:
    """The axis of what meets a weight that is summed over, from its end; ``None`` where it is not one."""
    if meeting.product.operation != "linear" or meeting.product.left.index == INSIDE:
        return None
    shapes = (meeting.shape, meeting.other) if meeting.is_left else (meeting.other, meeting.shape)
    roles = meeting.product.roles(*shapes)[1 if meeting.is_left else 0]
    axes = [k for k, role in enumerate(roles) if role is Role.IN]
    return axes[0] - len(roles) if len(axes) == 1 else None


def _own(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    return {joined(path, name): p for name, p in module._parameters.items() if p is not None}


def _roles(meeting: Meeting) -> Roles:
    """What the axes of the weight operand are to the result; the other operand's shape does not matter."""
    if meeting.is_left:
        return meeting.product.roles(meeting.shape, meeting.other)[0]
    return meeting.product.roles(meeting.other, meeting.shape)[1]


def weight_view(shape: tuple[int, ...], source: Source, meeting: Meeting) -> WeightView | None:
    """How a parameter of ``shape`` is a matrix, from what the axes that were made of it do in a product.

    Returns:
        ``None`` where the parameter is not (a stack of) ``(out, in, ...)`` or ``(in, out)``.
    """
    roles = _roles(meeting)
    known = {axis: role for axis, role in zip(source.axes, roles, strict=True) if axis is not None}
    short = [
        role for axis, role, size in zip(source.axes, roles, meeting.shape, strict=True) if axis is None and size == 1
    ]
    for axis, size in enumerate(shape):  # an axis of one element has no place of its own in memory
        if axis not in known and size == 1 and short:
            known[axis] = short.pop(0)
    if not known and source.in_order and roles == (Role.OUT, Role.IN) and meeting.shape[0] == shape[0]:
        return WeightView(shape)  # flattened behind its first axis
    kinds = [known.get(axis, Role.STACK) for axis in range(len(shape))]
    stack = next((k for k, role in enumerate(kinds) if role is not Role.STACK), len(kinds))
    first, rest = kinds[stack : stack + 1], set(kinds[stack + 1 :])
    if first == [Role.OUT] and rest == {Role.IN}:
        return WeightView(shape, False, stack)
    has_one_output = len(kinds) == stack + 2 or (meeting.product.operation == "conv_transposed" and not stack)
    return WeightView(shape, True, stack) if first == [Role.IN] and rest == {Role.OUT} and has_one_output else None


def why_unreachable(module: nn.Module, calls: tuple[TappedCall, ...]) -> str:
    """Why calls in the methods of ``module`` cannot be redirected; empty when they can."""
    try:
        redirecting_methods(type(module), calls)
    except NoSourceError as error:
        return str(error)
    return INSTANCE_FORWARD if has_instance_forward(module) else ""


def _reachable(model: nn.Module, site: Site) -> Site:
    """``site``, with the reason where its calls cannot be redirected."""
    for path, calls in site.calls.items():
        module = model.get_submodule(path)
        why = why_unreachable(module, calls)
        if why == INSTANCE_FORWARD:
            return _blocked(site, why)
        if why:
            what = f"the {site.facts.operation} call in '{path or ROOT}' ({type(module).__name__})"
            return _blocked(site, f"{what} cannot be reached: {why}; hand in a counterpart with octavo.register")
    return site


def _blocked(site: Site, why: str) -> Site:
    return replace(site, facts=replace(site.facts, slots=(), obstacle=site.facts.obstacle or why), calls={})


def claimed(sites: Iterable[Site]) -> Mapping[str, str]:
    """Parameter -> name of the functional site to which it belongs."""
    return {key: site.facts.name for site in sites for key in site.facts.parameters}
