"""Loads what transformers can load, from a directory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.errors import UserError
from octavo.sources.directories import check_weights, read_config
from octavo.sources.extras import require
from octavo.sources.quantized_checkpoints import ask_for_plain_weights, forget_quantization

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_pretrained(directory: Path, *, dtype: str, trust_remote_code: bool) -> nn.Module:
    """The model in ``directory`` with its weights, on the CPU.

    Args:
        directory: with ``config.json`` and safetensors.
        dtype: a key of ``DTYPES``, or ``auto`` for the checkpoint's own.
        trust_remote_code: run code that lies beside the weights.

    Raises:
        UserError: the directory holds no such model.
    """
    config, model_class = _find_class(directory, trust_remote_code=trust_remote_code)
    check_weights(directory)
    method = ask_for_plain_weights(config, directory)
    if method == "compressed-tensors":
        require("compressed_tensors", needed_for=f"reading the compressed-tensors checkpoint in {directory}")
    try:
        with _quiet():
            model, notes = model_class.from_pretrained(
                directory,
                config=config,
                dtype=dtype if dtype == "auto" else DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise UserError(f"model directory {directory} could not be opened: {error}") from error
    if method:
        forget_quantization(model, directory)
    _check_complete(directory, model, notes)
    loaded: nn.Module = model
    return loaded


def build_untrained(directory: Path, *, dtype: str, trust_remote_code: bool = False) -> nn.Module:
    """The model that ``config.json`` in ``directory`` describes, with arbitrary weights.

    Raises:
        UserError: ``config.json`` is missing or describes no model that is known.
    """
    config, model_class = _find_class(directory, trust_remote_code=trust_remote_code)
    wanted = config.dtype if dtype == "auto" else DTYPES[dtype]
    if issubclass(model_class, nn.Module):
        untrained: nn.Module = model_class._from_config(config, dtype=wanted)
    else:  # one of the Auto classes
        untrained = model_class.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    return untrained


def _find_class(directory: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The configuration in ``directory`` and the class it asks for."""
    raw = read_config(directory)
    require("transformers", needed_for=f"opening the model in {directory}")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_config_problem(directory, raw, error)) from error
    names = config.architectures or []
    is_own_code = trust_remote_code and bool(raw.get("auto_map"))
    if not (directory / "modules.json").is_file() and names and not is_own_code:
        model_class = getattr(transformers, names[0], None)
        if model_class is None:
            raise UserError(
                f"model directory {directory}: the installed transformers {transformers.__version__} has no "
                f"'{names[0]}'; a newer version may, or the model brings its own code (--trust-remote-code)"
            )
        return config, model_class
    return config, getattr(
        transformers, _auto_class(raw, is_encoder_decoder=getattr(config, "is_encoder_decoder", False))
    )


def _auto_class(raw: dict[str, Any], *, is_encoder_decoder: bool) -> str:
    """Which of transformers' Auto classes opens a model that names no class of transformers itself."""
    own = {key: value for key, value in (raw.get("auto_map") or {}).items() if key.startswith("AutoModel")}
    for key, value in own.items():
        if str(value).rpartition(".")[2] in (raw.get("architectures") or []):
            return str(key)
    # sentence-transformers opens its encoders so, whatever head they were trained with; of T5 the encoder
    return "AutoModelForTextEncoding" if is_encoder_decoder and not own else "AutoModel"


def _config_problem(directory: Path, raw: dict[str, Any], error: Exception) -> str:
    if raw.get("auto_map"):
        return (
            f"model directory {directory} brings its own code ({', '.join(sorted(raw['auto_map']))}); read it, "
            "and pass --trust-remote-code if you want it to run"
        )
    return (
        f"model directory {directory}: the installed transformers does not know model type "
        f"'{raw.get('model_type')}' ({str(error).splitlines()[0]})"
    )


def _check_complete(directory: Path, model: nn.Module, notes: dict[str, Any]) -> None:
    """Weights that the files lack were made up: a few are an unused head, many are another model."""
    missing = sorted(notes.get("missing_keys") or ())
    if len(missing) > len(model.state_dict()) // 2:
        raise UserError(
            f"model directory {directory}: the files lack {len(missing)} of the model's {len(model.state_dict())} "
            f"tensors, such as '{missing[0]}': they are not the weights of a {type(model).__name__}"
        )
    if missing:
        logger.warning("%s: %d tensors are not in the files and were made up: %s", directory, len(missing), missing[:4])


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers while it reads weights."""
    from transformers.utils import logging as hf_logging

    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
