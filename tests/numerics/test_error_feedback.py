"""Rounding with feedback against exhaustive search, against rounding to nearest, and on inputs that break solvers."""

import itertools

import pytest
import torch

from octavo.numerics.error_feedback import Feedback, round_with_feedback
from octavo.numerics.linalg import damped, feedback, output_error
from octavo.numerics.qtensor import QTensor, fake_quantize, quantize
from octavo.numerics.scale_search import search_scales
from octavo.numerics.weighting import Weighting
from octavo.spec.formats import NVFP4, tensor_format

FORMATS = ["int4-group32", "int4-group32-asymmetric", "int8-channel", "nvfp4", "mxfp4", "int4-tensor", "e4m3-channel"]


def inputs(kind: str, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(400, width, generator=generator) @ torch.randn(width, width, generator=generator)
    match kind:
        case "random":
            return mixed
        case "rank-deficient":
            return mixed[:, :7] @ torch.randn(7, width, generator=generator)
        case "dead channels":
            return mixed * (torch.arange(width) % 3 > 0)
        case "single sample":
            return mixed[:1]
        case "all dead":
            return torch.zeros(5, width)
        case "huge":
            return mixed * 1e12
        case "tiny":
            return mixed * 1e-12
    raise AssertionError(kind)


def weight(rows: int = 48, width: int = 64) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "kind", ["random", "rank-deficient", "dead channels", "single sample", "all dead", "huge", "tiny"]
)
def test_the_factor_inverts_the_damped_gram_matrix_whatever_the_inputs(kind):
    x = inputs(kind)
    upper = feedback(x.T @ x, 0.01)[0].double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped(x.T @ x, 0.01), torch.eye(64).double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["indefinite", "not finite", "asymmetric"])
def test_what_is_no_gram_matrix_breaks_nothing(kind):
    gram = inputs("random").T @ inputs("random")
    match kind:
        case "indefinite":
            gram -= gram.diagonal().mean() * 1e-2 * torch.ones(64, 64) * 64
        case "not finite":
            gram[3, 3] = torch.inf
        case "asymmetric":
            gram = gram.triu()
    upper, damping = feedback(gram, 0.01)
    assert (damping > 0.01) == (kind == "indefinite")
    assert bool(upper.isfinite().all())
    assert bool((upper.diagonal() > 0).all())
    w, fmt = weight(), tensor_format("int4-group32")
    scale = quantize(w, fmt).scale
    assert scale is not None
    found = round_with_feedback(w, gram, fmt, scale=scale, options=Feedback(sweeps=2)).dequantize()
    assert float((found - w).square().mean()) < 0.2  # near the weight; 1 would be noise


@pytest.mark.parametrize("kind", ["random", "rank-deficient", "dead channels", "single sample", "huge", "tiny"])
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_err_less_than_by_rounding_to_nearest(name, kind):
    fmt, x, w = tensor_format(name), inputs(kind), weight()
    gram = x.T @ x
    plain = quantize(w, fmt)
    assert plain.scale is not None
    errors = [float(output_error(plain.dequantize() - w, gram))]
    for sweeps in (0, 3):
        found = round_with_feedback(
            w, gram, fmt, scale=plain.scale, zero_point=plain.zero_point, options=Feedback(sweeps=sweeps)
        )
        assert found.dequantize().isfinite().all()
        errors.append(float(output_error(found.dequantize() - w, gram)))
    # random inputs are correlated enough that columns can make up for each other
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_the_result_lies_on_its_own_grid_and_is_the_same_every_time():
    w, x = weight(), inputs("random")
    scale, _ = search_scales(w, NVFP4)
    one, two = (round_with_feedback(w, x.T @ x, NVFP4, scale=scale, options=Feedback(sweeps=2)) for _ in range(2))
    assert isinstance(one.scale, QTensor)
    assert isinstance(two.scale, QTensor)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale.codes, two.scale.codes)
    assert torch.equal(fake_quantize(one.dequantize(), NVFP4, scale=one.scale), one.dequantize())


def test_descent_reaches_what_no_single_change_betters():
    fmt, w, x = tensor_format("int2-channel"), weight(3, 6), inputs("random", 6)
    gram = damped(x.T @ x, 0.01).float()
    scale = quantize(w, fmt).scale
    found = round_with_feedback(w, x.T @ x, fmt, scale=scale, options=Feedback(sweeps=50))
    assert isinstance(found.scale, torch.Tensor)
    best = [float(output_error(row, gram)) for row in (found.dequantize() - w).split(1)]
    codes = torch.tensor(list(itertools.product(range(-2, 2), repeat=6))).float()
    for row, reached in enumerate(best):
        every = (codes * found.scale[row] - w[row]) @ gram
        every = (every * (codes * found.scale[row] - w[row])).sum(1)
        near = (codes != found.codes[row]).sum(1) <= 1
        assert reached <= every[near].min() * 1.0001
        assert reached <= 1.5 * every.min()


def test_the_order_of_visits_helps_when_energies_differ():
    x = inputs("random") * torch.logspace(0, 2, 64)
    w, fmt = weight(256), tensor_format("int4-group32")
    scale, _ = search_scales(w, fmt, Weighting(gram=x.T @ x))
    errors = {
        order: output_error(
            round_with_feedback(w, x.T @ x, fmt, scale=scale, options=Feedback(act_order=order)).dequantize() - w,
            x.T @ x,
        )
        for order in (True, False)
    }
    assert errors[True] < errors[False]


def test_bf16_weights_and_a_width_that_no_block_divides():
    fmt, x = tensor_format("int4-group32"), inputs("random", 96)[:, :96]
    w = weight(8, 96).bfloat16()
    scale, _ = search_scales(w, fmt)
    found = round_with_feedback(w, x.T @ x, fmt, scale=scale, options=Feedback(block_size=40, sweeps=1))
    whole = round_with_feedback(w, x.T @ x, fmt, scale=scale, options=Feedback(block_size=128, sweeps=1))
    assert (found.codes == whole.codes).float().mean() > 0.99
