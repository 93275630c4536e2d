"""Which layout a directory has, and its reader."""

from __future__ import annotations

import json
from pathlib import Path

from octavo.errors import UserError
from octavo.readers import modelopt, run
from octavo.readers.checkpoint import Checkpoint
from octavo.readers.tensor_files import open_tensors, read_object


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint ``path``, listed by the reader of its layout.

    Raises:
        UserError: no directory, no layout that is known, or files that do not fit together.
    """
    if not path.is_dir():
        there = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {there}; give the directory of a run or of a checkpoint")
    if (path / "run.json").is_file():
        return run.read(path)
    method = _quantization_method(path)
    if method == "modelopt" or (path / "hf_quant_config.json").is_file():
        return modelopt.read(path)
    if not list(path.glob("model*.safetensors*")):
        raise UserError(f"{path}: no run.json, no hf_quant_config.json and no model.safetensors; {_there(path)}")
    facts = {} if method is None else {"quantization": f"{method} (listed as raw tensors)"}
    return Checkpoint(path, "plain", {}, open_tensors(path, "model"), facts=facts)


def _quantization_method(path: Path) -> str | None:
    config = path / "config.json"
    section = read_object(config).get("quantization_config") if config.is_file() else None
    return str(section.get("quant_method")) if isinstance(section, dict) else None


def _there(path: Path) -> str:
    names = sorted(json.dumps(entry.name) for entry in path.iterdir())[:6]
    return f"there is {', '.join(names)}" if names else "the directory is empty"
