"""ModelOpt on the encoder and the pairs of ``benchmarks/quality/encoder.py``, which runs this in the peer's own venv.

Knows nothing of octavo. Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks.peers.cell import embed, open_encoder, read_texts
from torch import Tensor

warnings.filterwarnings("ignore")


def read_pairs(path: Path) -> tuple[list[str], list[str]]:
    """Queries and documents."""
    texts = read_texts(path)
    return texts[::2], texts[1::2]


def hits(queries: Tensor, documents: Tensor, k: int) -> Tensor:
    """``(N,)``: is the query's own document among the first k? A tie counts against it."""
    similarity = queries @ documents.T
    own = similarity.diagonal().unsqueeze(1)
    return ((similarity >= own).sum(1) <= k).double()


def paired(quantized: Tensor, baseline: Tensor) -> dict[str, float]:
    """Means, and the standard error of the mean of the differences."""
    error = (quantized - baseline).std() / len(baseline) ** 0.5
    return {"baseline": baseline.mean().item(), "quantized": quantized.mean().item(), "standard_error": error.item()}


def compare(values: list[Tensor], reference: list[Tensor]) -> dict[str, dict[str, float]]:
    """Fidelity over queries and documents together, recall in both directions."""
    ours, theirs = torch.cat(values).double(), torch.cat(reference).double()
    cosine = F.cosine_similarity(ours, theirs)
    noise = (ours - theirs).square().sum()
    metrics = {
        "cosine": {"quantized": cosine.mean().item(), "standard_error": (cosine.std() / len(cosine) ** 0.5).item()},
        "sqnr_db": {"quantized": (10 * torch.log10(theirs.square().sum() / noise)).item()},
    }
    for prefix, turn in (("", 1), ("reverse_", -1)):
        for k in (1, 5):
            metrics[f"{prefix}r_at_{k}"] = paired(hits(*values[::turn], k), hits(*reference[::turn], k))
    return metrics


def configurations() -> dict[str, dict]:
    """ModelOpt's defaults, and INT8 with the inputs of norms left alone."""
    import modelopt.torch.quantization as mtq

    without_norms = dict(mtq.INT8_DEFAULT_CFG)
    norms = {"quantizer_name": "*LayerNorm*", "enable": False}
    without_norms["quant_cfg"] = [*mtq.INT8_DEFAULT_CFG["quant_cfg"], norms]
    return {"FP8 default": mtq.FP8_DEFAULT_CFG, "INT8 default": mtq.INT8_DEFAULT_CFG, "INT8, no norms": without_norms}


def quantize_and_compare(
    directory: str, config: dict, pairs: tuple[list[str], list[str]], calibration: list[str], reference: list[Tensor]
) -> dict:
    """The metrics of one configuration, or why ModelOpt could not."""
    import modelopt.torch.quantization as mtq

    model, tokenizer = open_encoder(directory)
    try:
        mtq.quantize(model, config, lambda m: embed(m, tokenizer, calibration))
        return {"metrics": compare([embed(model, tokenizer, texts) for texts in pairs], reference)}
    except Exception as error:  # a peer's failure is a result
        return {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    import modelopt

    queries, documents = read_pairs(args.pairs)
    pairs = (queries[: args.limit], documents[: args.limit])
    calibration = [text for pair in zip(*read_pairs(args.calibration), strict=True) for text in pair]
    model, tokenizer = open_encoder(args.model)
    reference = [embed(model, tokenizer, texts) for texts in pairs]
    results = {
        name: quantize_and_compare(args.model, config, pairs, calibration, reference)
        for name, config in configurations().items()
    }
    print(json.dumps({"version": modelopt.__version__, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
