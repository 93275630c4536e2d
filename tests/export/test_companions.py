"""Which of the model's own files go along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.errors import UserError
from octavo.export.companions import companion_bytes, companion_paths, copy_companions

GO = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "modules.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model", "LICENSE", "README.md"),
)
STAY = (
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", ".gitattributes"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "optimizer.pt", "rng_state.pth"),
    *("tf_model.h5", "flax_model.msgpack", "model.onnx", "model.gguf"),
)
RUN = ("run.json", "plan.json", "recipe.yaml", "layout.json")
CODE = ["modeling_own.py"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"path": "../elsewhere", "type": "sentence_transformers.models.Dense"},
    ]
    paths = [*GO, *STAY, *CODE, "1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"]
    paths += ["checkpoint-500/trainer_state.json", "onnx/config.json", ".cache/x.json", "../elsewhere/secret.json"]
    for name in [*paths, "additional_chat_templates/tool_use.jinja"]:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    (directory / "modules.json").write_text(json.dumps(modules))
    return directory


def test_everything_but_weights_code_and_hidden_files(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    copy_companions(source, tmp_path / "out", with_code=False)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    inside = {"1_Pooling/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tool_use.jinja"}
    assert found == {*GO, *inside}
    assert companion_bytes(source, with_code=False) == sum((source / name).stat().st_size for name in found)


def test_code_goes_along_when_it_is_trusted(source: Path) -> None:
    assert Path("modeling_own.py") in companion_paths(source, with_code=True)


def test_a_run_as_source_does_not_make_its_copy_a_run(source: Path) -> None:
    for name in ("run.json", "plan.json", "recipe.yaml", "layout.json"):
        (source / name).write_text("{}")
    assert not {"run.json", "plan.json", "recipe.yaml", "layout.json"} & set(
        map(str, companion_paths(source, with_code=False))
    )


def test_a_damaged_module_list(source: Path) -> None:
    (source / "modules.json").write_text('[{"path": 1}]')
    with pytest.raises(UserError, match=r"modules.json is not a list of sentence-transformers modules: KeyError"):
        companion_paths(source, with_code=False)


def test_no_source_no_bytes() -> None:
    assert companion_bytes(None, with_code=False) == 0
