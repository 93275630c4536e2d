"""Steps say what is wrong with them; as they are written, so they read back."""

from __future__ import annotations

import pytest

from octavo.errors import UserError
from octavo.spec.step_order import require_order
from octavo.spec.steps import STEPS, Gptq, SmoothQuant, Step, make_step, parse_step


@pytest.mark.parametrize(
    ("written", "options", "select"),
    [
        ("gptq", Gptq(), ()),
        ({"gptq": None}, Gptq(), ()),
        ({"smoothquant": {"alpha": 0.75}}, SmoothQuant(alpha=0.75), ()),
        ({"gptq": {"damping": 0.05}, "select": "*.fc1"}, Gptq(damping=0.05), ("*.fc1",)),
        ({"gptq": {}, "select": ["*.fc1", "type:Linear"]}, Gptq(), ("*.fc1", "type:Linear")),
    ],
)
def test_a_step_reads_back(written: object, options: object, select: tuple[str, ...]) -> None:
    step = parse_step(written)
    assert (step.options, step.select) == (options, select)
    assert parse_step(step.to_yaml_value()) == step


@pytest.mark.parametrize("name", STEPS)
def test_every_step_works_without_options_and_is_described(name: str) -> None:
    assert make_step(name) == Step(STEPS[name]())
    assert STEPS[name].__doc__


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("gtpq", "unknown step 'gtpq': did you mean 'gptq'?"),
        ({"smoothquant": {"alhpa": 1}}, "step smoothquant: unknown option 'alhpa': did you mean 'alpha'?"),
        ({"smoothquant": {"alpha": 1.5}}, "step smoothquant: alpha: input should be less than or equal to 1, not 1.5"),
        ({"gptq": [1]}, "step gptq: options are a mapping"),
        ({"gptq": {}, "smoothquant": {}}, "a step is one name with its options, and select beside it"),
        ({"select": "*"}, "this has none"),
        ({"gptq": {}, "select": 3}, "select takes a pattern or a list of patterns, not 3"),
        (7, "a step is a name, or a name with options, not 7"),
    ],
)
def test_a_mistake_is_named(written: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_step(written)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            "awq gptq",
            r"'gptq' rounds what 'awq' has rounded already: write awq: {clip: false}, or leave one of them out",
        ),
        ("hqq gptq", r"'gptq' rounds what 'hqq' has rounded already: give one of them other layers \(select\)"),
        ("gptq smoothquant", r"'smoothquant' scales what 'gptq' has rounded already: put it before \(layer 'a'\)"),
        ("scale_search svdquant", "'svdquant' branches off what 'scale_search' has rounded already: put it before"),
        ("rotate equalize", "'equalize' scales what 'rotate' has rotated already: put it before"),
    ],
)
def test_an_order_that_cannot_work_is_refused(steps: str, message: str) -> None:
    work = [(make_step(name), frozenset({"a", name})) for name in steps.split()]
    with pytest.raises(UserError, match=message):
        require_order(work)
    require_order([(step, layers - {"a"}) for step, layers in work])


def test_orders_that_work() -> None:
    for steps in (
        "smoothquant rotate svdquant gptq bias_correction",
        "equalize smoothquant hqq",
        "gptq bias_correction",
    ):
        require_order([(make_step(name), frozenset({"a"})) for name in steps.split()])
    require_order([(make_step("awq", {"clip": False}), frozenset({"a"})), (make_step("gptq"), frozenset({"a"}))])
