"""How near a quantized model's outputs are to the unquantized model's, on any data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.evaluate.metrics import Measure
from octavo.evaluate.outputs import MAX_KEPT, Outputs, compare, rows_of
from octavo.evaluate.passes import Options, embed_all_pictures, embed_all_texts
from octavo.sources import DataKind, Dataset, LoadedModel, ModelKind, batches, check_fit, check_inputs, logits

_ENCODERS = (ModelKind.DUAL_ENCODER, ModelKind.TEXT_ENCODER, ModelKind.IMAGE_ENCODER)


@dataclass(frozen=True)
class Fidelity:
    """Embeddings where the model has them, else logits, of everything in ``data``.

    Of a plain module whatever it returns first is compared, and is not taken for logits.
    """

    name: str
    data: Dataset
    options: Options = field(default_factory=Options)
    kind: ClassVar[str] = "fidelity"

    def check(self, loaded: LoadedModel) -> None:
        """Raise ``UserError`` when the data has nothing that ``loaded`` takes."""
        uses_texts, uses_pictures = self._uses(loaded)
        if loaded.kind is ModelKind.DUAL_ENCODER and (uses_texts or uses_pictures):
            check_inputs(loaded, texts=uses_texts, pictures=uses_pictures, needed_by=f"task '{self.name}'")
        else:
            check_fit(self.data, loaded)

    def outputs(self, loaded: LoadedModel) -> Outputs:
        """One pass over the data."""
        self.check(loaded)
        if loaded.kind in _ENCODERS and self.data.kind not in (DataKind.BATCHES, DataKind.ARRAYS):
            return Outputs(torch.split(self._embeddings(loaded), 1), are_logits=False)
        return Outputs(tuple(self._logits(loaded)), are_logits=loaded.kind is not ModelKind.MODULE)

    def evaluate(self, loaded: LoadedModel, reference: Outputs | None = None) -> dict[str, Measure]:
        """``cosine``, ``sqnr_db``, and of logits ``kl`` and ``top1_agreement``.

        Raises:
            UserError: without the unquantized model's outputs.
        """
        if reference is None:
            raise UserError(
                f"task '{self.name}': fidelity compares with the unquantized model, whose outputs are not there; "
                "it is measured while a model is quantized"
            )
        return compare(self.outputs(loaded), reference)

    def _uses(self, loaded: LoadedModel) -> tuple[bool, bool]:
        """Which of the data's texts and pictures ``loaded`` takes."""
        has = self.data.kind
        return has.has_texts and loaded.kind.takes_texts, has.has_images and loaded.kind.takes_pictures

    def _embeddings(self, loaded: LoadedModel) -> Tensor:
        """``(N, dim)``: texts first, pictures after them."""
        uses_texts, uses_pictures = self._uses(loaded)
        samples = self.data.samples
        found = []
        if uses_texts:
            found.append(embed_all_texts(loaded, [text for s in samples for text in s.texts], self.options))
        if uses_pictures:
            found.append(embed_all_pictures(loaded, samples, range(len(samples)), self.options))
        return torch.cat(found)

    @torch.inference_mode()
    def _logits(self, loaded: LoadedModel) -> list[Tensor]:
        """Row blocks of all samples; of long outputs as many as ``MAX_KEPT`` allows. The order is always the same."""
        options = self.options
        runs = batches(self.data, loaded, batch_size=options.batch_size, max_length=options.max_length, seed=0)
        blocks: list[Tensor] = []
        kept = 0
        for inputs in runs:
            values = logits(loaded, inputs)
            width = values.shape[-1] if values.ndim == 3 else values[0].numel()
            found = rows_of(values, inputs, places_each=max(1, MAX_KEPT // (width * runs.num_samples)))
            blocks += found
            kept += sum(block.numel() for block in found)
            if kept >= MAX_KEPT:
                break
        return blocks
