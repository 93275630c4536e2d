"""octavo's own choices and its plain presets. See ``cell.py``."""

from __future__ import annotations

from benchmarks.peers.cell import Draw, Method, main
from torch import nn

FORMATS = {
    "int8": "int8",
    "int4-group128": "int4-group",
    "int4-group32": "int4-group32",
    "nvfp4-weight-only": "nvfp4-weight-only",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "w4a8": "w4a8",
}
"""Row of the table -> preset."""


def recipe(name: str) -> Method:
    """By a preset."""

    def quantize(model: nn.Module, draw: Draw) -> nn.Module:
        import octavo

        octavo.quantize(model, name, draw.batches)
        return model

    return quantize


METHODS: dict[str, Method] = {
    f"{row} {method}": recipe(prefix + preset)
    for row, preset in FORMATS.items()
    for method, prefix in (("plain", ""), ("best", "best:"))
}

if __name__ == "__main__":
    main("octavo", METHODS)
