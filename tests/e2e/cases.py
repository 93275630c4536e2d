"""Which recipe, data and tasks each kind of model is taken through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cli.running import fine


@dataclass(frozen=True)
class Case:
    """One model: what it is quantized with, and what must be left of it in the record."""

    model: str
    recipe: str
    data: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def task_options(self) -> list[str]:
        return [word for task in self.tasks for word in ("--task", task)]

    def quantize(self, out: Path) -> Path:
        """Quantize, judge and export in one command."""
        words = ("--recipe", self.recipe, "--data", self.data, *self.task_options)
        fine("quantize", self.model, *words, "--out", out, "--layout", "modelopt", "--quiet")
        return out


_PAIRS, _PLATES, _PROSE = "pairs.jsonl", "plates/plates.jsonl", "prose.txt"
_RETRIEVAL = ("retrieval.r_at_1", "retrieval.r_at_5", "retrieval.reverse_r_at_1", "retrieval.reverse_r_at_5")
_FIDELITY = ("fidelity.cosine", "fidelity.sqnr_db")
_LOGITS = (*_FIDELITY, "fidelity.kl", "fidelity.top1_agreement")
_PERPLEXITY = ("perplexity.perplexity", "perplexity.bits_per_byte")

_ALL = (
    Case(
        "clip",
        "fp8-attention",
        _PLATES,
        (f"retrieval:{_PLATES}", "zeroshot:folders", f"fidelity:{_PLATES}"),
        (*_RETRIEVAL, "zeroshot.top1", *_FIDELITY),
    ),
    Case("siglip", "int8", "folders", (f"retrieval:{_PLATES}", "zeroshot:folders"), (*_RETRIEVAL, "zeroshot.top1")),
    Case("bert", "fp8", _PAIRS, (f"retrieval:{_PAIRS}", "fidelity:texts.jsonl"), (*_RETRIEVAL, *_FIDELITY)),
    Case("sentence_encoder", "int8", _PAIRS, (f"retrieval:{_PAIRS}",), _RETRIEVAL),
    Case("vit", "fp8-attention", "folders", ("classification:folders",), ("classification.top1",)),
    Case("resnet", "int8", "folders", ("classification:folders", "fidelity:folders"), _LOGITS),
    Case("llama", "fp8-attention", _PROSE, (f"perplexity:{_PROSE}", f"fidelity:{_PROSE}"), (*_PERPLEXITY, *_LOGITS)),
    Case("llama_tied", "fp8-dynamic", "texts.jsonl", (f"perplexity:{_PROSE}",), _PERPLEXITY),
    Case("gpt2", "int8-weight-only", _PROSE, (f"perplexity:{_PROSE}",), _PERPLEXITY),
    Case("bart", "fp8-attention", "texts.jsonl", ("fidelity:texts.jsonl",), _LOGITS),
    Case("t5", "int8", _PAIRS, (f"fidelity:{_PAIRS}",), _LOGITS),
    Case(
        "tower_of_mine:build",
        "fp8-attention",
        "tower_of_mine:signals",
        ("mine=fidelity:tower_of_mine:signals",),
        ("mine.cosine", "mine.sqnr_db"),
    ),
)
CASES = {case.model: case for case in _ALL}
