"""What an export layout is, and the table of those that work. To add one: a writer, a line here, a reader, a page."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from octavo.errors import UserError
from octavo.export.checkpoint import written_checkpoint
from octavo.export.modelopt import ModelOptExporter
from octavo.numerics.snapshot import Agreement, LayerSnapshot, Snapshot
from octavo.sources import LoadedModel
from octavo.spec.plan import Plan
from octavo.spec.steps import Step


class Exporter(Protocol):
    """Writes one layout."""

    @property
    def name(self) -> str:
        """What users call the layout."""
        ...

    def problems(self, plan: Plan) -> list[str]:
        """Why the layout cannot hold what is planned: layer, format, reason, way out. Asked before calibration."""
        ...

    def step_problems(self, plan: Plan, chosen: Mapping[Step, frozenset[str]]) -> list[str]:
        """Why the layout cannot hold what steps will leave beside layers; ``chosen`` has the sites of each step."""
        ...

    def folds_only(self, plan: Plan) -> frozenset[str]:
        """Sites beside which there is no place for a scale of the input: it is folded elsewhere, or not used."""
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


class ModelExporter(Protocol):
    """Writes a layout that is made from the model itself, because its tensors do not say what it computes."""

    @property
    def name(self) -> str:
        """What users call the layout."""
        ...

    def problems(self, plan: Plan) -> list[str]:
        """See ``Exporter.problems``."""
        ...

    def step_problems(self, plan: Plan, chosen: Mapping[Step, frozenset[str]]) -> list[str]:
        """See ``Exporter.step_problems``."""
        ...

    def folds_only(self, plan: Plan) -> frozenset[str]:
        """See ``Exporter.folds_only``."""
        ...

    def is_previous(self, directory: Path) -> bool:
        """Whether ``directory`` is an earlier checkpoint of this layout, which may be replaced."""
        ...

    def fill(
        self,
        directory: Path,
        loaded: LoadedModel,
        plan: Plan,
        layers: Iterable[LayerSnapshot],
        sample: Any,
        *,
        float_dtype: torch.dtype | None,
        use_cache: bool = True,
    ) -> None:
        """Write the files into ``directory``.

        Args:
            directory: There already; it appears under its final name afterwards.
            loaded: The model in simulated precision.
            plan: What was asked for, and for which target.
            layers: Its snapshot.
            sample: One batch for a traced forward.
            float_dtype: Type of everything that is not quantized; ``None``: as it is.
            use_cache: A decoder takes the keys and values of earlier tokens, where it can.

        Raises:
            UserError: the model cannot be traced or written.
        """
        ...

    def check(
        self,
        directory: Path,
        loaded: LoadedModel,
        layers: Iterable[LayerSnapshot],
        batches: Iterable[Any],
        unquantized: AbstractContextManager[None],
    ) -> list[Agreement]:
        """Hold the files in ``directory`` against the simulation.

        Args:
            directory: What ``fill`` wrote.
            loaded: The simulated model that it was written from.
            layers: Its snapshot.
            batches: Data to run both on; none compares weights only.
            unquantized: While open, ``loaded`` computes without quantizers.

        Raises:
            UserError: a file is missing, or nobody can run it.
        """
        ...


EXPORTERS: dict[str, Exporter] = {exporter.name: exporter for exporter in (ModelOptExporter(),)}


def written_from_model(
    writer: ModelExporter,
    loaded: LoadedModel,
    plan: Plan,
    layers: Iterable[LayerSnapshot],
    sample: Any,
    *,
    out: Path,
    float_dtype: torch.dtype | None,
    use_cache: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """The checkpoint ``out`` of a layout that needs the model, whole or not at all; see ``Exporter.write``."""
    with written_checkpoint(
        out,
        plan,
        kind=f"{article(writer.name)} checkpoint",
        is_previous=writer.is_previous,
        source_directory=loaded.directory,
        trust_remote_code=trust_remote_code,
    ) as partial:
        writer.fill(partial, loaded, plan, layers, sample, float_dtype=float_dtype, use_cache=use_cache)
    return out


def article(name: str) -> str:
    """``name`` with its indefinite article.

    >>> article("onnx"), article("modelopt")
    ('an onnx', 'a modelopt')
    """
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


AnyExporter = Exporter | ModelExporter
_Exporter = TypeVar("_Exporter", bound=AnyExporter)


def exporter(name: str, known: Mapping[str, _Exporter]) -> _Exporter:
    """The exporter of the layout called ``name`` among those that are ``known``.

    Raises:
        UserError: there is none; the message names the nearest and all others.
    """
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown layout {name!r}: {hint}layouts are {', '.join(known)}")
