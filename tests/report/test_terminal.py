"""What a person reads: every site is accounted for, names stay whole, and nothing is wider than the terminal."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys

import pytest
from rich.console import Console, RenderableType

from hand_made_facts import clip, encoder, linear, mixture, model
from octavo.report import terminal
from octavo.report.progress import TerminalTrack
from octavo.report.words import TIMES
from octavo.spec.facts import ModelFacts
from octavo.spec.recipe import load_recipe, presets
from octavo.spec.records import BlockRecord, MetricRecord, RunRecord, SensitivityRecord, StepRecord
from octavo.spec.resolve import resolve

MODELS = [clip(), encoder(), mixture()]
PLAN = resolve(load_recipe("fp8-attention").leave("*patch_embedding*", why="costs 2 points", origin="--leave"), clip())
METRICS = {
    "retrieval": {"r_at_1": MetricRecord(baseline=0.712, quantized=0.484, standard_error=0.02)},
    "perplexity": {"perplexity": MetricRecord(baseline=21.456, quantized=float("inf"))},
    "fidelity": {"cosine": MetricRecord(quantized=0.98765)},
}
RECORD = dataclasses.replace(
    RunRecord.of_plan(PLAN, leave=["*patch_embedding*"]),
    metrics=METRICS,
    seconds={"load": 1.234, "calibrate": 4000.0},
    peak_memory_bytes=812_000_000,
    output="OUT",
)


def shown(renderable: RenderableType, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def lines_of(renderable: RenderableType) -> list[str]:
    return [" ".join(line.split()) for line in shown(renderable).splitlines()]


@pytest.mark.parametrize("width", [60, 100, 160])
@pytest.mark.parametrize("facts", MODELS, ids=lambda facts: facts.model)
def test_nothing_is_wider_than_the_terminal(facts: ModelFacts, width: int) -> None:
    plan = resolve(load_recipe("fp8"), facts)
    for renderable in (terminal.plan_view(plan), terminal.plan_listing(plan), terminal.run_view(RECORD)):
        assert max(map(len, shown(renderable, width).splitlines())) <= width


def test_repeated_layers_are_one_row_with_their_count_and_shares() -> None:
    lines = lines_of(terminal.plan_view(PLAN))
    name = "text_model.encoder.layers.{0..3}.self_attn.{q,k,v,out}_proj"
    assert f"{name} 16{TIMES} linear 96{TIMES}96 15.3 % 14.8 %" in lines
    assert f"text_model.encoder.layers.{{0..3}}.self_attn 4{TIMES} attention 1.2 %" in lines


def test_a_section_names_what_it_gets_and_by_which_rule() -> None:
    lines = lines_of(terminal.plan_view(PLAN))
    assert "weight + input: e4m3-tensor fp8 rule 1 (operation:linear)" in lines
    assert "query + key + value + attention_output: e4m3-tensor fp8-attention rule 1 (operation:attention)" in lines
    assert "as it is norm: not quantized unless a rule names it" in lines
    assert "as it is left by --leave: costs 2 points" in lines


def test_parameters_without_an_operation_are_shown_by_their_own_names() -> None:
    lines = lines_of(terminal.plan_view(PLAN))
    assert "logit_scale other <0.1 %" in lines
    assert "vision_model.embeddings.class_embedding other <0.1 %" in lines


def test_the_summary_is_one_line_of_shares_and_sizes() -> None:
    assert terminal.plan_summary(PLAN) == "92.0 % of parameters, 90.1 % of multiply-adds; 3.9 MB -> 1.2 MB"
    untraced = dataclasses.replace(PLAN, facts=dataclasses.replace(PLAN.facts, was_traced=False))
    assert terminal.plan_summary(untraced) == "92.0 % of parameters; 3.9 MB -> 1.2 MB"


@pytest.mark.parametrize("facts", MODELS, ids=lambda facts: facts.model)
def test_the_listing_has_every_parameter(facts: ModelFacts) -> None:
    text = shown(terminal.plan_listing(resolve(load_recipe("fp8"), facts)), width=250)
    listed = {line.split()[0] for line in text.splitlines() if line.strip()}
    for site in facts.sites:
        assert set(site.parameters) <= listed


def test_the_listing_says_for_each_parameter_what_it_gets() -> None:
    text = shown(terminal.plan_listing(resolve(load_recipe("int8"), model("m", [linear("fc", 8, 4)]))), width=120)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "fc.weight 32 int8-channel int8 rule 1 (operation:linear)" in rows
    assert "fc.bias 8 as it is not a weight" in rows
    assert "fc.input_quantizer int8-tensor" in rows


def test_notes_and_warnings_end_the_plan() -> None:
    facts = dataclasses.replace(model("m", [linear("fc", 4, 4)]), notes=("nothing was traced",), was_traced=False)
    lines = lines_of(terminal.plan_view(resolve(load_recipe("fp8-attention"), facts)))
    assert lines[-3] == "note: nothing was traced"
    assert lines[-2].startswith("note: fp8-attention rule 1 (operation:attention) matches nothing in this model")


def test_a_metric_is_shown_with_its_change_and_standard_error() -> None:
    lines = lines_of(terminal.metrics_table(METRICS))
    assert "retrieval r_at_1 0.7120 0.4840 -0.2280 0.0200" in lines
    assert "perplexity perplexity 21.46 inf inf" in lines
    assert "fidelity cosine - 0.9877 -" in lines


def test_what_was_not_measured_has_no_column() -> None:
    lines = lines_of(terminal.metrics_table({"retrieval": {"r_at_1": MetricRecord(quantized=0.7, standard_error=0.1)}}))
    assert lines == ["task metric quantized ± s.e.", "retrieval r_at_1 0.7000 0.1000"]


def test_no_change_is_shown_from_an_infinite_baseline() -> None:
    sqnr = MetricRecord(baseline=float("inf"), quantized=23.4, standard_error=0.0)
    cosine = MetricRecord(baseline=1.0, quantized=0.99, standard_error=0.001)
    metrics = {"fidelity": {"sqnr_db": sqnr, "cosine": cosine}}
    assert "fidelity sqnr_db inf 23.40 -" in lines_of(terminal.metrics_table(metrics))
    run = RunRecord("m", metrics=metrics)
    assert "fidelity sqnr_db inf 23.40" in lines_of(terminal.comparison_table({"fp8": run}))


@pytest.mark.parametrize(
    ("name", "metric", "style"),
    [
        ("r_at_1", MetricRecord(baseline=0.7, quantized=0.6, standard_error=0.01), "red"),
        ("r_at_1", MetricRecord(baseline=0.7, quantized=0.8, standard_error=0.01), "green"),
        ("r_at_1", MetricRecord(baseline=0.7, quantized=0.69, standard_error=0.01), "dim"),
        ("perplexity", MetricRecord(baseline=20.0, quantized=30.0), "red"),
        ("perplexity", MetricRecord(baseline=20.0, quantized=float("nan")), "red"),
    ],
)
def test_only_what_is_worse_beyond_two_standard_errors_is_red(name: str, metric: MetricRecord, style: str) -> None:
    cell = next(iter(terminal.metrics_table({"task": {name: metric}}).columns[4].cells))
    assert cell.style == style


def test_runs_stand_side_by_side() -> None:
    lines = lines_of(terminal.comparison_table({"fp8": RECORD, "patch left out": RECORD}))
    assert lines[0] == "task metric baseline fp8 patch left out"
    assert "fidelity cosine - 0.9877 0.9877" in lines
    assert lines[-1] == "size 3.9 MB 1.2 MB 1.2 MB"


def test_the_worst_quantizers_come_with_their_cost() -> None:
    rows = [
        SensitivityRecord(quantizer=f"h.{i}.input_quantizer", metric="cosine", cost=0.1 / (i + 1)) for i in range(7)
    ]
    lines = lines_of(terminal.sensitivity_table(rows, most=5))
    assert lines[1].startswith("1 h.0.input_quantizer 0.10 █")
    assert lines[-1] == "and 2 more"


def test_a_run_tells_what_was_done_and_what_it_took() -> None:
    lines = lines_of(terminal.run_view(RECORD))
    assert lines[0] == "demo:clip fp8-attention --leave '*patch_embedding*'"
    assert lines[-2:] == ["load 1.23 s, calibrate 1 h 07 min, peak memory 812 MB", "written to OUT"]


def test_blocks_are_shown_with_what_every_step_left_of_their_error() -> None:
    steps = [StepRecord(name="awq", error=0.002), StepRecord(name="gptq", error=0.001)]
    blocks = [BlockRecord(name=f"h.{k}", error=0.01 * k, plain_error=0.004, steps=steps) for k in range(3)]
    lines = lines_of(terminal.blocks_table(blocks, most=2))
    assert lines[0].split() == ["block", "plain", "+", "awq", "+", "gptq", "all", "rounded"]
    assert lines[1].split() == ["h.1", "0.4", "%", "0.2", "%", "0.1", "%", "1", "%"]
    assert lines[3] == "and 1 more, which err less"
    assert "h.2" in shown(terminal.run_view(dataclasses.replace(RECORD, blocks=tuple(blocks))))


def test_time_left_is_known_when_every_item_takes_minutes() -> None:
    clock = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=120, get_time=lambda: clock[0])
    place = ["first"]
    for number in TerminalTrack(console)(range(4), lambda: place[0]):
        clock[0] += 600
        place[0] = f"block {number}"
    drawn = console.file.getvalue()
    assert "0:10:00" in drawn
    assert "block 2" in drawn


def test_a_run_without_a_plan_is_only_measured() -> None:
    assert lines_of(terminal.run_view(RunRecord("m"))) == ["m not quantized"]


def test_recipes_are_listed_with_aliases_and_a_sentence() -> None:
    text = " ".join(shown(terminal.recipes_table(presets())).split())
    assert "int4-group Weights of linear layers in INT4" in text
    assert "(also int4-weight-only, int4-group128)" in text


def test_reports_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, octavo.report.terminal, octavo.spec.resolve; "
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
