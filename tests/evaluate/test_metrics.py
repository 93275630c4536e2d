from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from octavo.evaluate import Measure, difference
from octavo.evaluate.metrics import (
    agreement_of_rows,
    cosine,
    exponential,
    kl_of_rows,
    mean_of,
    ranks,
    ratio_of_sums,
    recall_at_k,
    scaled,
    sqnr_db,
    top_k,
)

RNG = np.random.default_rng(0)


def _random(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal(shape)).float()


def _check_scores(measure: Measure) -> None:
    """The promise of every measure: the mean of the scores is the value."""
    assert measure.scores.mean().item() == pytest.approx(measure.value)
    assert measure.count == len(measure.scores)


def test_a_mean_has_the_usual_standard_error():
    scores = RNG.standard_normal(50)
    measure = mean_of(torch.from_numpy(scores))
    assert measure.value == pytest.approx(scores.mean())
    assert measure.standard_error == pytest.approx(scores.std(ddof=1) / math.sqrt(50))
    assert math.isnan(mean_of(torch.ones(1)).standard_error)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_recall_is_that_of_sorting(k):
    queries, documents = _random(30, 4), _random(40, 4)
    relevant = [sorted(set(RNG.integers(0, 40, 3).tolist())) for _ in range(30)]
    similarity = queries.numpy() @ documents.numpy().T
    similarity /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(documents, axis=1)
    hits = [
        bool(set(np.argsort(-row)[:k].tolist()) & set(wanted)) for row, wanted in zip(similarity, relevant, strict=True)
    ]
    measure = recall_at_k(ranks(queries, documents, [torch.tensor(wanted) for wanted in relevant]), k)
    assert measure.value == pytest.approx(np.mean(hits))
    _check_scores(measure)


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan])
def test_a_model_that_says_the_same_of_everything_finds_nothing(value):
    same = torch.full((5, 3), value)
    assert recall_at_k(ranks(same, same, [torch.tensor([i]) for i in range(5)]), 4).value == 0
    assert top_k(same, torch.tensor([0, 1, 2, 0, 1]), 2).value == 0


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_is_that_of_sorting(k):
    logits, labels = _random(60, 9), torch.from_numpy(RNG.integers(0, 9, 60))
    hits = [label in np.argsort(-row)[:k] for row, label in zip(logits.numpy(), labels.numpy(), strict=True)]
    assert top_k(logits, labels, k).value == pytest.approx(np.mean(hits))


def test_cosine_is_the_mean_over_rows():
    values, reference = _random(20, 6), _random(20, 6)
    a, b = values.numpy().astype(float), reference.numpy().astype(float)
    wanted = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    measure = cosine(values, reference)
    assert measure.value == pytest.approx(wanted.mean())
    _check_scores(measure)
    assert cosine(torch.zeros(2, 3), torch.ones(2, 3)).value == 0


def test_sqnr_is_the_ratio_of_energies():
    reference = _random(20, 6)
    values = reference + 0.1 * _random(20, 6)
    noise = (values - reference).double()
    measure = sqnr_db(values, reference)
    assert measure.value == pytest.approx(10 * math.log10(reference.double().square().sum() / noise.square().sum()))
    _check_scores(measure)
    same = sqnr_db(reference, reference)
    assert same.value == math.inf
    assert same.standard_error == 0
    assert math.isnan(sqnr_db(values * math.nan, reference).value)
    assert sqnr_db(reference * 1e30, reference).value < -500


def test_kl_is_that_of_torch():
    logits, reference = 3 * _random(80, 50), 3 * _random(80, 50)
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    wanted = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_of_rows(logits, reference), wanted, rtol=1e-9, atol=1e-12)
    assert kl_of_rows(reference, reference).abs().max() == 0
    assert kl_of_rows(reference + 7, reference).abs().max() < 1e-6


def test_kl_of_impossible_classes_counts_only_what_the_reference_allows():
    reference = torch.tensor([[0.0, 0.0, -math.inf]])
    assert kl_of_rows(torch.tensor([[0.0, 0.0, -math.inf]]), reference).item() == 0
    assert kl_of_rows(torch.tensor([[0.0, -math.inf, 0.0]]), reference).item() == math.inf


def test_agreement_counts_the_same_highest_class_and_never_nan():
    reference = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0]])
    assert agreement_of_rows(torch.tensor([[0.0, 9.0], [9.0, 0.0], [math.nan, 0.0]]), reference).tolist() == [1, 0, 0]


def test_a_ratio_of_sums_and_its_exponential_have_the_error_of_the_jackknife():
    weights = torch.from_numpy(RNG.integers(50, 60, 200)).double()
    totals = weights * torch.from_numpy(RNG.normal(2.0, 0.2, 200))
    for make in (ratio_of_sums, lambda t, w: exponential(ratio_of_sums(t, w))):
        measure = make(totals, weights)
        _check_scores(measure)
        keep = ~torch.eye(200, dtype=torch.bool)
        left_out = np.array([make(totals[row], weights[row]).value for row in keep])
        jackknife = math.sqrt(199 / 200 * ((left_out - left_out.mean()) ** 2).sum())
        assert measure.standard_error == pytest.approx(jackknife, rel=0.02)
    loss = ratio_of_sums(totals, weights)
    assert exponential(loss).value == pytest.approx(math.exp(totals.sum() / weights.sum()))
    assert scaled(loss, -2).standard_error == pytest.approx(2 * loss.standard_error)


def test_a_difference_is_paired():
    before = _random(100)
    after = before + 0.01 * _random(100)
    measure = difference(mean_of(after), mean_of(before))
    assert measure.value == pytest.approx((after - before).double().mean().item())
    assert measure.standard_error < 0.1 * mean_of(after).standard_error
    with pytest.raises(ValueError, match="the same samples: 3 and 100"):
        difference(mean_of(torch.ones(3)), mean_of(before))
