"""The sites of a torch model: every parameter in exactly one, every attention call in one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from octavo.errors import UserError
from octavo.nn.attention import ATTENTION_SLOTS
from octavo.nn.layers import layer_kind, obstacle
from octavo.nn.reach import with_reach
from octavo.nn.trace import AttentionCall, Trace, trace
from octavo.nn.views import WeightView
from octavo.spec.facts import ModelFacts, SiteFacts, Slot

_NOT_TRACED = (
    "no sample was traced: attention calls and multiply-adds are unknown, and quantizers on them cannot be planned; "
    "give a sample of the model's inputs"
)


@dataclass(frozen=True, slots=True)
class Site:
    """Facts, and where in the module tree they live.

    Args:
        facts: What the plan sees.
        module: Path of the module that gets the quantizers.
        weight: Name of the weight among that module's parameters, empty for none.
        view: The weight as a matrix.
        call: The attention call, for a site of that kind found by observation.
        ordinal: Which of the owner's attention calls it is.
    """

    facts: SiteFacts
    module: str
    weight: str = ""
    view: WeightView | None = None
    call: AttentionCall | None = None
    ordinal: int = 0


def find_sites(model: nn.Module, source: str, run: Callable[[], Any] | None) -> tuple[ModelFacts, list[Site]]:
    """Everything ``resolve`` and surgery need to know of ``model``.

    Args:
        model: Any module with real, initialised parameters.
        source: What the user called it.
        run: One forward pass on a sample; ``None`` when there is none.

    Raises:
        UserError: parameters on the meta device, not yet initialised, or none at all.
    """
    _check_parameters(model)
    seen = trace(model, run) if run is not None else None
    sites = list(_collect(model, seen))
    sites = _share_inputs(_link_ties(model, sites), seen)
    if seen is not None:
        sites = [replace(site, facts=with_reach(site.facts, site.module, seen)) for site in sites]
    facts = ModelFacts(
        model=source,
        type_name=type(model).__name__,
        sites=tuple(site.facts for site in sites),
        num_parameters=sum(p.numel() for p in model.parameters()),
        total_bytes=sum(t.nbytes for t in _stored_tensors(model)),
        was_traced=seen is not None,
        notes=() if seen is not None else (_NOT_TRACED,),
    )
    return facts, sites


def _stored_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and persistent buffers, shared ones once."""
    return list({id(t): t for t in model.state_dict(keep_vars=True).values()}.values())


def _check_parameters(model: nn.Module) -> None:
    empty = True
    for name, parameter in model.named_parameters():
        empty = False
        if isinstance(parameter, UninitializedParameter):
            raise UserError(
                f"parameter '{name}' is not initialised yet: run one forward pass of the lazy modules first"
            )
        if parameter.is_meta:
            raise UserError(
                f"parameter '{name}' is on the meta device: load the weights first (to_empty, load_state_dict)"
            )
    if empty:
        raise UserError(f"{type(model).__name__} has no parameters: there is nothing to quantize")


def _collect(model: nn.Module, seen: Trace | None) -> Iterator[Site]:
    modules = dict(model.named_modules())
    if seen is not None:
        rank = {path: k for k, path in enumerate(seen.order)}
        modules = dict(sorted(modules.items(), key=lambda item: rank.get(item[0], len(rank))))
    calls: dict[str, list[AttentionCall]] = {}
    for call in seen.attention if seen else ():
        calls.setdefault(call.owner, []).append(call)
    for path, module in modules.items():
        yield from _module_sites(path, module, seen)
        for ordinal, call in enumerate(calls.get(path, ())):
            assert seen is not None
            yield _attention_site(path, module, call, ordinal, seen)


def _base_types(module: nn.Module) -> tuple[str, ...]:
    own = getattr(type(module), "octavo_original", type(module))
    return tuple(base.__name__ for base in own.__mro__[1:] if issubclass(base, nn.Module) and base is not nn.Module)


def _facts(name: str, operation: str, module: nn.Module, parameters: dict[str, nn.Parameter], **more: Any) -> SiteFacts:
    own = getattr(type(module), "octavo_original", type(module))
    return SiteFacts(
        name=name,
        operation=operation,
        type_name=own.__name__,
        base_types=_base_types(module),
        parameters={key: p.numel() for key, p in parameters.items()},
        parameter_bytes=sum(p.nbytes for p in parameters.values()),
        **more,
    )


def _own_parameters(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    prefix = f"{path}." if path else ""
    return {prefix + name: p for name, p in module._parameters.items() if p is not None}


def _module_sites(path: str, module: nn.Module, seen: Trace | None) -> Iterator[Site]:
    parameters = _own_parameters(path, module)
    kind = layer_kind(module)
    if isinstance(module, nn.MultiheadAttention):
        yield from _multihead_sites(path, module, parameters, seen)
    elif kind is not None:
        reason = obstacle(module, kind) or _read_outside(path, seen)
        weight = module._parameters.get("weight")
        view = kind.view(weight) if weight is not None and kind.operation != "norm" else None
        facts = _facts(
            path,
            kind.operation,
            module,
            parameters,
            slots=() if reason else kind.slots,
            weight_shape=view.matrix_shape if view else (),
            weight_name=_joined(path, "weight") if view else "",
            macs=seen.macs.get(path, 0) if seen else None,
            obstacle=reason,
        )
        if parameters or kind.operation != "norm":
            yield Site(facts, path, "weight" if view else "", view)
    elif parameters or (seen is not None and _loose_products(path, seen)):
        why = (
            "its parameters are used outside of the layers that octavo quantizes"
            if parameters
            else ("a product of two activations outside of attention")
        )
        macs = _loose_products(path, seen) if seen else None
        yield Site(_facts(path or "(model)", "other", module, parameters, macs=macs, obstacle=why), path)


def _read_outside(path: str, seen: Trace | None) -> str:
    if seen is None or _joined(path, "weight") not in seen.read_outside:
        return ""
    return "its weight is also read outside of its own forward, where no quantizer would see it"


def _loose_products(path: str, seen: Trace) -> int:
    """Products of two activations that are not an attention call's own."""
    if any(call.owner == path and call.is_interface for call in seen.attention):
        return 0
    return seen.products.get(path, 0)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _multihead_sites(
    path: str, module: nn.MultiheadAttention, parameters: dict[str, nn.Parameter], seen: Trace | None
) -> Iterator[Site]:
    own = getattr(type(module), "octavo_original", type(module))
    reason = (
        ""
        if own.forward is nn.MultiheadAttention.forward
        else (
            f"{own.__name__} is a MultiheadAttention with a forward of its own: "
            "hand in its counterpart with octavo.register"
        )
    )
    weights = {name: p for name, p in module._parameters.items() if p is not None and name.endswith("_weight")}
    for name, weight in weights.items():
        key, holder = _joined(path, name), _joined(path, name.removesuffix("_weight"))
        facts = _facts(
            holder,
            "linear",
            module,
            {key: parameters.pop(key)},
            slots=() if reason else (Slot.WEIGHT, Slot.INPUT),
            weight_shape=tuple(weight.shape),
            weight_name=key,
            macs=seen.macs.get(holder, 0) if seen else None,
            obstacle=reason,
        )
        yield Site(replace(facts, type_name="Linear", base_types=()), holder, name, WeightView(tuple(weight.shape)))
    macs = seen.macs.get(path, 0) if seen else None
    slots = () if reason else ATTENTION_SLOTS
    facts = _facts(path or "(model)", "attention", module, parameters, slots=slots, macs=macs, obstacle=reason)
    yield Site(facts, path)


def _attention_site(path: str, module: nn.Module, call: AttentionCall, ordinal: int, seen: Trace) -> Site:
    name = (path or "(model)") + (f"#{ordinal}" if ordinal else "")
    facts = _facts(name, "attention", module, {}, slots=ATTENTION_SLOTS, macs=seen.attention[call])
    return Site(facts, path, call=call, ordinal=ordinal)


def _link_ties(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Sites whose weight another site already holds: they follow it, and count no parameters."""
    owners: dict[int, str] = {}
    linked = []
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for site in sites:
        kept, tied_to = {}, ""
        for key, count in site.facts.parameters.items():
            owner = owners.setdefault(id(by_name[key]), site.facts.name)
            if owner == site.facts.name:
                kept[key] = count
            elif key == site.facts.weight_name:
                tied_to = owner
        size = sum(by_name[key].nbytes for key in kept)
        linked.append(replace(site, facts=replace(site.facts, parameters=kept, parameter_bytes=size, tied_to=tied_to)))
    return linked


def _share_inputs(sites: list[Site], seen: Trace | None) -> list[Site]:
    """Name the layers that read the same tensor to each other."""
    if seen is None:
        return sites
    readers: dict[int, list[str]] = {}
    for site in sites:
        number = seen.reads.get(site.module)
        if number is not None and site.facts.operation == "linear" and site.weight == "weight":
            readers.setdefault(number, []).append(site.facts.name)
    groups = {name: tuple(names) for names in readers.values() if len(names) > 1 for name in names}
    result = []
    for site in sites:
        others = tuple(name for name in groups.get(site.facts.name, ()) if name != site.facts.name)
        result.append(replace(site, facts=replace(site.facts, shares_input_with=others)))
    return result
