"""What a model said about many samples, kept to be compared with what it says later.

Shapes: P places of one sample (1 for an embedding, tokens for a language model), D channels or vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.evaluate.metrics import (
    Measure,
    agreement_of_rows,
    cosine,
    kl_of_rows,
    mean_of,
    ratio_of_sums,
    sqnr_db,
)

MAX_KEPT = 1 << 27
"""Numbers kept of all logits together (fp32: 512 MiB): evenly spaced tokens of every text."""


@dataclass(frozen=True)
class Outputs:
    """``rows``: one ``(P, D)`` tensor for each sample. ``are_logits``: their softmax means something."""

    rows: tuple[Tensor, ...]
    are_logits: bool


def compare(outputs: Outputs, reference: Outputs) -> dict[str, Measure]:
    """How near ``outputs`` are to ``reference``, from the same samples.

    ``cosine`` and ``sqnr_db`` always; of logits also ``kl`` and ``top1_agreement``, means over the places.
    """
    if all(len(row) == 1 for row in reference.rows):
        values, wanted = torch.cat(outputs.rows), torch.cat(reference.rows)
        measures = {"cosine": cosine(values, wanted), "sqnr_db": sqnr_db(values, wanted)}
        if outputs.are_logits:
            measures["kl"] = mean_of(kl_of_rows(values, wanted))
            measures["top1_agreement"] = mean_of(agreement_of_rows(values, wanted))
        return measures
    return _compare_places(outputs, reference)


def _compare_places(outputs: Outputs, reference: Outputs) -> dict[str, Measure]:
    pairs = list(zip(outputs.rows, reference.rows, strict=True))
    places = torch.tensor([float(len(row)) for row in reference.rows])

    def mean_over_places(scores: list[Tensor]) -> Measure:
        return ratio_of_sums(torch.stack([score.sum() for score in scores]), places)

    measures = {
        "cosine": mean_over_places([cosine(values, wanted).scores for values, wanted in pairs]),
        "sqnr_db": _sqnr_of_samples(pairs),
    }
    if outputs.are_logits:
        measures["kl"] = mean_over_places([kl_of_rows(values, wanted) for values, wanted in pairs])
        measures["top1_agreement"] = mean_over_places([agreement_of_rows(values, wanted) for values, wanted in pairs])
    return measures


def _sqnr_of_samples(pairs: list[tuple[Tensor, Tensor]]) -> Measure:
    """Only energies matter, so each sample is one row with its signal and its noise in it."""
    signal = torch.stack([wanted.double().norm() for _, wanted in pairs])
    noise = torch.stack([(values.double() - wanted.double()).norm() for values, wanted in pairs])
    none = torch.zeros_like(signal)
    return sqnr_db(torch.stack([signal, noise], dim=1), torch.stack([signal, none], dim=1))


def rows_of(values: Tensor, inputs: Any, *, places_each: int) -> list[Tensor]:
    """One ``(P, D)`` fp32 row block for each sample of a batch of outputs.

    Args:
        values: ``(B, D)``, ``(B, T, D)`` of tokens, or ``(B, ...)``, which is flattened.
        inputs: the batch; its mask says which tokens are real.
        places_each: at most so many tokens of one sample, evenly spaced.
    """
    if values.ndim != 3:
        return list(torch.split(values.flatten(1).float().cpu(), 1))
    mask_BT = _token_mask(inputs, values)
    blocks = []
    for tokens_TD, mask_T in zip(values, mask_BT, strict=True):
        places = mask_T.nonzero().squeeze(1)
        if len(places) > places_each:
            places = places[torch.linspace(0, len(places) - 1, places_each, device=places.device).round().long()]
        blocks.append(tokens_TD[places].float().cpu())
    return blocks


def _token_mask(inputs: Any, values: Tensor) -> Tensor:
    """``(B, T)``: 1 where ``values`` belong to a real token; all of them when nothing says otherwise."""
    mask: Tensor | None = (
        inputs.get("attention_mask") if isinstance(inputs, Mapping) and "decoder_input_ids" not in inputs else None
    )
    if mask is None or mask.shape != values.shape[:2]:
        return torch.ones(values.shape[:2], dtype=torch.long, device=values.device)
    return mask.to(values.device)
