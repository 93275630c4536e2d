"""What ``octavo formats`` shows, computed when it is asked for: errors by rounding, layouts by asking their writers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.export.base import EXPORTERS
from octavo.export.modelopt_labels import from_decision, label_of
from octavo.numerics.qtensor import fake_quantize
from octavo.report.formats import Carrier, FormatRow
from octavo.spec.facts import ModelFacts, SiteFacts, Slot
from octavo.spec.formats import FORMATS, tensor_format
from octavo.spec.plan import Decision, Plan, QuantizerSpec
from octavo.spec.rule import slot_rule
from octavo.spec.tensor_format import TensorFormat

_SHAPE = (256, 1024)
_INPUTS = ("", "e4m3-tensor", "int8-tensor", "e4m3-token", "int8-token", "e4m3-group128-padded")
_READERS: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": ("vllm", "transformers"),
    "gptq": ("vllm", "transformers"),
    "awq": ("vllm", "transformers"),
    "gguf": ("llama.cpp", "transformers"),
    "bitsandbytes": ("transformers",),
}
"""Engines that load a layout, whatever is in it."""
_MODELOPT_VLLM = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8")
"""Labels of the modelopt layout that vllm loads; tensorrt-llm loads all of them."""


def format_rows(pattern: str = "*") -> list[FormatRow]:
    """Rows of the formats whose names match the glob ``pattern``.

    Raises:
        UserError: none does.
    """
    names = [name for name in FORMATS if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        tensor_format(pattern)  # names the nearest
    normal, heavy = _normal(), _heavy_tailed()
    return [
        FormatRow(
            name,
            FORMATS[name],
            FORMATS[name].bits_per_element((4096, 4096)),
            relative_error(normal, FORMATS[name]),
            relative_error(heavy, FORMATS[name]),
            tuple(_carriers(name, FORMATS[name])),
        )
        for name in names
    ]


def relative_error(x: Tensor, fmt: TensorFormat) -> float:
    """Norm of what rounding to ``fmt`` changes, over the norm of ``x``."""
    return float((fake_quantize(x, fmt) - x).norm() / x.norm())


def _normal() -> Tensor:
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))


def _heavy_tailed() -> Tensor:
    """Student's t with five degrees of freedom: a normal value over the root of a mean of five squares."""
    parts = torch.randn((6, *_SHAPE), generator=torch.Generator().manual_seed(1))
    return parts[0] / parts[1:].square().mean(0).sqrt()


def _carriers(name: str, fmt: TensorFormat) -> Iterator[Carrier]:
    for layout, exporter in EXPORTERS.items():
        held, runtimes = [], dict[str, None]()
        for inputs in dict.fromkeys((*_INPUTS, name)):
            decision = _decision(fmt, inputs)
            if decision is not None and not exporter.problems(_plan(decision)):
                held.append(inputs or "unquantized")
                runtimes |= dict.fromkeys(_runtimes(layout, decision))
        if held:
            yield Carrier(layout, tuple(held), tuple(runtimes))


def _decision(fmt: TensorFormat, inputs: str) -> Decision | None:
    """A linear layer with weights of ``fmt`` and these inputs; ``None`` for what no recipe can ask for."""
    slots = (Slot.WEIGHT, Slot.INPUT) if inputs else (Slot.WEIGHT,)
    try:
        rules = {slot: slot_rule(slot, fmt if slot is Slot.WEIGHT else inputs) for slot in slots}
    except UserError:
        return None
    weights = {"layer.weight": _SHAPE[0] * _SHAPE[1]}
    site = SiteFacts(
        "layer", "linear", "Linear", slots, (), _SHAPE, weights, 4 * weights["layer.weight"], "layer.weight"
    )
    return Decision(site, {slot: QuantizerSpec(rule.format, rule.is_dynamic) for slot, rule in rules.items()})


def _plan(decision: Decision) -> Plan:
    site = decision.site
    facts = ModelFacts("a layer", "Linear", (site,), site.num_weights, site.parameter_bytes, was_traced=False)
    return Plan(facts, "formats", (decision,))


def _runtimes(layout: str, decision: Decision) -> tuple[str, ...]:
    if layout != "modelopt":
        return _READERS.get(layout, ())
    label = label_of(from_decision(decision))
    return ("vllm", "tensorrt-llm") if label is not None and label.algorithm in _MODELOPT_VLLM else ("tensorrt-llm",)
