"""Texts and pictures to a model's inputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.sources.extras import require

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
# Tokenizers without a limit of their own say 1e30.
_NO_LIMIT = 1_000_000


@dataclass(frozen=True, slots=True)
class TextRules:
    """How a model wants its texts.

    ``pads_to_limit`` fills every text up to ``max_length``: SigLIP was trained so and has no mask
    (https://huggingface.co/docs/transformers/model_doc/siglip). ``pads_right`` overrides the tokenizer's side.
    """

    max_length: int | None = None
    pads_to_limit: bool = False
    pads_right: bool = False
    is_lower_case: bool = False


class Processor:
    """A tokenizer and an image processor, each opened when it is first needed.

    >>> Processor(tokenizer=None).has_texts
    False
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        rules: TextRules = TextRules(),
        trust_remote_code: bool = False,
    ) -> None:
        self.directory = directory
        self.rules = rules
        self._given_tokenizer = tokenizer
        self._given_image_processor = image_processor
        self._trust_remote_code = trust_remote_code

    @property
    def has_texts(self) -> bool:
        """A tokenizer was given, or its files are there."""
        return self._given_tokenizer is not None or self._has_file(TOKENIZER_FILES)

    @property
    def has_pictures(self) -> bool:
        """An image processor was given, or its files are there."""
        return self._given_image_processor is not None or self._has_file(PICTURE_FILES)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, with a padding token."""
        tokenizer = self._given_tokenizer or self._open("AutoTokenizer", "tokenizer", TOKENIZER_FILES)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise UserError(
                    f"{self._place}: the tokenizer has neither a padding token nor an end token; set pad_token"
                )
            tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
        return tokenizer

    @cached_property
    def image_processor(self) -> Any:
        """The image processor: torchvision's where that is installed, else Pillow's, as transformers chooses."""
        return self._given_image_processor or self._open("AutoImageProcessor", "image processor", PICTURE_FILES)

    @property
    def max_length(self) -> int | None:
        """The most tokens a text may have, when anything says so."""
        limit = self.tokenizer.model_max_length
        limits = [value for value in (self.rules.max_length, limit) if value is not None and value < _NO_LIMIT]
        return min(limits, default=None)

    def texts(self, texts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Inputs of ``texts``, ``(B, T)`` each, cut after ``max_length`` tokens and padded.

        Raises:
            UserError: the directory has no tokenizer.
        """
        if self.rules.is_lower_case:
            texts = [text.lower() for text in texts]
        limit = min((n for n in (max_length, self.max_length) if n is not None), default=None)
        if self.rules.pads_to_limit:
            limit = self.max_length
        encoded = self.tokenizer(
            list(texts),
            padding="max_length" if self.rules.pads_to_limit and limit is not None else True,
            truncation=limit is not None,
            max_length=limit,
            return_tensors="pt",
            padding_side="right" if self.rules.pads_right else self.tokenizer.padding_side,
        )
        return dict(encoded)

    def token_ids(self, text: str) -> Tensor:
        """``(num_tokens,)``: all of ``text`` as one row of tokens, not cut."""
        text = text.lower() if self.rules.is_lower_case else text
        return torch.tensor(self.tokenizer(text, truncation=False, verbose=False)["input_ids"], dtype=torch.long)

    def images(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Inputs of pictures, each a PIL image or a uint8 array ``(height, width, 3)``.

        Raises:
            UserError: the directory has no image processor.
        """
        require("PIL", needed_for="reading pictures")
        return dict(self.image_processor(images=[_to_pil(image) for image in images], return_tensors="pt"))

    def pairs(self, images: Sequence[Any], texts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Inputs of pictures and texts together."""
        return {**self.texts(texts, max_length), **self.images(images)}

    @property
    def _place(self) -> str:
        return f"model directory {self.directory}" if self.directory else "the model"

    def _has_file(self, names: Sequence[str]) -> bool:
        return self.directory is not None and any((self.directory / name).is_file() for name in names)

    def _open(self, auto_class: str, what: str, files: Sequence[str]) -> Any:
        if not self._has_file(files):
            raise UserError(f"{self._place} has no {what}; looked for {', '.join(files)}")
        require("transformers", needed_for=f"a model's {what}")
        import transformers

        try:
            return getattr(transformers, auto_class).from_pretrained(
                self.directory, trust_remote_code=self._trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(f"{self._place}: its {what} could not be opened: {error}") from error


def wrap_processor(given: Any, *, rules: TextRules, directory: Path | None = None) -> Processor | None:
    """A ``Processor`` around a tokenizer, an image processor or a processor of transformers; None of anything else."""
    if isinstance(given, Processor):
        return given
    if "transformers" not in sys.modules:
        return None
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.processing_utils import ProcessorMixin
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    match given:
        case PreTrainedTokenizerBase():
            return Processor(directory, tokenizer=given, rules=rules)
        case ImageProcessingMixin():
            return Processor(directory, image_processor=given, rules=rules)
        case ProcessorMixin():
            parts = vars(given)
            return Processor(
                directory, tokenizer=parts.get("tokenizer"), image_processor=parts.get("image_processor"), rules=rules
            )
    return None


def _to_pil(image: Any) -> Any:
    """An RGB picture of Pillow; every image processor takes these the same way."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"a picture is a uint8 array (height, width, 3), not {image.dtype} {image.shape}")
        return Image.fromarray(image)
    return image.convert("RGB")
