"""Residual sums, and where the outputs of convolutions and sums are rounded: as graphs of the same model have them.

A sum is a site when both of its sides come from convolutions or other such sums, perhaps through functions that only
select values. What a ReLU or Clip alone reads is rounded behind it, because engines compute the two as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor, nn

from octavo.nn.batch_norms import Fold
from octavo.nn.functional import ROOT, why_unreachable
from octavo.nn.products import RESULT, Operand
from octavo.nn.redirects import Tap, TappedCall
from octavo.nn.site import Site, make_facts
from octavo.nn.trace import Trace
from octavo.nn.uses import ACTIVATIONS, ADDS, SELECTIONS, Call, Event
from octavo.spec.facts import QUANTIZER_NAMES, Slot

_SIDES = (Operand(0, "input"), Operand(1, "other"))
_CONVOLUTIONS = ("conv", "conv_transposed")


@dataclass(slots=True)
class _Sum:
    """One sum, wherever it runs."""

    name: str
    events: list[Event] = field(default_factory=list)
    adds: tuple[str, str] = ("", "")
    first: int = 0
    why: str = ""


class Sums:
    """Sums and outputs in what one forward showed.

    Args:
        model: The model.
        seen: Its forward.
        folds: What becomes of batch norms.
        sites: Every other site.
    """

    def __init__(self, model: nn.Module, seen: Trace, folds: Mapping[str, Fold], sites: Sequence[Site]) -> None:
        self.model, self.graph, self.folds = model, seen.graph, folds
        self.layers = {site.module: site for site in sites if site.facts.operation in _CONVOLUTIONS and not site.calls}
        self.numbers: Counter[str] = Counter()
        self.children: Counter[str] = Counter()
        self.sums: dict[Call, _Sum] = {}
        self._of_event: dict[int, str] = {}
        if not self.graph.is_blind:
            for event in self.graph.events:
                self._look_at(event)
        self._users = self._users_of_expressions()

    def _look_at(self, event: Event) -> None:
        if not (event.calls and event.func in ADDS and len(event.reads) == len(_SIDES)):
            return
        sources = [self._source(number) for number in event.reads]
        if not all(sources):
            return
        alone = [self._is_only_added(number) for number in event.reads]
        first = 1 if alone == [False, True] else 0
        adds = (sources[first], sources[1 - first])
        call = event.calls[0]
        found = self.sums.get(call)
        if found is None:
            name = f"{call.owner or ROOT}#add{self.numbers[call.owner]}"
            self.numbers[call.owner] += 1
            found = self.sums[call] = _Sum(name, adds=adds, first=first)
        elif (adds, first) != (found.adds, found.first):
            found.why = "one expression computes several sums, each of which would want ranges of its own"
        found.events.append(event)
        self._of_event |= dict.fromkeys(event.makes, found.name)

    def _source(self, number: int) -> str:
        """The convolution or sum that gave a tensor, perhaps through what only selects values; empty for neither."""
        while number not in self._of_event:
            maker = self.graph.maker(number)
            if maker is None:
                return ""
            if maker.is_layer:
                return self.layers[maker.owner].facts.name if maker.owner in self.layers else ""
            if not (self._is_folded(maker) or maker.func in SELECTIONS):
                return ""
            number = maker.reads[0]
        return self._of_event[number]

    def _is_folded(self, event: Event) -> bool:
        fold = self.folds.get(event.owner)
        return fold is not None and bool(fold.layer) and event.func is F.batch_norm

    def _is_only_added(self, number: int) -> bool:
        """Whether a convolution gives a tensor to one reader alone."""
        readers = self.graph.readers(number)
        maker = self.graph.maker(number)
        if maker is not None and self._is_folded(maker):
            maker = self.graph.maker(maker.reads[0])
        return len(readers) == 1 and maker is not None and maker.is_layer and maker.owner in self.layers

    # -- outputs

    def _behind(self, event: Event) -> tuple[Event | None, str]:
        """The activation that alone reads what ``event`` gives, and the folded norm between the two."""
        readers = self.graph.readers(event.makes[0])
        norm = ""
        if len(readers) == 1 and self._is_folded(readers[0]):
            norm = readers[0].owner
            readers = self.graph.readers(readers[0].makes[0])
        fits = len(readers) == 1 and readers[0].func in ACTIVATIONS and len(readers[0].reads) == 1
        return (readers[0] if fits else None), norm

    def _makers(self) -> Iterator[tuple[str, list[Event]]]:
        """Site -> its runs, of everything that has an output to round."""
        for path, site in self.layers.items():
            yield site.facts.name, list(self.graph.of(path))
        for found in self.sums.values():
            yield found.name, found.events

    def _users_of_expressions(self) -> dict[Call, set[str]]:
        """Expression of an activation -> the sites that it is behind; what is behind anything else counts, too."""
        known = {id(event): name for name, events in self._makers() for event in events}
        users: dict[Call, set[str]] = {}
        for event in self.graph.events:
            if event.func in ACTIVATIONS:
                maker = self.graph.maker(event.reads[0])
                if maker is not None and self._is_folded(maker):
                    maker = self.graph.maker(maker.reads[0])
                name = known.get(id(maker), f"(event {id(event)})")
                for call in event.calls:
                    users.setdefault(call, set()).add(name)
        return users

    def _outlet(self, events: Sequence[Event]) -> tuple[Call, str] | None:
        """The expression behind which a site's output is rounded, and the folded norm on the way there."""
        found = [self._behind(event) for event in events]
        if not found or any(activation is None for activation, _ in found) or len({norm for _, norm in found}) > 1:
            return None
        ways = [activation.calls for activation, _ in found if activation is not None]
        for depth in range(min(map(len, ways))):
            calls = {way[depth] for way in ways}
            call = next(iter(calls))
            if len(calls) == 1 and len(self._users[call]) == 1 and not self._why_unreachable(call):
                return call, found[0][1]
        return None

    def _why_unreachable(self, call: Call) -> str:
        return why_unreachable(self.model.get_submodule(call.owner), (TappedCall(call.chain),))

    def _tapped(self, call: Call, prefix: str) -> tuple[str, TappedCall]:
        """The quantizer of a result: its name among the children of the call's owner."""
        child = f"{prefix}{QUANTIZER_NAMES[Slot.OUTPUT]}"
        return child, TappedCall(call.chain, (Tap(child, RESULT),))

    def with_outlets(self, sites: Sequence[Site]) -> list[Site]:
        """Sites whose outputs are rounded behind an activation, where one alone reads them."""
        return [self._with_outlet(site) if site.module in self.layers else site for site in sites]

    def _with_outlet(self, site: Site) -> Site:
        if site is not self.layers[site.module] or Slot.OUTPUT not in site.facts.slots:
            return site
        found = self._outlet(list(self.graph.of(site.module)))
        if found is None:
            return site
        call, norm = found
        child, tapped = self._tapped(call, self._prefix(call.owner))
        facts = replace(site.facts, activation=_described(call))
        places = {**site.places, Slot.OUTPUT: (call.owner, child)}
        return replace(site, facts=facts, calls={call.owner: (tapped,)}, places=places, is_layer=True, through=norm)

    def _prefix(self, owner: str) -> str:
        number = self.children[owner]
        self.children[owner] += 1
        return f"activation{number}_"

    # -- sites of sums

    def sites(self) -> list[Site]:
        """One for each sum, in order of first execution."""
        return [self._site(call, found) for call, found in self.sums.items()]

    def _site(self, call: Call, found: _Sum) -> Site:
        owner = call.owner
        prefix = found.name.rpartition("#")[2] + "_"
        places = {slot: (owner, prefix + QUANTIZER_NAMES[slot]) for slot in (Slot.LEFT, Slot.RIGHT, Slot.OUTPUT)}
        left, right = _SIDES[found.first], _SIDES[1 - found.first]
        taps = [Tap(places[Slot.LEFT][1], left), Tap(places[Slot.RIGHT][1], right)]
        calls: dict[str, tuple[TappedCall, ...]] = {}
        outlet = self._outlet(found.events)
        if outlet is None:
            taps.append(Tap(places[Slot.OUTPUT][1], RESULT))
        else:
            child, tapped = self._tapped(outlet[0], prefix)
            places[Slot.OUTPUT] = (outlet[0].owner, child)
            calls[outlet[0].owner] = (tapped,)
        calls[owner] = (*calls.get(owner, ()), TappedCall(call.chain, tuple(taps)))
        why = found.why or self._why_unreachable(call)
        if why and any(event.func is Tensor.add_ for event in found.events):
            why = "it adds in place to what may be read under another name"
        facts = make_facts(
            found.name,
            "add",
            self.model.get_submodule(owner),
            {},
            slots=() if why else tuple(places),
            macs=0,
            obstacle=f"this sum has no quantizers: {why}" if why else "",
            adds=found.adds,
            activation=_described(outlet[0]) if outlet is not None else "",
        )
        return Site(facts, owner, calls={} if why else calls, places=places)


def _described(call: Call) -> str:
    """Where an activation is called: a module's path, and the function that it is written in."""
    return f"{call.owner or ROOT}#{call.chain.points[0].code.co_name}"
