"""Measures of quality, each with its standard error. Pure functions of tensors.

Shapes: N samples, D channels, K classes, P places (tokens), V vocabulary.

Every measure keeps one score for each sample. Their mean is the value and their spread its standard error; where a
measure is no mean (perplexity, SQNR) the score is its first-order share, so that both still hold ("influence
functions", or the delta method). The difference of two runs on the same samples is then a paired comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

LOWER_IS_BETTER = frozenset({"perplexity", "bits_per_byte", "kl"})
"""Measures that are better when they are lower; all others are better when they are higher."""

_CHUNK = 1024
_PLACES = 64


@dataclass(frozen=True)
class Measure:
    """A value, its standard error (NaN for a single sample) and the number of samples.

    ``scores``, ``(count,)`` fp64, have the value as their mean.
    """

    value: float
    standard_error: float
    count: int
    scores: Tensor = field(repr=False, compare=False)


def mean_of(scores: Tensor) -> Measure:
    """The mean of ``(count,)`` scores.

    >>> mean_of(torch.tensor([1.0, 0.0, 1.0, 0.0])).value
    0.5
    """
    scores = scores.detach().double().cpu()
    return Measure(float(scores.mean()), _standard_error(scores), len(scores), scores)


def difference(measure: Measure, baseline: Measure) -> Measure:
    """``measure - baseline`` on the same samples, with the standard error of paired samples.

    Raises:
        ValueError: the two do not have the same number of samples.
    """
    if measure.count != baseline.count:
        raise ValueError(f"a paired difference needs the same samples: {measure.count} and {baseline.count}")
    scores = measure.scores - baseline.scores
    return Measure(measure.value - baseline.value, _standard_error(scores), measure.count, scores)


def ranks(queries_ND: Tensor, documents_MD: Tensor, relevant: list[Tensor]) -> Tensor:
    """``(N,)``: how many documents come before the best relevant one, by cosine.

    A tie counts against the query, and so does what is not finite: a model that says the same of everything,
    or NaN, finds nothing.

    Args:
        queries_ND: embeddings of queries.
        documents_MD: embeddings of documents.
        relevant: of each query, the indices of its documents, at least one.
    """
    documents = _unit(documents_MD)
    found: list[Tensor] = []
    for start in range(0, len(queries_ND), _CHUNK):
        similarity = _unit(queries_ND[start : start + _CHUNK]) @ documents.T
        found.append(_rank_rows(similarity, relevant[start : start + _CHUNK]))
    return torch.cat(found)


def recall_at_k(ranks_N: Tensor, k: int) -> Measure:
    """Share of queries whose best relevant document is among the first ``k``."""
    return mean_of(ranks_N < k)


def top_k(logits_NK: Tensor, labels_N: Tensor, k: int) -> Measure:
    """Share of samples whose class is among the ``k`` highest; a tie counts against it."""
    relevant = [label.reshape(1) for label in labels_N]
    return recall_at_k(_rank_rows(logits_NK.double(), relevant), k)


def cosine(values_ND: Tensor, reference_ND: Tensor) -> Measure:
    """Mean over the rows of their cosine with the reference's; a row of zeros has 0."""
    return mean_of(torch.nn.functional.cosine_similarity(values_ND.double(), reference_ND.double(), dim=1, eps=1e-12))


def sqnr_db(values_ND: Tensor, reference_ND: Tensor) -> Measure:
    """Signal to quantization noise in dB: ``10 log10(sum reference² / sum (values - reference)²)``.

    Over all rows together; infinite when there is no noise.
    """
    signal = reference_ND.double().square().flatten(1).sum(dim=1).cpu()
    noise = (values_ND.double() - reference_ND.double()).square().flatten(1).sum(dim=1).cpu()
    if noise.sum() == 0:
        return mean_of(torch.full_like(signal, math.inf))
    value = 10 * math.log10(max(float(signal.sum() / noise.sum()), 1e-300)) if noise.sum().isfinite() else math.nan
    share = 10 / math.log(10) * (signal / signal.mean() - noise / noise.mean())
    return _with_shares(value, share)


def kl_of_rows(logits_PV: Tensor, reference_PV: Tensor) -> Tensor:
    """``(P,)``: ``KL(p_reference || p)`` in nats at each place.

    In fp64: of two models that nearly agree the terms are many and cancel. A few places at a time, for vocabularies
    are large.
    """
    chunks = zip(torch.split(logits_PV, _PLACES), torch.split(reference_PV, _PLACES), strict=True)
    return torch.cat([_kl(logits, reference) for logits, reference in chunks])


def agreement_of_rows(logits_PV: Tensor, reference_PV: Tensor) -> Tensor:
    """``(P,)``: 1 where both have the same highest class, else 0; 0 where the logits are not finite."""
    same = logits_PV.argmax(dim=-1) == reference_PV.argmax(dim=-1)
    return (same & logits_PV.isfinite().any(dim=-1) & ~logits_PV.isnan().any(dim=-1)).double()


def ratio_of_sums(totals: Tensor, weights: Tensor) -> Measure:
    """``sum totals / sum weights`` over samples (both ``(count,)``), such as nats over tokens."""
    totals, weights = totals.double().cpu(), weights.double().cpu()
    value = float(totals.sum() / weights.sum())
    return _with_shares(value, (totals - value * weights) / weights.mean())


def exponential(measure: Measure) -> Measure:
    """``exp(measure)``: of a mean negative log-likelihood, the perplexity."""
    value = math.exp(min(measure.value, 700.0))
    return _with_shares(value, value * (measure.scores - measure.value))


def scaled(measure: Measure, factor: float) -> Measure:
    """``factor * measure``."""
    error = abs(factor) * measure.standard_error
    return Measure(factor * measure.value, error, measure.count, factor * measure.scores)


def _with_shares(value: float, shares: Tensor) -> Measure:
    scores = value + shares
    return Measure(value, _standard_error(scores), len(scores), scores)


def _standard_error(scores: Tensor) -> float:
    """Of the mean; 0 when all scores are the same, infinite ones too."""
    if len(scores) < 2:
        return math.nan
    if bool((scores == scores[0]).all()):
        return 0.0
    return float(scores.std(unbiased=True)) / math.sqrt(len(scores))


def _kl(logits_PV: Tensor, reference_PV: Tensor) -> Tensor:
    log_p = reference_PV.double().log_softmax(dim=-1)
    log_q = logits_PV.double().log_softmax(dim=-1)
    # a class that the reference rules out (-inf) adds nothing
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=1)


def _rank_rows(similarity_NM: Tensor, relevant: list[Tensor]) -> Tensor:
    similarity = similarity_NM.nan_to_num(nan=-math.inf)
    is_relevant = torch.zeros_like(similarity, dtype=torch.bool)
    for row, columns in enumerate(relevant):
        is_relevant[row, columns.to(similarity.device)] = True
    best = similarity.masked_fill(~is_relevant, -math.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best) & ~is_relevant).sum(dim=1).cpu()
