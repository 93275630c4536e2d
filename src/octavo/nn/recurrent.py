"""Recurrent layers: every matrix of an RNN, LSTM or GRU, and of their cells, is a site of its own.

Their kernels take all weights at once, but read each as an attribute first, where it is rounded. What flows between
the steps stays inside the kernel and has no quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from octavo.nn.site import Site, joined, make_facts
from octavo.nn.views import WeightView
from octavo.spec.facts import QUANTIZER_NAMES, Slot

OPERATION = "recurrent"


def is_recurrent(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's recurrent layers, or a cell of one."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase)


def recurrent_sites(
    path: str, module: nn.Module, parameters: Mapping[str, nn.Parameter], macs: Mapping[str, int] | None
) -> Iterator[Site]:
    """A site for every weight; biases belong to that of the weight beside them.

    Args:
        path: Of the module.
        module: One of which ``is_recurrent`` is true.
        parameters: Its parameters, by their keys.
        macs: Multiply-adds by site, ``None`` when no sample was traced.
    """
    weights = [name for name, p in module._parameters.items() if p is not None and name.startswith("weight_")]
    for name in weights:
        key, site = joined(path, name), joined(path, name)
        bias = joined(path, name.replace("weight_", "bias_"))
        parameter = parameters[key]
        view = WeightView(tuple(parameter.shape))
        facts = make_facts(
            site,
            OPERATION,
            module,
            {k: parameters[k] for k in (key, bias) if k in parameters},
            slots=(Slot.WEIGHT,),
            weight_shape=view.matrix_shape,
            weight_name=key,
            macs=None if macs is None else macs.get(site, 0),
        )
        place = {Slot.WEIGHT: (path, f"{name}_{QUANTIZER_NAMES[Slot.WEIGHT]}")}
        yield Site(facts, path, key, view, places=place, is_read=True)


def recurrent_macs(module: nn.Module, x: Tensor | None) -> dict[str, int]:
    """Multiply-adds of one call by name of the weight: each meets every step of every sequence once."""
    size: Any = module.input_size
    steps = 0 if x is None else x.numel() // int(size)
    return {
        name: steps * p.numel()
        for name, p in module._parameters.items()
        if p is not None and name.startswith("weight_")
    }


def refresh(module: nn.Module) -> None:
    """Make a recurrent layer forget the weights that it last computed with."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
