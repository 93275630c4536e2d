"""Perplexity of a causal language model.

The recipe is https://huggingface.co/docs/transformers/perplexity: the text is one row of tokens, cut into windows.

Shapes: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.errors import UserError
from octavo.evaluate.metrics import Measure, exponential, ratio_of_sums, scaled
from octavo.evaluate.outputs import Outputs
from octavo.evaluate.passes import Options
from octavo.sources import Dataset, LoadedModel, ModelKind, check_inputs, logits, processor_of, window_length


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``begin`` to ``end``, of which those from ``first`` on count."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood of a token, given those before it in its window.

    The first token of the first window has nothing before it and does not count, nor does that of any window when
    they do not overlap. Where windows overlap, a token counts once: in the window that shows it first.
    """

    name: str
    data: Dataset
    options: Options = field(default_factory=Options)
    kind: ClassVar[str] = "perplexity"

    def __post_init__(self) -> None:
        if not self.data.kind.has_texts:
            raise UserError(
                f"task '{self.name}': perplexity needs texts, and '{self.data.name}' has {self.data.kind.value}"
            )

    def check(self, loaded: LoadedModel) -> None:
        """Raise ``UserError`` unless ``loaded`` is a causal language model and the window fits it."""
        if loaded.kind is not ModelKind.CAUSAL_LM:
            raise UserError(
                f"task '{self.name}': perplexity needs a causal language model, and model '{loaded.source}' is a "
                f"{loaded.kind.value}"
            )
        check_inputs(loaded, texts=True, pictures=False, needed_by=f"task '{self.name}'")
        length = window_length(loaded, self.options.max_length)
        if length < 2 or (self.options.stride or 1) > length:
            raise UserError(
                f"task '{self.name}': windows of {length} tokens, {self.options.stride or length} apart, would leave "
                "tokens out; the window must have at least 2, and the stride be no longer than the window"
            )

    def outputs(self, loaded: LoadedModel) -> Outputs | None:
        """None: the text itself is what is compared with."""
        return None

    @torch.inference_mode()
    def evaluate(self, loaded: LoadedModel, reference: Outputs | None = None) -> dict[str, Measure]:
        """``perplexity`` and ``bits_per_byte``; a window is a sample."""
        self.check(loaded)
        text = self.data.text_stream()
        tokens = processor_of(loaded).token_ids(text)
        length = window_length(loaded, self.options.max_length)
        found = windows(len(tokens), length, self.options.stride or length)
        if not found:
            raise UserError(f"task '{self.name}': the text of '{self.data.name}' has fewer than two tokens")
        nats = [loss for chunk in _alike(found, self.options.batch_size) for loss in _nats(loaded, tokens, chunk)]
        counted = torch.tensor([float(window.end - window.first) for window in found])
        loss = ratio_of_sums(torch.tensor(nats, dtype=torch.float64), counted)
        tokens_per_byte = len(tokens) / len(text.encode())
        return {"perplexity": exponential(loss), "bits_per_byte": scaled(loss, tokens_per_byte / math.log(2))}


def windows(num_tokens: int, length: int, stride: int) -> list[Window]:
    """Windows that together count every token with something before it once.

    >>> windows(5, 3, 2)
    [Window(begin=0, first=1, end=3), Window(begin=2, first=3, end=5)]
    """
    found: list[Window] = []
    seen = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        first = max(seen, begin + 1)
        if first < end:
            found.append(Window(begin, first, end))
        seen = end
        if end == num_tokens:
            break
    return found


def _alike(found: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Neighbours of the same length, at most ``batch_size`` of them."""
    chunk: list[Window] = []
    for window in found:
        is_alike = not chunk or chunk[0].end - chunk[0].begin == window.end - window.begin
        if chunk and (not is_alike or len(chunk) == batch_size):
            yield chunk
            chunk = []
        chunk.append(window)
    if chunk:
        yield chunk


def _nats(loaded: LoadedModel, tokens: Tensor, chunk: Sequence[Window]) -> list[float]:
    """Negative log-likelihood of the counted tokens of each window."""
    input_ids = torch.stack([tokens[window.begin : window.end] for window in chunk])
    logits_BTV = logits(loaded, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
    return [_window_nats(row, ids, window) for row, ids, window in zip(logits_BTV, input_ids, chunk, strict=True)]


def _window_nats(logits_TV: Tensor, ids_T: Tensor, window: Window) -> float:
    start = window.first - window.begin
    predicted = logits_TV[start - 1 : -1].float()
    return float(F.cross_entropy(predicted, ids_T[start:].to(predicted.device), reduction="sum"))
