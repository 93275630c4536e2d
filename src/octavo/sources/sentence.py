"""What a sentence-transformers directory does besides its encoder: pooling, projections, prompts.

The files are described at https://sbert.net/docs/package_reference/sentence_transformer/modules.html;
the arithmetic follows that package, and its own ``encode`` is what the tests compare with.

Shapes: B texts, T tokens, D channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from octavo.errors import UserError

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_OLD_MODE_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, slots=True)
class SentenceHead:
    """How the tokens of an encoder become one vector, and how its texts are prepared."""

    modes: tuple[str, ...] = ("mean",)
    stages: tuple[Callable[[Tensor], Tensor], ...] = ()
    max_length: int | None = None
    is_lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def __call__(self, tokens_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """``(B, T, D)`` tokens with their ``(B, T)`` mask to ``(B, dim)`` vectors in fp32."""
        tokens_BTD = tokens_BTD.float()
        vectors = torch.cat([pool(tokens_BTD, mask_BT, mode) for mode in self.modes], dim=-1)
        for stage in self.stages:
            vectors = stage(vectors)
        return vectors

    def prompt(self, role: str | None) -> str:
        """What is written before a text: of a ``"query"``, of a ``"document"``, or of neither (None).

        As ``encode_query``, ``encode_document`` and ``encode`` do it.
        """
        return self.prompts.get(role or self.default_prompt or "", "")


def pool(tokens_BTD: Tensor, mask_BT: Tensor, mode: str) -> Tensor:
    """``(B, D)``: one vector for each text, from the tokens that ``mask_BT`` marks with 1.

    A text without any token gives zeros (``max``: minus infinity).
    """
    mask = mask_BT.to(tokens_BTD.device)
    weights = mask.to(tokens_BTD.dtype)
    match mode:
        case "cls":
            return _take(tokens_BTD, mask.int().argmax(dim=1))
        case "lasttoken":
            return _take(tokens_BTD, mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1))
        case "max":
            return tokens_BTD.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
        case "weightedmean":
            positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            weights = weights * (positions - mask.int().argmax(dim=1, keepdim=True))
    total = (tokens_BTD * weights.unsqueeze(-1)).sum(dim=1)
    count = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def read_sentence_head(directory: Path) -> SentenceHead | None:
    """The head that ``modules.json`` in ``directory`` describes; None when there is no such file.

    Raises:
        UserError: a module that is not understood, or an encoder in a directory of its own.
    """
    if not (directory / "modules.json").is_file():
        return None
    encoder, *rest = _read_json(directory / "modules.json")
    _check_encoder(directory, encoder)
    modes, stages = _read_modules(directory, rest)
    settings = _read_json(directory / "sentence_bert_config.json")
    prompts = _read_json(directory / "config_sentence_transformers.json")
    return SentenceHead(
        modes=modes,
        stages=tuple(stages),
        max_length=settings.get("max_seq_length"),
        is_lower_case=bool(settings.get("do_lower_case", False)),
        prompts={key: text for key, text in (prompts.get("prompts") or {}).items() if text},
        default_prompt=prompts.get("default_prompt_name"),
    )


def _check_encoder(directory: Path, encoder: dict[str, Any]) -> None:
    path = encoder.get("path", "")
    if _type_name(encoder) != "Transformer":
        raise UserError(
            f"{directory}: its first module is a {_type_name(encoder)}, and only a Transformer is understood there; "
            f"if {directory / path} is itself a Hugging Face model, open that"
        )
    if path:
        raise UserError(
            f"{directory}: the encoder lies in {directory / path}, an old layout that is not read; "
            f"save the model again with a current sentence-transformers, or open {directory / path} "
            "(its vectors are then means over the tokens)"
        )


def _read_modules(directory: Path, modules: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[Any]]:
    modes: tuple[str, ...] = ("mean",)
    stages: list[Callable[[Tensor], Tensor]] = []
    for module in modules:
        place = directory / module.get("path", "")
        match _type_name(module):
            case "Pooling":
                modes = _read_pooling(place)
            case "Dense":
                stages.append(_read_dense(place))
            case "Normalize":
                stages.append(_normalize)
            case "Dropout":
                pass  # nothing at inference
            case other:
                known = "Pooling, Dense, Normalize, Dropout"
                raise UserError(f"{directory}: modules.json has a {other} after the encoder; understood are {known}")
    return modes, stages


def _read_pooling(place: Path) -> tuple[str, ...]:
    config = _read_json(place / "config.json")
    declared = config.get("pooling_mode") or [mode for key, mode in _OLD_MODE_KEYS.items() if config.get(key)]
    modes = (declared,) if isinstance(declared, str) else tuple(declared) or ("mean",)
    for mode in modes:
        if mode not in POOLING_MODES:
            raise UserError(f"{place / 'config.json'}: pooling '{mode}' is not one of {', '.join(POOLING_MODES)}")
    if not config.get("include_prompt", True):
        raise UserError(
            f"{place / 'config.json'}: pooling that leaves the prompt out (include_prompt: false) is not supported"
        )
    return modes


def _read_dense(place: Path) -> Callable[[Tensor], Tensor]:
    config = _read_json(place / "config.json")
    activation = str(config.get("activation_function") or "Identity").rpartition(".")[2]
    weights_file = place / "model.safetensors"
    if activation not in _ACTIVATIONS:
        raise UserError(f"{place / 'config.json'}: activation '{activation}' is not one of {', '.join(_ACTIVATIONS)}")
    if config.get("use_residual"):
        raise UserError(f"{place / 'config.json'}: a Dense module with use_residual is not supported")
    if not weights_file.is_file():
        raise UserError(
            f"{place}: no model.safetensors; octavo reads no pickles: save the model again with safetensors"
        )
    tensors = load_file(weights_file)
    weight, bias = tensors["linear.weight"].float(), tensors.get("linear.bias")

    def dense(vectors: Tensor) -> Tensor:
        shift = None if bias is None else bias.to(vectors)
        return _ACTIVATIONS[activation](F.linear(vectors, weight.to(vectors), shift))

    return dense


def _normalize(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)


def _take(tokens_BTD: Tensor, index_B: Tensor) -> Tensor:
    return tokens_BTD[torch.arange(len(index_B), device=tokens_BTD.device), index_B]


def _type_name(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _read_json(path: Path) -> Any:
    """The content of a JSON file; nothing when the file is missing."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
