"""A quantized torch model as the stream of layers that exporters take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from octavo.nn.extras import INPUT_TRANSFORM, LOW_RANK, InputTransform, LowRank
from octavo.nn.layers import layer_kind
from octavo.nn.quantizer import ActivationQuantizer, Mode, Quantizer, WeightQuantizer
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot
from octavo.spec.facts import QUANTIZER_NAMES, Slot

_SLOT_OF = {name: slot for slot, name in QUANTIZER_NAMES.items()}


class TorchSnapshot:
    """``numerics.snapshot.Snapshot`` of a prepared and calibrated model; codes are made layer by layer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._aliases = self._find_aliases()

    def layers(self) -> Iterator[LayerSnapshot]:
        """See ``Snapshot.layers``."""
        for path, holder in self.model.named_modules():
            by_site: dict[str, dict[Slot, Quantizer]] = {}
            for child_name, child in holder._modules.items():
                if isinstance(child, Quantizer) and child.mode is not Mode.OFF:
                    site, _, _ = child.name.rpartition(".")
                    by_site.setdefault(site, {})[slot_of(child_name)] = child
            for site, quantizers in by_site.items():
                if site == (path or "(model)") or site.startswith(f"{path or '(model)'}#"):
                    yield self._layer(site, path, holder, quantizers)

    def _layer(self, site: str, path: str, holder: nn.Module, quantizers: Mapping[Slot, Quantizer]) -> LayerSnapshot:
        weight_quantizer = quantizers.get(Slot.WEIGHT)
        activations = {
            slot: ActivationScale(q.spec.format, q.spec.is_dynamic, q.scale, q.zero_point)
            for slot, q in quantizers.items()
            if isinstance(q, ActivationQuantizer)
        }
        memory = next((q.shared for q in quantizers.values() if isinstance(q, ActivationQuantizer) and q.shared), None)
        group = memory.name if memory is not None else ""
        kind = layer_kind(holder)
        operation = kind.operation if kind is not None else "linear" if weight_quantizer else "attention"
        if not isinstance(weight_quantizer, WeightQuantizer):
            return LayerSnapshot(site, operation, activations=activations, fusion_group=group)
        transform, branch = holder._modules.get(INPUT_TRANSFORM), holder._modules.get(LOW_RANK)
        key = weight_key(path, holder)
        return LayerSnapshot(
            site,
            operation,
            weight_name=key,
            weight=weight_quantizer.codes(self.model.get_parameter(key)),
            weight_shape=weight_quantizer.view.shape,
            is_transposed=weight_quantizer.view.is_transposed,
            activations=activations,
            pre_scale=transform.pre_scale if isinstance(transform, InputTransform) else None,
            input_rotation=transform.rotation if isinstance(transform, InputTransform) else 0,
            low_rank=(branch.a, branch.b) if isinstance(branch, LowRank) else None,
            fusion_group=group,
        )

    def quantized_keys(self) -> set[str]:
        """State-dict keys of the weights that become codes."""
        return {
            weight_key(path, holder)
            for path, holder in self.model.named_modules()
            for child in holder.children()
            if isinstance(child, WeightQuantizer) and child.mode is not Mode.OFF
        }

    def passthrough(self) -> Iterator[tuple[str, Tensor]]:
        """See ``Snapshot.passthrough``."""
        quantized = self.quantized_keys()
        for key, tensor in self._own_entries(keep_vars=False):
            if key not in quantized and key not in self._aliases:
                yield key, tensor

    def tied(self) -> Mapping[str, str]:
        """See ``Snapshot.tied``."""
        return self._aliases

    def _own_entries(self, *, keep_vars: bool) -> Iterator[tuple[str, Tensor]]:
        """State-dict entries that the model had before it was quantized."""
        modules = self.model.named_modules(remove_duplicate=False)
        prefixes = tuple(f"{path}." for path, m in modules if isinstance(m, (Quantizer, InputTransform, LowRank)))
        for key, tensor in self.model.state_dict(keep_vars=keep_vars).items():
            if not key.startswith(prefixes):
                yield key, tensor

    def _find_aliases(self) -> dict[str, str]:
        owners: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for key, tensor in self._own_entries(keep_vars=True):
            owner = owners.setdefault(id(tensor), key)
            if owner != key:
                aliases[key] = owner
        return aliases


def slot_of(child_name: str) -> Slot:
    """The slot of a quantizer by its name as a child; a second attention call's has ``_1`` behind it."""
    return _SLOT_OF.get(child_name) or _SLOT_OF[child_name.rpartition("_")[0]]


def weight_key(path: str, holder: nn.Module) -> str:
    """State-dict key of the weight that a weight quantizer under ``path`` serves.

    It is ``weight`` of the same module, or ``<name>_weight`` of the parent for a projection of
    ``nn.MultiheadAttention``.
    """
    return f"{path}.weight".strip(".") if "weight" in holder._parameters else f"{path}_weight"
