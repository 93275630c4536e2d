"""The sites of a torch model: every parameter in exactly one, every attention call in one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from octavo.errors import UserError
from octavo.nn.batch_norms import Fold, find_folds
from octavo.nn.experts import find_experts
from octavo.nn.functional import ROOT, claimed, functional_sites
from octavo.nn.layers import has_own_forward, is_sealed, layer_kind, obstacle, original_class
from octavo.nn.meetings import FUSED
from octavo.nn.parametrized import sources_of, weight_of
from octavo.nn.reach import with_reach
from octavo.nn.recurrent import is_recurrent, recurrent_sites
from octavo.nn.roles import with_role
from octavo.nn.site import Site, joined, make_facts
from octavo.nn.sums import Sums
from octavo.nn.trace import Trace, trace
from octavo.nn.views import WeightView
from octavo.spec.facts import ModelFacts, Slot

_MULTIHEAD_SLOTS = (Slot.QUERY, Slot.KEY, Slot.VALUE, Slot.SOFTMAX, Slot.ATTENTION_OUTPUT)
_NOT_TRACED = (
    "no sample was traced: attention calls, products written in functions and multiply-adds are unknown, and "
    "quantizers on them cannot be planned; give a sample of the model's inputs"
)


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
    folds = find_folds(model, seen)
    sites = list(_collect(model, seen, folds))
    if seen is not None:
        sums = Sums(model, seen, folds, sites)
        sites = _with_sums(sums.with_outlets(sites), sums.sites())
    sites = _share_inputs(_link_ties(model, sites))
    if seen is not None:
        sites = [replace(site, facts=with_reach(site.facts, site.module, seen)) for site in sites]
    experts = find_experts(model)
    sites = [replace(site, facts=with_role(site.facts, site.module, model, experts)) for site in sites]
    facts = ModelFacts(
        model=source,
        type_name=type(model).__name__,
        sites=tuple(site.facts for site in sites),
        num_parameters=sum(p.numel() for p in model.parameters()),
        total_bytes=sum(t.nbytes for t in _stored_tensors(model)),
        was_traced=seen is not None,
        notes=() if seen is not None else (_NOT_TRACED,),
        experts=tuple(layer.path for layer in experts),
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


def _with_sums(sites: list[Site], sums: list[Site]) -> list[Site]:
    """Sums behind the last site of the module that computes them, or in front of all others."""
    last = {site.module: index for index, site in enumerate(sites)}
    by_index: dict[int, list[Site]] = {}
    for found in sums:
        inside = [k for path, k in last.items() if path == found.module or path.startswith(joined(found.module, ""))]
        by_index.setdefault(max(inside, default=-1), []).append(found)
    return [*by_index.get(-1, []), *(s for k, site in enumerate(sites) for s in (site, *by_index.get(k, [])))]


def _collect(model: nn.Module, seen: Trace | None, folds: Mapping[str, Fold]) -> Iterator[Site]:
    """Sites in the order in which their modules first ran; every parameter in at least one."""
    modules = dict(model.named_modules())
    found = functional_sites(model, seen) if seen is not None else []
    if seen is not None:
        rank = {path: k for k, path in enumerate(seen.order)}
        modules = dict(sorted(modules.items(), key=lambda item: rank.get(item[0], len(rank))))
    keys, names = claimed(found), {site.facts.name for site in found}
    computed = {joined(path, name): path for path, module in modules.items() for name in sources_of(module)}
    for path, module in modules.items():
        runs_itself = seen is not None and is_sealed(module) and path in seen.order
        own = _own_parameters(path, module)
        parameters = own if runs_itself else {key: p for key, p in own.items() if key not in keys}
        parameters = {key: p for key, p in parameters.items() if computed.get(key, path) == path}
        if path not in names and (path or ROOT) not in names:
            yield from _module_sites(path, module, parameters, seen, folds.get(path))
        elif parameters:
            yield _other(f"{path or ROOT}#other", module, parameters, path, seen)
        yield from (site for site in found if site.module == path)


def _own_parameters(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    return {joined(path, name): p for name, p in module._parameters.items() if p is not None}


def _module_sites(
    path: str, module: nn.Module, parameters: dict[str, nn.Parameter], seen: Trace | None, fold: Fold | None
) -> Iterator[Site]:
    kind = layer_kind(module)
    is_inherited = seen is None or not has_own_forward(module) or path in seen.inherited
    if isinstance(module, nn.MultiheadAttention) and is_inherited:
        yield from _multihead_sites(path, module, parameters, seen)
    elif is_recurrent(module):
        yield from recurrent_sites(path, module, parameters, seen.macs if seen else None)
    elif kind is not None:
        reason = obstacle(module, kind)
        if reason and seen is not None and has_own_forward(module):
            reason = _unseen(path, seen)
        weight = weight_of(module)
        parameters = {**parameters, **{joined(path, name): p for name, p in sources_of(module).items()}}
        view = kind.view(weight) if weight is not None and Slot.WEIGHT in kind.slots else None
        key = joined(path, "weight") if view else ""
        facts = make_facts(
            path,
            kind.operation,
            module,
            parameters,
            slots=() if reason else kind.slots,
            weight_shape=view.matrix_shape if view else (),
            weight_name=key,
            macs=seen.macs.get(path, 0) if seen else None,
            obstacle=reason,
            folds_into=fold.layer if fold is not None else "",
            stays=fold.why_not if fold is not None else "",
        )
        if parameters or kind.operation != "norm" or fold is not None:
            reads = seen.reads.get(path, -1) if seen and kind.operation in ("linear", "conv") else -1
            yield Site(facts, path, key, view, is_read=_is_read_outside(key, seen), reads=reads)
    elif parameters:
        yield _other(path or ROOT, module, parameters, path, seen)


def _other(name: str, module: nn.Module, parameters: dict[str, nn.Parameter], path: str, seen: Trace | None) -> Site:
    """Parameters that meet no activation in a product."""
    if seen is None:
        why = "without a sample nobody knows how its parameters are used"
    else:
        uses = sorted({use for key in parameters for use in seen.uses.get(key, ())})
        why = (
            f"its parameters meet activations in no product (only in {', '.join(uses)})"
            if uses
            else _unseen(path, seen)
        )
    return Site(make_facts(name, "other", module, parameters, macs=0 if seen else None, obstacle=why), path)


def _unseen(path: str, seen: Trace) -> str:
    if path not in seen.order:
        return "the sample did not reach it"
    return "its parameters were not used in the traced forward, or in no product that octavo knows"


def _is_read_outside(key: str, seen: Trace | None) -> bool:
    return seen is not None and key in seen.read_outside


def _multihead_sites(
    path: str, module: nn.MultiheadAttention, parameters: dict[str, nn.Parameter], seen: Trace | None
) -> Iterator[Site]:
    reason = (
        f"{original_class(module).__name__} is a MultiheadAttention with a forward of its own: "
        "give a sample, or hand in its counterpart with octavo.register"
        if seen is None and has_own_forward(module)
        else ""
    )
    weights = {name: p for name, p in module._parameters.items() if p is not None and name.endswith("_weight")}
    for name, weight in weights.items():
        key, holder = joined(path, name), joined(path, name.removesuffix("_weight"))
        facts = make_facts(
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
        yield Site(replace(facts, type_name="Linear", base_types=()), holder, key, WeightView(tuple(weight.shape)))
    macs = seen.macs.get(path, 0) if seen else None
    slots = () if reason else _MULTIHEAD_SLOTS
    facts = make_facts(
        path or ROOT,
        "attention",
        module,
        parameters,
        slots=slots,
        macs=macs,
        obstacle=reason,
        fused_call=FUSED,
    )
    yield Site(facts, path)


def _link_ties(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Sites whose weight another site already holds: they follow it, and count no parameters.

    The owner is the layer that holds the weight and can quantize it, else the first site that can, else the first.
    """
    linked = []
    by_name = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}
    able = [site for site in sites if Slot.WEIGHT in site.facts.slots and site.weight in by_name]
    for site in sorted(able, key=lambda site: bool(site.calls) or site.weight.rpartition(".")[0] != site.module):
        owners.setdefault(id(by_name[site.weight]), site.facts.name)
    for site in sites:
        kept, tied_to = {}, ""
        for key, count in site.facts.parameters.items():
            owner = owners.setdefault(id(by_name[key]), site.facts.name)
            if owner == site.facts.name:
                kept[key] = count
            elif key == site.facts.weight_name:
                tied_to = owner
        if site.facts.operation == "other" and not kept:
            continue
        size = sum(by_name[key].nbytes for key in kept)
        linked.append(replace(site, facts=replace(site.facts, parameters=kept, parameter_bytes=size, tied_to=tied_to)))
    return linked


def _share_inputs(sites: list[Site]) -> list[Site]:
    """Name the layers that read the same tensor to each other."""
    readers: dict[int, list[str]] = {}
    for site in sites:
        if site.reads >= 0 and Slot.INPUT in site.facts.slots:
            readers.setdefault(site.reads, []).append(site.facts.name)
    groups = {name: tuple(names) for names in readers.values() if len(names) > 1 for name in names}
    result = []
    for site in sites:
        others = tuple(name for name in groups.get(site.facts.name, ()) if name != site.facts.name)
        result.append(replace(site, facts=replace(site.facts, shares_input_with=others)))
    return result
