"""Two real models, what they are calibrated with, and what quantization did to them: the same for every library.

``octavo_cells.py`` and the peers' ``*_cells.py`` beside it are run by ``benchmarks/quality/algorithms.py``, each in its
library's own venv::

    python -m benchmarks.peers.modelopt_cells --subject encoder --model DIR --test FILE --method "int8 smoothquant" \
        --calibration DRAW.jsonl --calibration ANOTHER.jsonl

and print a line of JSON with their version and then one for each draw. Knows nothing of octavo.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
Values = dict[str, float]
Method = Callable[[nn.Module, "Draw"], nn.Module]
"""Quantizes a model with the data of a draw, and gives back what simulates it."""


class Subject(Protocol):
    """A model, and how it is judged."""

    def __init__(self, directory: str, test: Path, limit: int | None, kept: Path | None) -> None: ...

    tokenizer: Any
    max_length: int

    def open(self) -> nn.Module:
        """The unquantized model, in fp32."""

    def batches(self, texts: list[str]) -> list[Batch]:
        """What is run to calibrate."""

    def judge(self, model: nn.Module) -> Values:
        """What the quantized model lost."""


class Draw:
    """Texts to calibrate with, as batches and as rows of tokens."""

    def __init__(self, subject: Subject, path: Path) -> None:
        self.subject = subject
        self.batches = subject.batches(read_texts(path))

    def run(self, model: nn.Module) -> None:
        """Every batch through ``model``."""
        with torch.no_grad():
            for batch in self.batches:
                model(**batch)

    def rows(self) -> list[list[int]]:
        """Tokens of every text, without padding."""
        pairs = ((batch["input_ids"], batch["attention_mask"]) for batch in self.batches)
        return [row[mask.bool()].tolist() for ids, masks in pairs for row, mask in zip(ids, masks, strict=True)]


class Encoder:
    """A sentence encoder: the mean cosine of its embeddings with those of the unquantized model."""

    max_length = 256  # what the model's own sentence_bert_config.json says

    def __init__(self, directory: str, test: Path, limit: int | None = None, kept: Path | None = None) -> None:
        self.directory = directory
        model, self.tokenizer = open_encoder(directory)
        self.texts = read_texts(test, limit)
        made = keep(kept, lambda: {"embeddings": embed(model, self.tokenizer, self.texts)})
        self.reference = made["embeddings"]

    def open(self) -> nn.Module:
        return open_encoder(self.directory)[0]

    def batches(self, texts: list[str]) -> list[Batch]:
        return [batch for batch, _ in sorted_batches(self.tokenizer, texts)]

    def judge(self, model: nn.Module) -> Values:
        found = embed(model, self.tokenizer, self.texts)
        return {"cosine": F.cosine_similarity(found.double(), self.reference.double()).mean().item()}


class Language:
    """A causal language model: perplexity on text that training did not see, and divergence from the unquantized."""

    max_length = 512

    def __init__(self, directory: str, test: Path, limit: int | None = None, kept: Path | None = None) -> None:
        from transformers import AutoTokenizer

        self.directory = directory
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        windows = self._windows([test.read_text(encoding="utf-8")])
        chosen = torch.linspace(0, len(windows) - 1, min(limit or len(windows), len(windows))).long()
        self.windows = windows[chosen]
        made = keep(kept, self._made)
        self.reference = made["log_probabilities"].split(8)

    def open(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
        return model

    def batches(self, texts: list[str]) -> list[Batch]:
        parts = self._windows(texts).split(8)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]

    @torch.inference_mode()
    def judge(self, model: nn.Module) -> Values:
        divergence, before, after, count = 0.0, 0.0, 0.0, 0
        for part, wanted in zip(self.windows.split(8), self.reference, strict=True):
            found, targets = self._log_probabilities(model, part), part[:, 1:, None]
            divergence += (wanted.exp() * (wanted - found)).sum().item()
            before -= wanted.gather(-1, targets).double().sum().item()
            after -= found.gather(-1, targets).double().sum().item()
            count += targets.numel()
        increase = torch.tensor((after - before) / count).exp().item() - 1
        return {"kl": divergence / count, "increase": 100 * increase}

    def _windows(self, texts: list[str]) -> Tensor:
        ids = self.tokenizer("\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
        size = self.max_length
        return ids[: len(ids) // size * size].view(-1, size)

    @torch.inference_mode()
    def _made(self) -> dict[str, Tensor]:
        model = self.open()
        return {"log_probabilities": torch.cat([self._log_probabilities(model, x) for x in self.windows.split(8)])}

    @staticmethod
    def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


SUBJECTS: dict[str, type[Subject]] = {"encoder": Encoder, "language": Language}


def keep(path: Path | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the file has; where there is none, what ``make`` gives, which goes there."""
    from safetensors.torch import load_file, save_file

    if path is not None and path.exists():
        found: dict[str, Tensor] = load_file(path)
        return found
    made = make()
    if path is not None:
        partial = path.with_suffix(f".{os.getpid()}")
        save_file(made, partial)
        partial.replace(path)
    return made


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """Texts of JSON lines; queries and documents in turn where they are pairs."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:limit]
    return [text for row in rows for text in ([row["text"]] if "text" in row else [row["query"], row["document"]])]


def open_encoder(directory: str) -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(directory, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(directory)


def sorted_batches(tokenizer: Any, texts: list[str]) -> list[tuple[Batch, list[int]]]:
    """Texts of like length together, and which they are."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [order[start : start + 32] for start in range(0, len(order), 32)]
    shape: dict[str, Any] = {"padding": True, "truncation": True, "max_length": Encoder.max_length}
    return [(dict(tokenizer([texts[i] for i in part], **shape, return_tensors="pt")), part) for part in parts]


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """``(N, D)`` unit vectors: the mean over the tokens that the mask keeps, normalized."""
    rows, places = [], []
    for inputs, part in sorted_batches(tokenizer, texts):
        hidden_BTD = model(**inputs).last_hidden_state
        mask_BT1 = inputs["attention_mask"].unsqueeze(-1).float()
        rows.append(F.normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=1))
        places += part
    return torch.cat(rows)[torch.tensor(places).argsort()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--subject", choices=SUBJECTS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, action="append", help="one file for each draw")
    parser.add_argument("--method", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--reference", type=Path, help="where the unquantized model's outputs are kept")
    return parser


def main(package: str, methods: Mapping[str, Method]) -> None:
    """Judge one of ``methods`` on every draw, and say which version of ``package`` it was."""
    warnings.filterwarnings("ignore")
    args = _parser().parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # libraries talk; the answers are for the other process
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    answer({"version": version(package), "torch": torch.__version__})
    subject = SUBJECTS[args.subject](args.model, args.test, args.limit, args.reference)
    for path in args.calibration:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            model = methods[args.method](subject.open(), Draw(subject, path))
            seconds = time.perf_counter() - start
            values = subject.judge(model)
        except Exception as error:  # a library's failure is a result
            answer({"draw": path.stem, "failed": f"{type(error).__name__}: {error}"[:300]})
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer({"draw": path.stem, "values": values, "seconds": round(seconds, 1), "peak_mb": round(peak)})
        del model
        gc.collect()
