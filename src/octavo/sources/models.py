"""Opens models: Hugging Face directories and ids, functions of the user's own, demo models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.demo import model_path
from octavo.errors import UserError
from octavo.sources.directories import find_directory
from octavo.sources.extras import import_callable, is_callable_name
from octavo.sources.graphs import GRAPH_FILE, GraphModule, check_graph_file
from octavo.sources.kinds import ModelKind, embeds_both, kind_of_class
from octavo.sources.pretrained import DTYPES, build_untrained, load_pretrained
from octavo.sources.processors import Processor, TextRules, wrap_processor
from octavo.sources.sentence import SentenceHead, read_sentence_head


@dataclass
class LoadedModel:
    """A model in evaluation mode with what is needed to feed it.

    ``directory`` holds its configuration, tokenizer and so on, when they are files. ``head`` is what a
    sentence-transformers directory declares. ``collate`` makes a plain module's batch from samples.
    """

    model: nn.Module
    kind: ModelKind
    source: str
    directory: Path | None = None
    processor: Processor | None = None
    head: SentenceHead | None = None
    collate: Callable[[Sequence[Any]], Any] | None = None

    @property
    def config(self) -> Any:
        """The model's transformers configuration; None for a plain module."""
        return self.model.config if _is_pretrained(self.model) else None

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter or buffer lies."""
        return next((tensor.device for tensor in _tensors(self.model)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's first ordinary floating-point tensor: what its inputs should have."""
        dtypes = (tensor.dtype for tensor in _tensors(self.model))
        return next((dtype for dtype in dtypes if dtype in DTYPES.values()), torch.float32)


def open_model(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    processor: str | Path | None = None,
) -> LoadedModel:
    """Open a model as the command line names it.

    Args:
        source: a Hugging Face directory or id, an ``.onnx`` file, ``package.module:factory`` (a function without
            arguments that returns a module, or a module and its processor), or ``demo:NAME``.
        device: as torch spells it.
        dtype: ``float32`` (the default), ``float16``, ``bfloat16``, or ``auto`` for the checkpoint's own.
        trust_remote_code: run code that lies beside the weights.
        processor: a directory with the tokenizer and image processor of an ``.onnx`` file.

    Raises:
        UserError: the model cannot be opened; the message says why and what to do.
    """
    source = str(source)
    target = check_device(device)
    _check_dtype(dtype)
    if source.endswith(".onnx"):
        return open_graph_model(Path(source), device=target, dtype=dtype, processor=processor)
    if processor is not None:
        raise UserError(f"a processor of its own ({processor}) is for .onnx files; '{source}' brings its own")
    if source.startswith("demo:"):
        directory = model_path(source.removeprefix("demo:"))
    elif is_callable_name(source) and not Path(source).exists():
        return _open_factory(source, device=target, dtype=dtype)
    else:
        directory = find_directory(source, trust_remote_code=trust_remote_code)
    model = load_pretrained(directory, dtype=dtype or "float32", trust_remote_code=trust_remote_code)
    return _describe(model.to(target).eval(), source, directory, trust_remote_code=trust_remote_code)


def open_untrained(
    directory: Path, *, device: str = "cpu", dtype: str | None = None, trust_remote_code: bool = False
) -> LoadedModel:
    """The model that ``directory`` describes, with arbitrary weights: for those who bring their own.

    Raises:
        UserError: ``config.json`` is missing or describes no model that is known.
    """
    target = check_device(device)
    _check_dtype(dtype)
    if (directory / GRAPH_FILE).is_file():
        own = directory if (directory / "config.json").is_file() else None
        return open_graph_model(directory / GRAPH_FILE, device=target, dtype=None, processor=own)
    model = build_untrained(directory, dtype=dtype or "float32", trust_remote_code=trust_remote_code)
    return _describe(model.to(target).eval(), str(directory), directory, trust_remote_code=trust_remote_code)


def describes_model(directory: Path) -> bool:
    """Whether ``open_untrained`` can build the model of ``directory``."""
    return any((directory / name).is_file() for name in ("config.json", GRAPH_FILE))


def open_graph_model(
    path: Path, *, device: torch.device, dtype: str | None, processor: str | Path | None
) -> LoadedModel:
    """An ``.onnx`` file, with the tokenizer and image processor of a directory if one is given.

    Raises:
        UserError: no such file or directory, or a device or dtype that a graph in a file does not have.
    """
    if not path.is_file():
        raise UserError(f"model '{path}': there is no such file")
    check_graph_file(path)
    if device.type != "cpu":
        raise UserError(f"model '{path}': ONNX files are calibrated by onnxruntime on the CPU, not on '{device}'")
    if dtype not in (None, "auto"):
        raise UserError(
            f"model '{path}': a graph computes in the types that it has; --dtype {dtype} is for torch models"
        )
    module = GraphModule(path)
    if processor is None:
        return LoadedModel(module, ModelKind.MODULE, str(path))
    directory = Path(processor)
    if not directory.is_dir():
        raise UserError(f"processor '{processor}': there is no such directory; it holds the tokenizer's files")
    head = read_sentence_head(directory)
    rules = TextRules(max_length=head.max_length if head else None, is_lower_case=head.is_lower_case if head else False)
    kind = _kind_of_graph(module)
    return LoadedModel(module, kind, str(path), directory, Processor(directory, rules=rules), head)


def _kind_of_graph(module: GraphModule) -> ModelKind:
    """What a graph is, from what goes in and comes out."""
    ranks = {value.name: len(value.shape or ()) for value in module.session.get_outputs()}
    takes_texts = "input_ids" in module.input_names
    if takes_texts and "pixel_values" in module.input_names:
        return ModelKind.MODULE
    if "logits" not in ranks:
        return ModelKind.TEXT_ENCODER if takes_texts else ModelKind.IMAGE_ENCODER
    if takes_texts:
        return ModelKind.CAUSAL_LM if ranks["logits"] == 3 else ModelKind.TEXT_CLASSIFIER
    return ModelKind.IMAGE_CLASSIFIER


def describe_module(model: nn.Module, processor: Any = None) -> LoadedModel:
    """A module handed in from Python; of a transformers model the kind and the processor's files are found.

    Raises:
        UserError: ``processor`` is not one, or ``model`` is a SentenceTransformer.
    """
    _refuse_sentence_transformer(model)
    model.eval()
    source = type(model).__name__
    if _is_pretrained(model):
        loaded = _describe(model, source, _directory_of(model), trust_remote_code=False)
    else:
        kind = ModelKind.DUAL_ENCODER if embeds_both(model) else ModelKind.MODULE
        loaded = LoadedModel(model, kind, source)
    return _with_processor(loaded, processor)


def check_device(device: str) -> torch.device:
    """The device that ``device`` names.

    Raises:
        UserError: no such device on this machine.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"device '{device}' cannot be used: {first_line}. 'cpu' always works") from error
    return target


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}, auto")


def _is_pretrained(model: nn.Module) -> bool:
    """A model of transformers; without importing it, as a model of it has done that."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _directory_of(model: Any) -> Path | None:
    """Where ``from_pretrained`` found the model, when that is a directory here."""
    name = model.config.name_or_path
    return Path(name) if name and Path(name).is_dir() else None


def _describe(model: Any, source: str, directory: Path | None, *, trust_remote_code: bool) -> LoadedModel:
    """A transformers model with its kind, head and processor."""
    config = model.config
    kind = kind_of_class(type(model), is_encoder_decoder=getattr(config, "is_encoder_decoder", False))
    if kind is ModelKind.MODULE and embeds_both(model):
        kind = ModelKind.DUAL_ENCODER
    head = read_sentence_head(directory) if directory is not None else None
    rules = text_rules(config, kind, head)
    processor = Processor(directory, rules=rules, trust_remote_code=trust_remote_code) if directory else None
    return LoadedModel(model, kind, source, directory, processor, head if kind is ModelKind.TEXT_ENCODER else None)


def text_rules(config: Any, kind: ModelKind, head: SentenceHead | None) -> TextRules:
    """How a model of this configuration wants its texts."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    limits = [n for n in (positions, head.max_length if head else None) if n]
    return TextRules(
        max_length=min(limits, default=None),
        pads_to_limit=kind is ModelKind.DUAL_ENCODER and config.model_type.startswith("siglip"),
        pads_right=kind in (ModelKind.CAUSAL_LM, ModelKind.SEQ2SEQ_LM),
        is_lower_case=head.is_lower_case if head else False,
    )


def _open_factory(source: str, *, device: torch.device, dtype: str | None) -> LoadedModel:
    made = import_callable(source)()
    model, processor = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"'{source}' returned a {type(made).__name__}; a factory returns a torch module, "
            "or a module and its processor"
        )
    if dtype not in (None, "auto"):
        model = model.to(DTYPES[dtype])
    loaded = describe_module(model.to(device), processor)
    loaded.source = source
    return loaded


def _with_processor(loaded: LoadedModel, processor: Any) -> LoadedModel:
    if processor is None:
        return loaded
    rules = text_rules(loaded.config, loaded.kind, loaded.head) if loaded.config is not None else TextRules()
    wrapped = wrap_processor(processor, rules=rules, directory=loaded.directory)
    if wrapped is not None:
        loaded.processor = wrapped
    elif callable(processor):
        loaded.collate = processor
    else:
        raise UserError(
            f"the processor of model '{loaded.source}' is a {type(processor).__name__}; it can be a tokenizer, an "
            "image processor or a processor of transformers, or a function that makes a batch of a list of samples"
        )
    return loaded


def _refuse_sentence_transformer(model: nn.Module) -> None:
    package = sys.modules.get("sentence_transformers")
    if package is not None and isinstance(model, package.SentenceTransformer):
        raise UserError(
            "a SentenceTransformer is a pipeline around a model: pass its directory, "
            "or the model inside it, `model[0].auto_model`"
        )


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
