"""Steps say what is wrong with them; as they are written, so they read back."""

from __future__ import annotations

import pytest

from octavo.errors import UserError
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
