"""The zoo: tiny random models of many architectures, each with one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zoo.language import LANGUAGE
from zoo.made import Case, enliven
from zoo.own import OWN
from zoo.vision import VISION

ZOO: dict[str, Callable[[], Case]] = {make.__name__: make for make in (*LANGUAGE, *VISION, *OWN)}


def made(name: str) -> Case:
    """A model of ``ZOO`` in evaluation mode, with its batch; the same bits each time."""
    torch.manual_seed(0)
    model, batch = ZOO[name]()
    return enliven(model), batch
