"""Times one library on the encoder. ``simulate.py`` starts one of these in each venv and lets them take turns.

The measuring is the same code for both; what differs is in the two small classes. Knows nothing of octavo until it
is asked for it. Reads a line for each turn, writes one JSON object for it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
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
    recipes: tuple[str, ...]  # of those that can be asked for

    def get_ready(self) -> None:
        """What happens once on a machine: compilation."""

    def quantize(self, model: nn.Module, recipe: str, batches: list[Batch]) -> None:
        """Everything a user waits for: insert quantizers and calibrate them."""

    def inserter(self, model: nn.Module, recipe: str) -> Callable[[], Any]:
        """A function that inserts the quantizers and does nothing else."""


class Octavo:
    """The presets of these names."""

    recipes = ("fp8", "int8", "nvfp4", "mxfp4")

    def __init__(self) -> None:
        import octavo

        self.version = f"octavo {octavo.__version__}"

    def get_ready(self) -> None:
        from octavo.backends.native import LIBRARY

        if os.environ.get("OCTAVO_COMPILE") != "off" and not LIBRARY.wait():
            raise RuntimeError(LIBRARY.reason)

    def quantize(self, model: nn.Module, recipe: str, batches: list[Batch]) -> None:
        import octavo

        octavo.quantize(model, recipe, batches)

    def inserter(self, model: nn.Module, recipe: str) -> Callable[[], Any]:
        import octavo
        from octavo.nn.door import TorchDoor
        from octavo.spec.resolve import resolve

        door = TorchDoor(model)
        plan = resolve(octavo.load_recipe(recipe), door.facts())
        return lambda: door.prepare(plan)


class ModelOpt:
    """The default configurations of its own; block formats raise on a CPU."""

    def __init__(self) -> None:
        import modelopt
        import modelopt.torch.quantization as mtq

        self.version = f"ModelOpt {modelopt.__version__}"
        self._mtq = mtq
        self._configs = {"fp8": mtq.FP8_DEFAULT_CFG, "int8": mtq.INT8_DEFAULT_CFG}
        self.recipes = tuple(self._configs)

    def get_ready(self) -> None:
        """Nothing: it compiles nothing on a CPU."""

    def quantize(self, model: nn.Module, recipe: str, batches: list[Batch]) -> None:
        self._mtq.quantize(model, self._configs[recipe], lambda m: forward(m, batches))

    def inserter(self, model: nn.Module, recipe: str) -> Callable[[], Any]:
        config = {**self._configs[recipe], "algorithm": None}
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

    def __init__(self, library: Library, model: nn.Module, batches: list[Batch], recipes: list[str]) -> None:
        self.library, self.model, self.batches = library, model, batches
        self.recipes = [recipe for recipe in recipes if recipe in library.recipes]

    def warm_up(self) -> dict[str, Any]:
        """Everything once; what the first time costs more is reported apart."""
        compile_s = seconds(self.library.get_ready)
        forward(self.model, self.batches[:1])
        twin = copy.deepcopy(self.model)
        first = seconds(lambda: self.library.quantize(twin, self.recipes[0], self.batches[:1]))
        first_forward = seconds(lambda: forward(twin, self.batches[:1]))
        once = {"compile_s": compile_s, "first_quantize_s": first, "first_simulated_batch_s": first_forward}
        return {"recipes": self.recipes, **once}

    def turn(self) -> dict[str, dict[str, float]]:
        """One of everything, recipe by recipe."""
        return {recipe: self._measure(recipe) for recipe in self.recipes}

    def _measure(self, recipe: str) -> dict[str, float]:
        """Bare passes, quantization, then both models batch by batch in alternation."""
        before_s = seconds(lambda: forward(self.model, self.batches))
        twin = copy.deepcopy(self.model)
        quantize_s = seconds(lambda: self.library.quantize(twin, recipe, self.batches))
        after_s = seconds(lambda: forward(self.model, self.batches))
        forward(twin, self.batches[:1])
        plain_s, simulated_s = self._alternate(twin)
        return {
            "bare_s": before_s,
            "quantize_ratio": quantize_s / ((before_s + after_s) / 2),
            "simulated_ratio": simulated_s / plain_s,
            "insert_ms_per_linear": min(self._insert_ms(recipe) for _ in range(_NUM_INSERTIONS)),
        }

    def _alternate(self, twin: nn.Module) -> tuple[float, float]:
        """Seconds of a batch, the median of all."""
        plain: list[float] = []
        simulated: list[float] = []
        for batch in self.batches:
            plain.append(seconds(lambda: forward(self.model, [batch])))  # noqa: B023 (called at once)
            simulated.append(seconds(lambda: forward(twin, [batch])))  # noqa: B023
        return statistics.median(plain), statistics.median(simulated)

    def _insert_ms(self, recipe: str) -> float:
        model = copy.deepcopy(self.model)
        num_linear = sum(isinstance(module, nn.Linear) for module in model.modules())
        return 1000 * seconds(self.library.inserter(model, recipe)) / num_linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--model", required=True)
    for name in ("texts", "tokens", "batch-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--recipes", nargs="+", required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries talk; the answers are for the other process
    from transformers import AutoModel

    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    batches = make_batches(args.texts, args.tokens, args.batch_size, model.config.vocab_size)
    library = LIBRARIES[args.library]()
    turns = Turns(library, model, batches, args.recipes)
    first = {"version": library.version, "torch": torch.__version__, **turns.warm_up()}
    print(json.dumps(first), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turns.turn()), file=answers, flush=True)


if __name__ == "__main__":
    main()
