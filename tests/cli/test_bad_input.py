"""A user's mistake: status 2, one message that names the way out, nothing on standard output, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli.running import fine, refused
from octavo.report.words import TIMES

pytestmark = pytest.mark.usefixtures("_on_the_bench")

FP8 = ("--recipe", "fp8")
CALIBRATED = (*FP8, "--data", "pairs.jsonl")


def test_an_unknown_preset() -> None:
    message = refused("plan", "bert", "--recipe", "fp9")
    assert "unknown recipe 'fp9': did you mean 'fp8'?" in message
    assert "a file is written as a path, ./fp9.yaml" in message


def test_an_unknown_field_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('name: mine\nrules:\n  - select: "*dense"\n    schema: {weight: e4m3-tensor}\n')
    message = refused("plan", "bert", "--recipe", path)
    assert f"{path}, line 4: unknown field 'schema' in a rule: did you mean 'scheme'?" in message


def test_an_unknown_format(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('name: mine\nrules:\n  - select: "*dense"\n    scheme: {weight: e4m4-tensor}\n')
    assert f"{path}, line 4: unknown tensor format 'e4m4-tensor': did you mean e4m3" in refused(
        "plan", "bert", "--recipe", path
    )


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.intermediat.dense", "'*.intermediate.dense'"),
        ("type:Liner", "'type:Linear'"),
        ("encoder.layer.0.attention.self.querry", "'encoder.layer.0.attention.self.query'"),
        ("operation:lineal", "'operation:linear'"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, near: str) -> None:
    message = refused("plan", "bert", *FP8, "--leave", pattern)
    assert f"pattern '{pattern}' (--leave '{pattern}') matches no layer and no quantizer of this model" in message
    assert near in message


def test_a_pattern_of_sensitivity_that_matches_nothing() -> None:
    words = ("sensitivity", "bert", *CALIBRATED, "--only")
    assert "pattern '*.fc1' (--only) matches no layer" in refused(*words, "*.fc1")
    assert "recipe 'fp8' quantizes nothing there" in refused(*words, "operation:attention")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", "no such directory. A model is a Hugging Face directory or id, package.module:factory"),
        ("empty", "no config.json, so it is not a Hugging Face model (it is empty)"),
        ("thesis", "no config.json, so it is not a Hugging Face model (there is chapter.tex)"),
        ("prose.txt", "is a file; give the directory that holds config.json and the safetensors"),
        ("model.onnx", "is not an ONNX file"),
        ("pickled", "only pickled weights (pytorch_model.bin), and octavo never reads pickles"),
        ("run", "is a run, so its weights are quantized already"),
        ("run/modelopt", "is already quantized (modelopt)"),
        ("demo:clop", "there is no demo model 'clop'"),
        ("no_such_module:build", "there is no module 'no_such_module'; it was looked for in"),
        ("tower_of_mine:make", "has no 'make'"),
    ],
)
def test_a_path_that_is_not_a_model(model: str, words: str, run: Path) -> None:
    message = refused("plan", model, *FP8)
    assert words in message
    assert model.removeprefix("demo:") in message


def test_a_missing_tokenizer() -> None:
    fine("plan", "wordless", *FP8)
    message = refused("quantize", "wordless", *CALIBRATED)
    assert "model directory wordless has no tokenizer; looked for tokenizer.json" in message


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("bert", "folders", "data 'folders' has pictures, and model 'bert' (text encoder) takes texts"),
        ("vit", "prose.txt", "data 'prose.txt' has texts, and model 'vit' (image classifier) takes pictures"),
        ("clip", "texts.jsonl", "takes pictures with texts"),
        ("bert", "three.jsonl", "line 2: 'text' holds a"),
        ("bert", "nothing.jsonl", "no such file or directory. Data is a text file"),
        (
            "tower_of_mine:build",
            "odd_tower:wide",
            f"given (tensor 4{TIMES}6{TIMES}9, tensor 4{TIMES}1{TIMES}1), says: ",
        ),
        ("tower_of_mine:build", "odd_tower:named", f"given {{sound: tensor 4{TIMES}5{TIMES}9}}, says: "),
        ("bert", "tower_of_mine:signals", "data 'tower_of_mine:signals' does not fit model 'bert'"),
        ("tower_of_mine:build", "odd_tower:broken", "quantizer 'stem.input_quantizer': calibration data gave nan"),
    ],
)
def test_data_that_does_not_fit(model: str, data: str, words: str) -> None:
    assert words in refused("quantize", model, *FP8, "--data", data)


def test_a_group_size_that_does_not_divide_a_layer() -> None:
    message = refused("plan", "bert", "--recipe", "int4-group")
    name = "encoder.layer.0.attention.self.query"
    assert f"layer '{name}': groups of 128 do not divide in_features=36" in message
    assert f"(--leave '{name}')" in message


def test_the_way_out_of_an_odd_width_works(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('name: mine\nrules:\n  - select: "*.output.dense"\n    scheme: {weight: int4-group32}\n')
    assert "do not divide" in refused("plan", "bert", "--recipe", path)
    outcome = refused("plan", "bert", "--recipe", path, "--leave", "*.output.dense")
    assert "quantizes nothing" in outcome


def test_an_unknown_layout_is_refused_before_the_model_is_opened() -> None:
    message = refused("quantize", "./nowhere", *CALIBRATED, "--out", "fresh", "--layout", "modelop")
    assert message == "octavo: unknown layout 'modelop': did you mean 'modelopt'? layouts are modelopt, onnx"
    assert "unknown layout 'gguf'" in refused("export", "run", "--layout", "gguf", "--out", "fresh")


def test_a_layout_needs_a_run_directory() -> None:
    assert "say which, --out RUN" in refused("quantize", "bert", *CALIBRATED, "--layout", "modelopt")


@pytest.mark.parametrize("verb", ["plan", "quantize"])
def test_steps_whose_work_a_layout_cannot_hold_are_refused_beforehand(verb: str, tmp_path: Path) -> None:
    (tmp_path / "turned.yaml").write_text("extends: int8\nsteps: [{rotate: {block: 8}}]")
    data = () if verb == "plan" else ("--data", "prose.txt", "--out", tmp_path / "fresh")
    message = refused(verb, "llama", "--recipe", tmp_path / "turned.yaml", *data, "--layout", "modelopt")
    assert "step 'rotate': the layout has no place for the rotation of its input" in message
    assert "the run directory holds every format" in message


def test_a_layout_that_cannot_hold_the_recipe_is_refused_before_calibration(
    monkeypatch: pytest.MonkeyPatch, bench: Path
) -> None:
    passes = _count_passes(monkeypatch)
    fine("plan", "llama", "--recipe", "int8-dynamic")
    traced = len(passes)
    passes.clear()
    words = ("--recipe", "int8-dynamic", "--data", "prose.txt", "--task", "perplexity:prose.txt")
    message = refused("quantize", "llama", *words, "--out", "fresh", "--layout", "modelopt")
    assert len(passes) == traced, "more than the one traced forward"
    assert "layout 'modelopt' cannot hold this plan:" in message
    assert "14 layers ('model.layers.{0,1}.self_attn.{q,k,v,o}_proj'" in message
    assert message.count("choose another recipe or leave the layer out") == 1
    assert not (bench / "fresh").exists()


def _count_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from transformers import LlamaForCausalLM

    passes: list[str] = []
    original = LlamaForCausalLM.forward

    def counted(self: torch.nn.Module, *arguments: object, **named: object) -> object:
        passes.append("forward")
        return original(self, *arguments, **named)

    counted.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return passes


def test_a_static_recipe_without_data() -> None:
    message = refused("quantize", "bert", *FP8)
    assert "recipe 'fp8' has 13 static activation quantizers" in message
    assert "give calibration data, or choose a dynamic or weight-only recipe" in message


def test_a_recipe_that_needs_no_data_takes_none() -> None:
    fine("quantize", "bert", "--recipe", "fp8-dynamic")
    fine("quantize", "bert", "--recipe", "int8-weight-only")


@pytest.mark.parametrize("out", ["thesis", "prose.txt", "bert"])
def test_an_output_that_holds_something_else(out: str, bench: Path) -> None:
    before = sorted(path.name for path in (bench / out).iterdir()) if (bench / out).is_dir() else []
    message = refused("quantize", "./nowhere", *CALIBRATED, "--out", out)
    assert f"cannot write a run to {bench / out}" in message
    assert "choose another name" in message
    assert before == (sorted(path.name for path in (bench / out).iterdir()) if before else [])


def test_an_export_onto_the_run_itself(run: Path) -> None:
    message = refused("export", "run", "--layout", "modelopt", "--out", "run")
    assert "the directory holds something else" in message
    fine("verify", "run")


def test_an_unknown_device() -> None:
    message = refused("plan", "bert", *FP8, "--device", "tpu")
    assert "device 'tpu' cannot be used" in message
    assert "'cpu' always works" in message


def test_an_unknown_dtype() -> None:
    assert "dtype 'int3' is not one of float32" in refused("plan", "bert", *FP8, "--dtype", "int3")
    words = ("export", "run", "--layout", "modelopt", "--out", "fresh", "--dtype", "int8")
    assert "dtype 'int8' is not one of float32, float16, bfloat16" in refused(*words)


def test_an_unknown_observer() -> None:
    assert "unknown observer 'minmax'" in refused("quantize", "bert", *CALIBRATED, "--observer", "minmax")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("retrieval", "a task is KIND:DATA or NAME=KIND:DATA; the kinds are zeroshot"),
        ("retreival:pairs.jsonl", "there is no kind 'retreival'; the kinds are zeroshot"),
        ("retrieval:nothing.jsonl", "data 'nothing.jsonl': no such file or directory"),
        ("retrieval:texts.jsonl", "retrieval needs JSON lines with image and text, or with query and document"),
        ("perplexity:prose.txt", "perplexity needs a causal language model, and model 'bert' is a text encoder"),
        ("zeroshot:folders", "zeroshot needs a dual encoder (CLIP, SigLIP), and model 'bert' is a text encoder"),
    ],
)
def test_a_task_that_cannot_be_done(task: str, words: str) -> None:
    assert words in refused("quantize", "bert", *CALIBRATED, "--task", task)
    assert words in refused("evaluate", "bert", "--task", task)


def test_sensitivity_judged_by_a_task_that_cannot_be_done() -> None:
    words = ("sensitivity", "bert", *CALIBRATED, "--task", "perplexity:prose.txt")
    assert "perplexity needs a causal language model" in refused(*words)


def test_sensitivity_without_anything_to_judge_by() -> None:
    assert "--data (fidelity on its samples) or --task KIND:DATA" in refused("sensitivity", "./nowhere", *FP8)


def test_an_unknown_metric() -> None:
    message = refused("sensitivity", "bert", *CALIBRATED, "--metric", "r_at_9")
    assert "has no metric 'r_at_9'; it has cosine, sqnr_db" in message


def test_evaluate_without_a_task() -> None:
    assert "name a task, such as --task retrieval:pairs.jsonl" in refused("evaluate", "./nowhere")


def test_fidelity_of_one_model_alone() -> None:
    assert "it is measured while a model is quantized" in refused("evaluate", "bert", "--task", "fidelity:texts.jsonl")


def test_verify_of_a_checkpoint_without_its_run(run: Path) -> None:
    assert "say which run it was made of, --run RUN" in refused("verify", "run/modelopt")
    assert "bert is not a run directory" in refused("verify", "run/modelopt", "--run", "bert")
    assert "nowhere does not exist" in refused("verify", "nowhere", "--run", "run")


def test_what_cannot_be_inspected() -> None:
    assert "nowhere does not exist" in refused("inspect", "nowhere")
    assert "no run.json, no hf_quant_config.json and no model.safetensors" in refused("inspect", "empty")


def test_a_plan_that_cannot_be_written(tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "plan.json"
    assert refused("plan", "bert", *FP8, "--out", out).startswith(f"octavo: cannot write {out}")


@pytest.mark.parametrize("words", [("plan", "bert"), ("frobnicate",), ("quantize", "bert", *FP8, "--samples", "0")])
def test_an_order_that_is_not_one(words: tuple[str, ...]) -> None:
    assert "octavo" in refused(*words)


@pytest.mark.parametrize("words", [("plan", "bert", *FP8), ("quantize", "bert", *CALIBRATED)])
def test_too_little_coverage_names_the_largest_parts(words: tuple[str, ...]) -> None:
    message = refused(*words, "--require-coverage", "0.999")
    assert "less than the required 99.9 %" in message
    assert "left by default, no rule selects embedding" in message
