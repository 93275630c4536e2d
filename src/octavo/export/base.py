"""What an export layout is, and the table of those that work. To add one: a writer, a line here, a reader, a page."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Protocol

import torch

from octavo.errors import UserError
from octavo.export.modelopt import ModelOptExporter
from octavo.numerics.snapshot import Snapshot
from octavo.spec.plan import Plan


class Exporter(Protocol):
    """Writes one layout."""

    @property
    def name(self) -> str:
        """What users call the layout."""
        ...

    def problems(self, plan: Plan) -> list[str]:
        """Why the layout cannot hold what is planned: layer, format, reason, way out. Asked before calibration."""
        ...

    def write(
        self,
        snapshot: Snapshot,
        plan: Plan,
        *,
        source_directory: Path | None,
        out: Path,
        float_dtype: torch.dtype | None,
        trust_remote_code: bool = False,
    ) -> Path:
        """Write the checkpoint ``out``, whole or not at all.

        Args:
            snapshot: The quantized model, or a run that was read back.
            plan: What was asked for.
            source_directory: Where the model's own files lie; ``None`` for a model without a directory.
            out: Final name; an earlier checkpoint of the same layout is replaced at the very end.
            float_dtype: What floating tensors that stay unquantized are cast to; ``None``: as they are.
            trust_remote_code: Copy the model's Python files, too.

        Raises:
            UserError: a layer the layout cannot hold, ``out`` holds something else, or the disk is too small.
        """
        ...


EXPORTERS: dict[str, Exporter] = {exporter.name: exporter for exporter in (ModelOptExporter(),)}


def exporter(name: str) -> Exporter:
    """The exporter of the layout called ``name``.

    Raises:
        UserError: there is none; the message names the nearest and all others.
    """
    if name in EXPORTERS:
        return EXPORTERS[name]
    near = difflib.get_close_matches(name, EXPORTERS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown layout {name!r}: {hint}layouts are {', '.join(EXPORTERS)}")
