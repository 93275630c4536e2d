"""A quantized torch model as the stream of layers that exporters take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from octavo.nn.batch_norms import has_bias_of_norm
from octavo.nn.extras import INPUT_TRANSFORM, LOW_RANK, InputTransform, LowRank
from octavo.nn.quantizer import ActivationQuantizer, Mode, Quantizer, WeightQuantizer
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot
from octavo.spec.facts import Slot


class TorchSnapshot:
    """``numerics.snapshot.Snapshot`` of a prepared and calibrated model; codes are made layer by layer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._aliases = self._find_aliases()

    def layers(self) -> Iterator[LayerSnapshot]:
        """See ``Snapshot.layers``."""
        by_site: dict[str, dict[Slot, Quantizer]] = {}
        holders: dict[str, nn.Module] = {}
        for holder in self.model.modules():
            for child in holder._modules.values():
                if isinstance(child, Quantizer) and child.mode is not Mode.OFF and child.slot is not None:
                    by_site.setdefault(child.site, {}).setdefault(child.slot, child)
                    if child.slot is Slot.WEIGHT:
                        holders.setdefault(child.site, holder)
        for site, quantizers in by_site.items():
            yield self._layer(site, quantizers, holders.get(site, self.model))

    def _layer(self, site: str, quantizers: Mapping[Slot, Quantizer], holder: nn.Module) -> LayerSnapshot:
        weight_quantizer = quantizers.get(Slot.WEIGHT)
        activations = {
            slot: ActivationScale(q.spec.format, q.spec.is_dynamic, q.scale, q.zero_point)
            for slot, q in quantizers.items()
            if isinstance(q, ActivationQuantizer)
        }
        memory = next((q.shared for q in quantizers.values() if isinstance(q, ActivationQuantizer) and q.shared), None)
        group = memory.name if memory is not None else ""
        operation = next(iter(quantizers.values())).operation
        if not isinstance(weight_quantizer, WeightQuantizer):
            return LayerSnapshot(site, operation, activations=activations, fusion_group=group)
        key, transform = weight_quantizer.key, self._transform(weight_quantizer, holder)
        branch = holder._modules.get(LOW_RANK) or holder._modules.get(f"{key.rpartition('.')[2]}_{LOW_RANK}")
        return LayerSnapshot(
            site,
            operation,
            weight_name=key,
            weight=weight_quantizer.codes(stored_parameter(self.model, key)),
            weight_shape=weight_quantizer.view.shape,
            is_transposed=weight_quantizer.view.is_transposed,
            activations=activations,
            pre_scale=transform.pre_scale if isinstance(transform, InputTransform) else None,
            input_rotation=transform.rotation if isinstance(transform, InputTransform) else 0,
            low_rank=(branch.a, branch.b) if isinstance(branch, LowRank) else None,
            fusion_group=group,
        )

    def _transform(self, quantizer: WeightQuantizer, holder: nn.Module) -> nn.Module | None:
        """What is done to the input of a weight: at its layer, or where a function is called."""
        if quantizer.input_place is None:
            return holder._modules.get(INPUT_TRANSFORM)
        path, child, _ = quantizer.input_place
        return self.model.get_submodule(path)._modules.get(child)

    def quantized_keys(self) -> set[str]:
        """State-dict keys of the weights that become codes, by every name that they have."""
        keys = {
            child.key
            for child in self.model.modules()
            if isinstance(child, WeightQuantizer) and child.mode is not Mode.OFF
        }
        owners = {self._aliases.get(key, key) for key in keys}
        return keys | owners | {alias for alias, owner in self._aliases.items() if owner in owners}

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
        modules = list(self.model.named_modules(remove_duplicate=False))
        prefixes = tuple(f"{path}." for path, m in modules if isinstance(m, (Quantizer, InputTransform, LowRank)))
        norms_have = {f"{path}.bias".strip(".") for path, m in modules if has_bias_of_norm(m)}
        for key, tensor in self.model.state_dict(keep_vars=keep_vars).items():
            if not key.startswith(prefixes) and key not in norms_have:
                yield key, tensor

    def _find_aliases(self) -> dict[str, str]:
        owners: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for key, tensor in self._own_entries(keep_vars=True):
            owner = owners.setdefault(id(tensor), key)
            if owner != key:
                aliases[key] = owner
        return aliases


def stored_parameter(model: nn.Module, key: str) -> nn.Parameter:
    """The parameter as it is stored, where reading it as an attribute may give its rounded values."""
    path, _, name = key.rpartition(".")
    parameter = model.get_submodule(path)._parameters[name]
    assert parameter is not None
    return parameter
