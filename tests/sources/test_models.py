from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import nn

from octavo.errors import UserError
from octavo.sources import ModelKind, describe_module, open_model, open_untrained
from sources import tiny

KINDS = {
    "clip": ModelKind.DUAL_ENCODER,
    "siglip": ModelKind.DUAL_ENCODER,
    "bert": ModelKind.TEXT_ENCODER,
    "sentence_bert": ModelKind.TEXT_ENCODER,
    "masked_lm": ModelKind.TEXT_ENCODER,
    "text_classifier": ModelKind.TEXT_CLASSIFIER,
    "vit_classifier": ModelKind.IMAGE_CLASSIFIER,
    "vit": ModelKind.IMAGE_ENCODER,
    "llama": ModelKind.CAUSAL_LM,
    "t5": ModelKind.SEQ2SEQ_LM,
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_directory_is_opened_as_what_its_architecture_says(saved, name, kind):
    loaded = open_model(saved(name))
    assert loaded.kind is kind
    assert loaded.directory == saved(name)
    assert not loaded.model.training
    assert loaded.dtype is torch.float32


@pytest.mark.parametrize("name", KINDS)
def test_a_module_from_python_is_described_as_its_directory_is(saved, name):
    opened = open_model(saved(name))
    described = describe_module(opened.model)
    assert described.kind is opened.kind
    assert described.directory == saved(name)
    assert described.processor is not None


def test_a_subclass_is_what_its_ancestor_is(saved):
    loaded = open_model(saved("llama"))
    loaded.model.__class__ = type("QuantizedLlama", (type(loaded.model),), {})
    assert describe_module(loaded.model).kind is ModelKind.CAUSAL_LM


def test_a_plain_module_is_a_module():
    loaded = describe_module(nn.Linear(2, 2))
    assert loaded.kind is ModelKind.MODULE
    assert loaded.config is None
    assert loaded.processor is None


def test_weights_are_float32_unless_asked_otherwise(saved, tmp_path):
    directory = tmp_path / "half"
    half = open_model(saved("bert"), dtype="bfloat16")
    assert half.dtype is torch.bfloat16
    half.model.save_pretrained(directory)
    assert open_model(directory).dtype is torch.float32
    assert open_model(directory, dtype="auto").dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["clip", "sentence_bert", "llama"])
def test_an_untrained_model_has_the_same_tensors(saved, name):
    trained, untrained = open_model(saved(name)), open_untrained(saved(name))
    shapes = {name: tensor.shape for name, tensor in trained.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in untrained.model.state_dict().items()} == shapes
    assert untrained.kind is trained.kind


def test_a_demo_model_is_opened_by_name():
    with pytest.raises(UserError, match="no demo model 'nothing'"):
        open_model("demo:nothing")


@pytest.fixture
def factories(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models_of_sources.py").write_text(
        "import torch\n"
        "number = 3\n"
        "def linear(): return torch.nn.Linear(3, 2)\n"
        "def both(): return torch.nn.Linear(3, 2), lambda samples: torch.ones(len(samples), 3)\n"
        "def wrong(): return 'a model'\n"
        "def bad_processor(): return torch.nn.Linear(3, 2), 7\n"
    )


def test_a_factory_returns_the_module(factories):
    loaded = open_model("my_models_of_sources:linear", dtype="float16")
    assert loaded.kind is ModelKind.MODULE
    assert loaded.source == "my_models_of_sources:linear"
    assert loaded.dtype is torch.float16


def test_a_factory_may_return_what_makes_batches(factories):
    loaded = open_model("my_models_of_sources:both")
    assert loaded.collate is not None
    assert loaded.collate([None, None]).shape == (2, 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("my_models_of_sources:nothing", "has no 'nothing'"),
        ("my_models_of_sources:number", "is a int"),
        ("my_models_of_sources:wrong", "returned a str"),
        ("my_models_of_sources:bad_processor", "processor of model 'Linear' is a int"),
        ("no_such_module_here:model", "there is no module 'no_such_module_here'"),
    ],
)
def test_a_wrong_factory_is_told(factories, source, message):
    with pytest.raises(UserError, match=message):
        open_model(source)


@pytest.mark.parametrize("source", ["./no/such/dir", "runs/model.pt"])
def test_a_missing_directory_is_told_without_asking_the_hub(source):
    with pytest.raises(UserError, match=f"model '{source}': no such directory. A model is"):
        open_model(source)


def test_an_id_without_connection_says_what_was_tried(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'no-such/model': there is no such directory here .* could not be fetched"):
        open_model("no-such/model")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.onnx", "holds no graph"),
        ("model.gguf", "already quantized"),
        ("model.pth", "never reads pickles"),
        ("model.zip", "is a file; give the directory"),
    ],
)
def test_a_file_is_no_model(tmp_path, file, message):
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        open_model(tmp_path / file)


def test_what_is_called_onnx_and_is_something_else_is_told(tmp_path):
    (tmp_path / "model.onnx").write_text("no graph at all")
    with pytest.raises(UserError, match="is not an ONNX file"):
        open_model(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"missing.onnx': there is no such file"):
        open_model("missing.onnx")


def test_a_directory_without_configuration_is_told(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"no config.json, .* \(there is notes.txt\)"):
        open_model(tmp_path)


def test_an_adapter_alone_is_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter without its base model"):
        open_model(tmp_path)


def _with_config(saved, directory: Path, **changes: object) -> Path:
    config = json.loads((saved("bert") / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


def test_pickled_weights_are_never_read(saved, tmp_path):
    (_with_config(saved, tmp_path) / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        open_model(tmp_path)


def test_missing_weights_are_told(saved, tmp_path):
    with pytest.raises(UserError, match="no weights"):
        open_model(_with_config(saved, tmp_path))


def test_a_quantized_checkpoint_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"already quantized \(gptq\).*Give the checkpoint it was made from"):
        open_model(_with_config(saved, tmp_path, quantization_config={"quant_method": "gptq"}))


def test_an_unknown_model_type_is_told(saved, tmp_path):
    with pytest.raises(UserError, match="does not know model type 'nonesuch'"):
        open_model(_with_config(saved, tmp_path, model_type="nonesuch"))


def test_an_unknown_architecture_is_told(saved, tmp_path):
    with pytest.raises(UserError, match="has no 'BertForNothing'"):
        open_model(_with_config(saved, tmp_path, architectures=["BertForNothing"]))


def test_code_beside_the_weights_needs_trust(saved, tmp_path):
    own = {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"}
    with pytest.raises(UserError, match=r"brings its own code .*--trust-remote-code"):
        open_model(_with_config(saved, tmp_path, model_type="mine", auto_map=own))


def test_code_beside_the_weights_runs_when_trusted(saved, tmp_path):
    loaded = open_model(saved("bert"))
    loaded.model.save_pretrained(tmp_path)
    _with_config(saved, tmp_path, auto_map={"AutoModel": "mine.MyModel"}, architectures=["MyModel"])
    (tmp_path / "mine.py").write_text("from transformers import BertModel\nclass MyModel(BertModel): pass\n")
    trusted = open_model(tmp_path, trust_remote_code=True)
    assert type(trusted.model).__name__ == "MyModel"
    assert trusted.kind is ModelKind.TEXT_ENCODER


def test_invalid_configuration_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_model(tmp_path)


def test_weights_of_another_model_are_told(saved, tmp_path):
    _with_config(saved, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((saved("vit") / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="they are not the weights of a BertModel"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "nonsense"}, "device 'nonsense' cannot be used"), ({"dtype": "int8"}, "dtype 'int8' is not one of")],
)
def test_wrong_options_are_told(saved, options, message):
    with pytest.raises(UserError, match=message):
        open_model(saved("bert"), **options)


def test_a_missing_tokenizer_matters_only_for_texts(saved, tmp_path):
    open_model(saved("bert")).model.save_pretrained(tmp_path)
    loaded = open_model(tmp_path)
    assert loaded.processor is not None
    with pytest.raises(UserError, match=r"has no tokenizer; looked for tokenizer.json, .*vocab.txt"):
        loaded.processor.texts(["a cat"])
    with pytest.raises(UserError, match=r"has no image processor; looked for preprocessor_config.json"):
        loaded.processor.images([tiny.write_image(tmp_path / "a.png", 0)])
