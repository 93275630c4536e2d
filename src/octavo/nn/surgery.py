"""Putting a plan's quantizers into a model, and taking them out again.

The model is changed in place: classes of the touched modules and new child modules, nothing else. What the way
back needs is in the classes (``octavo_original``), so it works on a deepcopy, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, NoReturn

from torch import nn

from octavo.errors import UserError
from octavo.nn.batch_norms import FoldedNorm, fold, fold_again, unfold
from octavo.nn.changes import Change, changed_class
from octavo.nn.extras import InputTransform, LowRank
from octavo.nn.layers import has_own_forward, layer_kind
from octavo.nn.multihead import QuantMultiheadAttention
from octavo.nn.originals import give_back, require_way_back
from octavo.nn.parametrized import make_plain, restore, sources_of
from octavo.nn.quantizer import ActivationQuantizer, Quantizer, SharedInput, WeightQuantizer, new_observer
from octavo.nn.recurrent import refresh
from octavo.nn.site import Site, joined
from octavo.nn.ties import tie_again
from octavo.spec.facts import Slot
from octavo.spec.plan import Decision, Plan
from octavo.spec.select import quantizer_name
from octavo.spec.targets import Target, target_named

logger = logging.getLogger(__name__)
_MARK = "octavo_original"
_OURS = (Quantizer, InputTransform, LowRank)


def insert(model: nn.Module, plan: Plan, sites: Mapping[str, Site], *, is_folded: bool = False) -> None:
    """Make every decision of ``plan`` true in ``model``. Nothing stays half done: an error takes all out again.

    Args:
        model: Without quantizers.
        plan: For it.
        sites: By name.
        is_folded: The tensors are those of a run: norms that the plan folds are in their layers already.

    Raises:
        UserError: the model has quantizers already.
    """
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise UserError("this model has octavo's quantizers already: take them out first with octavo.strip(model)")
    unseen = [decision.site.name for decision in plan.decisions if decision.scheme and decision.site.name not in sites]
    if unseen:
        raise UserError(
            f"the plan has quantizers at '{unseen[0]}', and this model shows no such place: give a sample of its "
            "inputs (sample=...), since attention calls are found by a traced forward, or the model of the plan"
        )
    folds = {d.site.name: d.folded_into for d in plan.decisions if d.folded_into}
    planned = {d.site.name: _as_planned(d, sites[d.site.name], folds) for d in plan.decisions if d.site.name in sites}
    sites = {**sites, **planned}
    try:
        shared = _shared_inputs(plan)
        (fold_again if is_folded else fold)(model, folds)
        changes = dict.fromkeys(folds, Change(counterpart=FoldedNorm))
        for decision in plan.decisions:
            if decision.scheme:
                site = sites[decision.site.name]
                _insert_one(model, decision, site, shared.get(decision.site.name), target_named(plan.target))
                _note_changes(model, changes, site, decision.scheme)
        _follow_ties(model, plan, sites, changes)
        for path, change in changes.items():
            module = model.get_submodule(path)
            module.__class__ = changed_class(type(module), change)
        _close_side_doors(model)
        if any(decision.scheme and _is_stack(sites[decision.site.name]) for decision in plan.decisions):
            _keep_experts(model)
    except BaseException:
        take_out(model)
        raise


def _as_planned(decision: Decision, site: Site, folds: Mapping[str, str]) -> Site:
    """``site`` with its output rounded where the plan has it.

    Raises:
        UserError: that is behind a function that was not seen.
    """
    wanted = decision.site.activation
    if Slot.OUTPUT not in decision.scheme:
        return site
    if site.is_layer and (not wanted or (site.through and site.through not in folds)):
        return site.without_outlet()
    if wanted and site.facts.activation != wanted:
        raise UserError(
            f"the plan rounds the output of '{site.facts.name}' behind {wanted}, and this model shows no such place: "
            "give a sample of its inputs (sample=...), or the model of the plan"
        )
    return site


def _shared_inputs(plan: Plan) -> dict[str, SharedInput]:
    """One memory for the input quantizers of layers that read the same tensor in the same format."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for decision in plan.decisions:
        spec = decision.scheme.get(Slot.INPUT)
        if spec is not None and decision.site.shares_input_with:
            readers = frozenset((decision.site.name, *decision.site.shares_input_with))
            groups.setdefault((readers, spec), []).append(decision.site.name)
    return {
        name: memory
        for (_, spec), names in groups.items()
        if len(names) > 1
        for memory in [SharedInput(names[0], len(names), new_observer(spec))]
        for name in names
    }


def _insert_one(model: nn.Module, decision: Decision, site: Site, shared: SharedInput | None, target: Target) -> None:
    for slot, spec in decision.scheme.items():
        path, child = site.place(slot)
        home = _home(model, path)
        device = next(chain(home.parameters(), model.parameters())).device
        name = quantizer_name(decision.site.name, slot)
        quantizer: Quantizer
        if slot is Slot.WEIGHT:
            assert site.view is not None
            owner = model.get_submodule(site.weight.rpartition(".")[0])
            if sources_of(owner):
                make_plain(owner)
            quantizer = WeightQuantizer(name, spec, site.view, site.weight)
            quantizer.input_place = site.input_place
            quantizer.saturates = target.saturates_at(decision.site, decision.scheme)
        else:
            quantizer = ActivationQuantizer(name, spec, shared if slot is Slot.INPUT else None)
            if slot is Slot.SOFTMAX:
                quantizer.fix_range(0.0, 1.0)
        quantizer.site, quantizer.slot, quantizer.operation = decision.site.name, slot, decision.site.operation
        home.add_module(child, quantizer.to(device))


def _home(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``; a projection inside ``nn.MultiheadAttention`` gets one to hold its quantizers."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if path and name not in owner._modules:
        owner.add_module(name, nn.Module())
    return model.get_submodule(path)


def _note_changes(model: nn.Module, changes: dict[str, Change], site: Site, slots: Iterable[Slot]) -> None:
    """What the site's modules become, added to what other sites make of them."""

    def add(path: str, **more: Any) -> None:
        known = changes.get(path, Change())
        changes[path] = replace(known, **more)

    for path, calls in site.calls.items() if not site.is_layer or Slot.OUTPUT in slots else ():
        add(path, calls=(*changes.get(path, Change()).calls, *calls))
    if site.is_read and Slot.WEIGHT in slots:
        path, _, name = site.weight.rpartition(".")
        add(path, reads=(*changes.get(path, Change()).reads, (name, site.place(Slot.WEIGHT)[1])))
    if not site.calls or site.is_layer:
        owner, module = _computing_module(model, site)
        kind = layer_kind(module)
        if isinstance(module, nn.MultiheadAttention):
            add(owner, counterpart=QuantMultiheadAttention, is_below=has_own_forward(module))
        elif kind is not None and not has_own_forward(module):
            add(owner, counterpart=kind.counterpart)


def _computing_module(model: nn.Module, site: Site) -> tuple[str, nn.Module]:
    if site.weight and not site.is_read:
        path = site.weight.rpartition(".")[0]
        return path, model.get_submodule(path)
    return site.module, model.get_submodule(site.module)


def _follow_ties(model: nn.Module, plan: Plan, sites: Mapping[str, Site], changes: dict[str, Change]) -> None:
    """A layer that shares its weight with a quantized one computes with the same rounded weight."""
    quantized = {d.site.name for d in plan.decisions if Slot.WEIGHT in d.scheme}
    for site in sites.values():
        if site.facts.tied_to in quantized and site.weight and site.facts.slots:
            path, child = sites[site.facts.tied_to].place(Slot.WEIGHT)
            quantizer = model.get_submodule(joined(path, child))
            path, child = site.place(Slot.WEIGHT)
            _home(model, path).add_module(child, quantizer)
            _note_changes(model, changes, replace(site, calls={}) if site.is_read else site, [Slot.WEIGHT])


class _NoFastPath(nn.TransformerEncoderLayer):
    """Sends ``nn.TransformerEncoderLayer`` (and the encoder that asks it) through its modules."""

    activation_relu_or_gelu = property(lambda self: 0, lambda self, value: None)


class _NoNestedTensors(nn.TransformerEncoder):
    """Keeps a padded batch a plain tensor: torch packs it only for the fused layers, and nothing rounds packed ones."""

    use_nested_tensor = property(lambda self: False, lambda self, value: None)


def _refuse_save(*args: object, **kwargs: object) -> NoReturn:
    raise UserError(
        "save_pretrained would write simulated weights as if they were the model's own: write the quantized model with "
        "octavo.save(run, path) or octavo.export(run, path, layout=...), or call octavo.strip(model) first"
    )


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: _NoFastPath,
    nn.TransformerEncoder: _NoNestedTensors,
}


def _close_side_doors(model: nn.Module) -> None:
    """Ways around the quantizers: torch's fused encoder layer, and saving as if nothing had happened."""
    for module in model.modules():
        for base, closed in _FUSED.items():
            if isinstance(module, base) and any(isinstance(m, Quantizer) for m in module.modules()):
                module.__class__ = changed_class(type(module), Change(counterpart=closed))
        if callable(getattr(type(module), "save_pretrained", None)):
            module.__dict__["save_pretrained"] = _refuse_save


def _is_stack(site: Site) -> bool:
    return site.view is not None and site.view.num_stacked > 0


def _keep_experts(model: nn.Module) -> None:
    """What was quantized are the calls of one implementation of transformers' experts; ``generate`` may set another."""
    for module in model.modules():
        if callable(getattr(type(module), "set_experts_implementation", None)):
            module.__dict__["set_experts_implementation"] = _stay


def _stay(*args: object, **kwargs: object) -> None:
    logger.warning(
        "the implementation of experts stays: quantizers are at the calls of the one that was quantized; "
        "to quantize another one, set it before octavo.quantize, or call octavo.strip(model) first"
    )


def strip(model: nn.Module) -> None:
    """Take every quantizer out and give every module the class, hooks, attributes and weights that it had.

    Raises:
        UserError: the weights are packed codes, or were changed by steps of the recipe and are not kept.
    """
    if any("octavo_lowered" in vars(type(module)) for module in model.modules()):
        raise UserError(
            "a lowered model keeps codes only: its original weights are gone; load the original model again"
        )
    require_way_back(model)
    give_back(model)
    take_out(model)
    tie_again(model)


def take_out(model: nn.Module) -> None:
    """Take every quantizer out, whatever became of the weights."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, _OURS) or (child is not None and _is_holder(child)):
                del module._modules[name]
        original = vars(type(module)).get(_MARK)
        if original is not None:
            module.__class__ = original
            refresh(module)
        unfold(module)
        restore(module)
        module.__dict__.pop("save_pretrained", None)
        module.__dict__.pop("set_experts_implementation", None)


def _is_holder(child: nn.Module) -> bool:
    """A plain module that was made to hold quantizers."""
    return type(child) is nn.Module and all(isinstance(m, _OURS) for m in child._modules.values())


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """Every quantizer of ``model``, in module order."""
    return (module for module in model.modules() if isinstance(module, Quantizer))
