"""Putting a plan's quantizers into a model, and taking them out again.

The model is changed in place: classes of the touched modules and new child modules, nothing else. What the way
back needs is in the classes (``octavo_original``), so it works on a deepcopy, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NoReturn

from torch import nn

from octavo.errors import UserError
from octavo.nn.attention import QuantMultiheadAttention, attention_class, child_name
from octavo.nn.extras import InputTransform, LowRank
from octavo.nn.layers import layer_kind, quantized_class
from octavo.nn.quantizer import ActivationQuantizer, Quantizer, SharedInput, WeightQuantizer, new_observer
from octavo.nn.rewrite import NoSourceError
from octavo.nn.sites import Site
from octavo.spec.facts import QUANTIZER_NAMES, Slot
from octavo.spec.plan import Decision, Plan

_MARK = "octavo_original"
_OURS = (Quantizer, InputTransform, LowRank)


def insert(model: nn.Module, plan: Plan, sites: Mapping[str, Site]) -> None:
    """Make every decision of ``plan`` true in ``model``. Nothing stays half done: an error takes all out again.

    Raises:
        UserError: the model has quantizers already, or an attention call cannot be reached.
    """
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise UserError("this model has octavo's quantizers already: take them out first with octavo.strip(model)")
    try:
        shared = _shared_inputs(plan)
        for decision in plan.decisions:
            if decision.scheme:
                _insert_one(model, decision, sites[decision.site.name], shared.get(decision.site.name))
        _follow_ties(model, plan, sites)
        _redirect_attention(model, plan, sites)
        _close_side_doors(model)
    except BaseException:
        strip(model)
        raise


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


def _insert_one(model: nn.Module, decision: Decision, site: Site, shared: SharedInput | None) -> None:
    module = _holder(model, site)
    device = next(chain(module.parameters(), model.parameters())).device
    for slot, spec in decision.scheme.items():
        name = f"{decision.site.name}.{QUANTIZER_NAMES[slot]}"
        quantizer: Quantizer
        if slot is Slot.WEIGHT:
            assert site.view is not None
            quantizer = WeightQuantizer(name, spec, site.view)
        else:
            quantizer = ActivationQuantizer(name, spec, shared if slot is Slot.INPUT else None)
        module.add_module(child_name(slot, site.ordinal), quantizer.to(device))


def _follow_ties(model: nn.Module, plan: Plan, sites: Mapping[str, Site]) -> None:
    """A layer that shares its weight with a quantized one computes with the same rounded weight."""
    quantized = {d.site.name for d in plan.decisions if Slot.WEIGHT in d.scheme}
    for site in sites.values():
        if site.facts.tied_to in quantized and site.weight and site.facts.slots:
            owner = model.get_submodule(sites[site.facts.tied_to].module)
            child = QUANTIZER_NAMES[Slot.WEIGHT]
            _holder(model, site).add_module(child, owner.get_submodule(child))


def _holder(model: nn.Module, site: Site) -> nn.Module:
    """The module that gets the quantizers, of its quantized class."""
    if site.weight not in ("", "weight"):  # a projection inside nn.MultiheadAttention
        path, _, name = site.module.rpartition(".")
        owner = model.get_submodule(path)
        _change_class(owner, QuantMultiheadAttention)
        if name not in owner._modules:
            owner.add_module(name, nn.Module())
        return owner.get_submodule(name)
    module = model.get_submodule(site.module)
    kind = layer_kind(module)
    if isinstance(module, nn.MultiheadAttention):
        _change_class(module, QuantMultiheadAttention)
    elif kind is not None:
        _change_class(module, quantized_class(type(module), kind.counterpart))
    return module


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if _MARK not in vars(type(module)):
        module.__class__ = cls


def _redirect_attention(model: nn.Module, plan: Plan, sites: Mapping[str, Site]) -> None:
    owners: dict[str, list[Site]] = {}
    for decision in plan.decisions:
        site = sites[decision.site.name]
        if decision.scheme and site.call is not None:
            owners.setdefault(site.module, []).append(site)
    for path, group in owners.items():
        module = model.get_submodule(path)
        try:
            cls = attention_class(type(module), tuple((s.ordinal, s.call) for s in group if s.call is not None))
        except NoSourceError as error:
            raise UserError(
                f"the attention call in '{path}' ({type(module).__name__}) cannot be reached: {error}; "
                f"leave it out with --leave '{path}', or hand in a counterpart with octavo.register"
            ) from error
        module.__class__ = cls


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
                _change_class(module, quantized_class(type(module), closed))
        if callable(getattr(type(module), "save_pretrained", None)):
            module.__dict__["save_pretrained"] = _refuse_save


def strip(model: nn.Module) -> None:
    """Take every quantizer out and give every module the class it had.

    Raises:
        UserError: the weights are packed codes.
    """
    if any("octavo_lowered" in vars(type(module)) for module in model.modules()):
        raise UserError(
            "a lowered model keeps codes only: its original weights are gone; load the original model again"
        )
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, _OURS) or (child is not None and _is_holder(child)):
                del module._modules[name]
        original = vars(type(module)).get(_MARK)
        if original is not None:
            module.__class__ = original
        module.__dict__.pop("save_pretrained", None)


def _is_holder(child: nn.Module) -> bool:
    """A plain module that was made to hold quantizers."""
    return type(child) is nn.Module and all(isinstance(m, _OURS) for m in child._modules.values())


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """Every quantizer of ``model``, in module order."""
    return (module for module in model.modules() if isinstance(module, Quantizer))
