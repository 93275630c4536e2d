"""What belongs to a model besides its weights: configuration, tokenizer, processor, pooling, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.errors import UserError

# fmt: off
_WEIGHTS = frozenset((
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot",
    ".tflite", ".npz", ".npy", ".pkl", ".pickle", ".joblib", ".nemo", ".mlmodel", ".tar", ".gz", ".zip",
))
# fmt: on
_RUN_FILES = frozenset(("run.json", "plan.json", "recipe.yaml", "layout.json", "sample.json"))
_STORED_AS = ("quantization_config", "compression_config")
_SUBDIRECTORIES = ("additional_chat_templates",)


def companion_paths(source: Path, *, with_code: bool) -> list[Path]:
    """Paths relative to ``source`` that a written checkpoint needs.

    Everything at the top but weights, hidden files, what makes a run directory one and, unless ``with_code``, Python
    files. Of the subdirectories only those that ``modules.json`` names (sentence-transformers: pooling, dense layers
    with their weights) and chat templates: others hold training states or the same model in other formats.
    """
    own = _RUN_FILES if (source / "run.json").is_file() else frozenset()
    there = [path for path in source.iterdir() if path.is_file() and path.name not in own]
    top = [path for path in there if _is_companion(path, with_code=with_code)]
    found = top + list(_inside_modules(source, with_code=with_code))
    for name in _SUBDIRECTORIES:
        found += [path for path in (source / name).rglob("*") if path.is_file()]
    return sorted(path.relative_to(source) for path in found)


def copy_companions(source: Path, target: Path, *, with_code: bool) -> None:
    """Copy them, the names below ``target`` as they are below ``source``."""
    for relative in companion_paths(source, with_code=with_code):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)
    _forget_quantization(target / "config.json")


def _forget_quantization(path: Path) -> None:
    """A configuration says how the weights beside it are stored: those that it came with no longer are."""
    if not path.is_file() or not any(f'"{key}"' in path.read_text(encoding="utf-8") for key in _STORED_AS):
        return
    config = read_json(path)
    kept = {key: value for key, value in config.items() if key not in _STORED_AS}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def say_untied(path: Path) -> None:
    """A configuration that ties the output head to the embeddings no longer does: readers would ignore its weight."""
    if not path.is_file():
        return
    config = read_json(path)
    inner = config.get("text_config")
    if isinstance(inner, dict):
        inner["tie_word_embeddings"] = False
    path.write_text(json.dumps({**config, "tie_word_embeddings": False}, indent=2) + "\n", encoding="utf-8")


def companion_bytes(source: Path | None, *, with_code: bool) -> int:
    """Bytes that ``copy_companions`` will write."""
    if source is None:
        return 0
    return sum((source / path).stat().st_size for path in companion_paths(source, with_code=with_code))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        UserError: not readable, not JSON, not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a value of type {type(data).__name__} where an object was expected")
    return data


def _is_companion(path: Path, *, with_code: bool) -> bool:
    if path.name.startswith(".") or path.suffix in _WEIGHTS or path.name.endswith(".index.json"):
        return False
    return with_code or path.suffix not in (".py", ".pyc", ".so")


def _inside_modules(source: Path, *, with_code: bool) -> Iterator[Path]:
    """Files of the modules of a sentence-transformers directory, but for the transformer itself."""
    listing = source / "modules.json"
    if not listing.is_file():
        return
    try:
        modules = [
            (str(entry["path"]), str(entry["type"])) for entry in json.loads(listing.read_text(encoding="utf-8"))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{listing} is not a list of sentence-transformers modules: {error!r}") from error
    for name, type_name in modules:
        directory = (source / name).resolve()
        if directory == source.resolve() or not directory.is_relative_to(source.resolve()):
            continue
        is_model = type_name.endswith(".Transformer")
        for path in directory.rglob("*"):
            own_weights = path.suffix == ".safetensors" and not is_model
            if path.is_file() and (own_weights or _is_companion(path, with_code=with_code)):
                yield source / path.relative_to(source.resolve())
