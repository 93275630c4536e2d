"""Finds the directory a model lies in, and refuses what cannot be opened before anything heavy is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from octavo.errors import UserError
from octavo.sources.extras import require
from octavo.sources.quantized_checkpoints import check_readable

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FILES = (*_PICKLES, ".onnx", ".gguf", ".safetensors", ".json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_HUB_LEAVE = ["onnx/*", "openvino/*", "original/*", "consolidated*"]


def find_directory(source: str, *, trust_remote_code: bool) -> Path:
    """The directory of ``source``: itself, or where the hub's files were put.

    Raises:
        UserError: nothing there, a file instead of a directory, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(_file_problem(path))
    if _HUB_ID.fullmatch(source) is None or path.suffix in _FILES:
        raise UserError(
            f"model '{source}': no such directory. A model is a Hugging Face directory or id, "
            "package.module:factory, or demo:NAME"
        )
    return _fetch(source, trust_remote_code=trust_remote_code)


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model that can be opened.

    Raises:
        UserError: not a directory of a model, or of one that is quantized in a way that cannot be undone.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(_no_config_problem(directory))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} holds a value of type {type(config).__name__}, and a model's configuration is an object"
        )
    check_readable(config, directory)
    return config


def check_weights(directory: Path) -> None:
    """Raise ``UserError`` unless safetensors weights lie in ``directory``."""
    if (directory / "run.json").is_file() and (directory / "layout.json").is_file():
        raise UserError(
            f"model directory {directory} is a run, so its weights are quantized already: `octavo evaluate` and "
            "`octavo export` take it; here give the model that it was made from"
        )
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if not pickles:
        raise UserError(f"model directory {directory}: no weights (*.safetensors) next to config.json")
    raise UserError(
        f"model directory {directory}: only pickled weights ({', '.join(pickles[:3])}), and octavo never reads "
        "pickles because loading one can run any code. If you trust the file, convert it once:  "
        f"AutoModel.from_pretrained('{directory}').save_pretrained('NEW_DIRECTORY')  writes safetensors"
    )


def _file_problem(path: Path) -> str:
    match path.suffix:
        case ".gguf":
            return f"model '{path}': a GGUF file is already quantized; give the Hugging Face directory it came from"
        case suffix if suffix in _PICKLES:
            return (
                f"model '{path}': octavo never reads pickles because loading one can run any code. "
                "Give a Hugging Face directory with safetensors, or package.module:factory, "
                "a function of yours that returns the module"
            )
    return f"model '{path}' is a file; give the directory that holds config.json and the safetensors"


def _no_config_problem(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return (
            f"model directory {directory}: an adapter without its base model; merge it first "
            "(PeftModel.merge_and_unload, then save_pretrained) and open the result"
        )
    names = sorted(path.name for path in directory.iterdir())[:8]
    there = f"there is {', '.join(names)}" if names else "it is empty"
    return f"model directory {directory}: no config.json, so it is not a Hugging Face model ({there})"


def _fetch(source: str, *, trust_remote_code: bool) -> Path:
    """The hub's files of ``source``, downloaded or from the cache; never its pickles."""
    require("huggingface_hub", needed_for=f"opening '{source}' from the Hugging Face hub")
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=_HUB_LEAVE))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model '{source}': there is no such directory here ({Path.cwd()}), and as a Hugging Face id it could "
            f"not be fetched: {first_line}. Check the spelling and the connection, or give a local directory"
        ) from error
