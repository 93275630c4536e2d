"""Times one library on the encoder. ``simulate.py`` starts one of these in each venv and lets them take turns.

The measuring is the same code for both; what differs is in the two small classes. Knows nothing of octavo until it
is asked for it. Reads a line for each turn, writes one JSON object for it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
_FIRST_WORD = 1000  # below are the special and the unused tokens of BERT's vocabulary
_NUM_INSERTIONS = 3


class Library(Protocol):
    """What is timed."""

    version: str

    def quantize(self, model: nn.Module, batches: list[Batch]) -> None:
        """Everything a user waits for: insert FP8 quantizers and calibrate them."""

    def inserter(self, model: nn.Module) -> Callable[[], Any]:
        """A function that inserts the quantizers and does nothing else."""


class Octavo:
    """Preset ``fp8``."""

    def __init__(self) -> None:
        import octavo

        self.version = f"octavo {octavo.__version__}"

    def quantize(self, model: nn.Module, batches: list[Batch]) -> None:
        import octavo

        octavo.quantize(model, "fp8", batches)

    def inserter(self, model: nn.Module) -> Callable[[], Any]:
        import octavo
        from octavo.nn.door import TorchDoor

        door = TorchDoor(model)
        plan = octavo.load_recipe("fp8")
        from octavo.spec.resolve import resolve

        resolved = resolve(plan, door.facts())
        return lambda: door.prepare(resolved)


class ModelOpt:
    """``FP8_DEFAULT_CFG``."""

    def __init__(self) -> None:
        import modelopt
        import modelopt.torch.quantization as mtq

        self.version = f"ModelOpt {modelopt.__version__}"
        self._mtq = mtq

    def quantize(self, model: nn.Module, batches: list[Batch]) -> None:
        self._mtq.quantize(model, self._mtq.FP8_DEFAULT_CFG, lambda m: forward(m, batches))

    def inserter(self, model: nn.Module) -> Callable[[], Any]:
        config = {**self._mtq.FP8_DEFAULT_CFG, "algorithm": None}
        return lambda: self._mtq.quantize(model, config)


LIBRARIES: dict[str, type[Library]] = {"octavo": Octavo, "modelopt": ModelOpt}


def forward(model: nn.Module, batches: list[Batch]) -> None:
    """A plain loop, as users write it."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def make_batches(num_texts: int, num_tokens: int, batch_size: int, vocabulary: int) -> list[Batch]:
    """Random words, the same in every process; no padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_FIRST_WORD, vocabulary, (num_texts, num_tokens), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch_size)]


class Turns:
    """The model as it was, a quantized twin, and the time of everything."""

    def __init__(self, library: Library, model: nn.Module, batches: list[Batch]) -> None:
        self.library, self.model, self.batches = library, model, batches
        self.twin = copy.deepcopy(model)

    def warm_up(self) -> dict[str, float]:
        """Everything once; what the first time costs more is reported apart."""
        forward(self.model, self.batches[:1])
        first_quantize = seconds(lambda: self.library.quantize(self.twin, self.batches[:1]))
        first_forward = seconds(lambda: forward(self.twin, self.batches[:1]))
        return {"first_quantize_s": first_quantize, "first_simulated_batch_s": first_forward}

    def turn(self) -> dict[str, Any]:
        """One of everything: bare passes, quantization, then both models batch by batch in alternation."""
        bare_s = seconds(lambda: forward(self.model, self.batches))
        self.twin = copy.deepcopy(self.model)
        quantize_s = seconds(lambda: self.library.quantize(self.twin, self.batches))
        forward(self.twin, self.batches[:1])
        plain_s, simulated_s = self._alternate()
        return {
            "bare_s": bare_s,
            "quantize_ratio": quantize_s / ((bare_s + plain_s) / 2),
            "simulated_ratio": simulated_s / plain_s,
            "insert_ms_per_linear": min(self._insert_ms() for _ in range(_NUM_INSERTIONS)),
        }

    def _alternate(self) -> tuple[float, float]:
        plain_s = simulated_s = 0.0
        for batch in self.batches:
            plain_s += seconds(lambda: forward(self.model, [batch]))  # noqa: B023 (called at once)
            simulated_s += seconds(lambda: forward(self.twin, [batch]))  # noqa: B023
        return plain_s, simulated_s

    def _insert_ms(self) -> float:
        model = copy.deepcopy(self.model)
        num_linear = sum(isinstance(module, nn.Linear) for module in model.modules())
        return 1000 * seconds(self.library.inserter(model)) / num_linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--model", required=True)
    for name in ("texts", "tokens", "batch-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries talk; the answers are for the other process
    from transformers import AutoModel

    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    batches = make_batches(args.texts, args.tokens, args.batch_size, model.config.vocab_size)
    library = LIBRARIES[args.library]()
    turns = Turns(library, model, batches)
    first = {"version": library.version, "torch": torch.__version__, **turns.warm_up()}
    print(json.dumps(first), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turns.turn()), file=answers, flush=True)


if __name__ == "__main__":
    main()
