"""llm-compressor on the encoder of ``benchmarks/quality/algorithms.py``, which runs this in the peer's own venv.

Knows nothing of octavo. Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

warnings.filterwarnings("ignore")

_MAX_LENGTH = 256  # what the model's own sentence_bert_config.json says


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """Queries and documents in turn."""
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:limit]
    return [text for pair in pairs for text in (pair["query"], pair["document"])]


def open_encoder(directory: str) -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(directory, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(directory)


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """``(N, D)`` unit vectors: the mean over the tokens that the mask keeps, normalized."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = []
    for start in range(0, len(order), 32):
        batch = [texts[i] for i in order[start : start + 32]]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=_MAX_LENGTH, return_tensors="pt")
        hidden_BTD = model(**inputs).last_hidden_state
        mask_BT1 = inputs["attention_mask"].unsqueeze(-1).float()
        rows.append(F.normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1), dim=1))
    return torch.cat(rows)[torch.tensor(order).argsort()]


def recipes() -> dict[str, Callable[[], list[Any]]]:
    """Name -> modifiers."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    def gptq(scheme: str) -> list[Any]:
        return [GPTQModifier(targets="Linear", scheme=scheme, ignore=[])]

    def grouped(size: int) -> list[Any]:
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
        return [GPTQModifier(config_groups={"g": {"targets": ["Linear"], "weights": weights}}, ignore=[])]

    return {
        "int4-group128 gptq": lambda: gptq("W4A16"),
        "int4-group32 gptq": lambda: grouped(32),
        "nvfp4-weight-only gptq": lambda: gptq("NVFP4A16"),
        "nvfp4 gptq": lambda: gptq("NVFP4"),
        "nvfp4 plain": lambda: [QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=[])],
        "mxfp4 gptq": lambda: gptq("MXFP4"),
    }


def cosine(directory: str, modifiers: list[Any], texts: list[str], reference: Tensor, test: list[str]) -> float:
    """Mean cosine of the quantized model's embeddings with the unquantized one's."""
    from datasets import Dataset
    from llmcompressor import oneshot

    model, tokenizer = open_encoder(directory)
    rows = [dict(tokenizer(text, truncation=True, max_length=_MAX_LENGTH)) for text in texts]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=modifiers,
        num_calibration_samples=len(rows),
        max_seq_length=_MAX_LENGTH,
        pipeline="basic",
    )
    return F.cosine_similarity(embed(model, tokenizer, test).double(), reference.double()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, action="append", help="one file for each draw")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    import llmcompressor

    test = read_texts(args.pairs, args.limit)
    model, tokenizer = open_encoder(args.model)
    reference = embed(model, tokenizer, test)
    results: dict[str, Any] = {}
    for name, modifiers in recipes().items():
        if args.only and name not in args.only:
            continue
        try:
            draws = [cosine(args.model, modifiers(), read_texts(path), reference, test) for path in args.calibration]
            results[name] = {"cosines": draws}
        except Exception as error:  # a peer's failure is a result
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps({"version": llmcompressor.__version__, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
