"""What one look at a model costs on CPU: a traced forward against a plain one, in time and in memory.

    python -m benchmarks.cost.discovery [--model NAME ...] [--rounds N] [--json]

Each model is looked at in a process of its own. Time is the median over rounds in which plain forwards and looks take
turns; the first look, which reads the sources of the model's modules, is told apart. Memory is what the first look adds
to the peak of two plain forwards, as a share of what the model and these forwards take. Single peaks vary by
tens of per cent, so medians over processes are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.machine import describe_machine, one_line
from torch import nn

from octavo.backends.environment import peak_memory_bytes
from octavo.nn.door import TorchDoor

Made = tuple[nn.Module, dict[str, torch.Tensor]]
GOALS = {"time": 3.0, "memory": 0.10}


def encoder() -> Made:
    """A BERT of the size of MiniLM, 16 texts of 128 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config), {"input_ids": torch.randint(5, 1000, (16, 128))}


def decoder() -> Made:
    """A Llama with grouped queries and a cache, 2 texts of 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=1536, vocab_size=8000))
    return model, {"input_ids": torch.randint(5, 1000, (2, 256))}


def written_out() -> Made:
    """A DeBERTa, whose attention is three products and a softmax, 8 texts of 128 tokens."""
    from transformers import DebertaV2Config, DebertaV2Model

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    config = DebertaV2Config(**sizes, relative_attention=True, pos_att_type=["c2p", "p2c"], vocab_size=2000)
    return DebertaV2Model(config), {"input_ids": torch.randint(5, 1000, (8, 128))}


def experts() -> Made:
    """A Mixtral with eight experts in stacks, 2 texts of 128 tokens."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=1024, vocab_size=2000))
    return model, {"input_ids": torch.randint(5, 1000, (2, 128))}


def vision() -> Made:
    """A ViT, 8 pictures of 224 x 224."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTModel(ViTConfig(**sizes)), {"pixel_values": torch.randn(8, 3, 224, 224)}


MODELS: dict[str, Callable[[], Made]] = {f.__name__: f for f in (encoder, decoder, written_out, experts, vision)}


def timed(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str, num_rounds: int) -> dict[str, float]:
    """Figures of one model, in this process."""
    torch.manual_seed(0)
    make = MODELS[name]
    make()  # imports what it needs
    base = peak_memory_bytes()
    model, batch = make()
    model.eval()
    forward = torch.no_grad()(lambda: model(**batch))
    forward()
    forward()
    plain_peak = peak_memory_bytes()
    first = timed(lambda: TorchDoor(model, name, batch).facts())
    look_peak = peak_memory_bytes()
    plain, looks = [], []
    for _ in range(num_rounds):
        plain.append(timed(forward))
        looks.append(timed(lambda: TorchDoor(model, name, batch).facts()))
    forward_s = statistics.median(plain)
    return {
        "forward_s": forward_s,
        "time": statistics.median(looks) / forward_s,
        "first_time": first / forward_s,
        "memory": (look_peak - plain_peak) / (plain_peak - base),
        "num_sites": len(TorchDoor(model, name, batch).facts().sites),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=5, help="the peak of a process varies: medians are shown")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.inside:
        print(json.dumps(measure(args.inside, args.rounds)))
        return
    rows = {}
    for name in args.model or MODELS:
        command = [sys.executable, "-m", "benchmarks.cost.discovery", "--inside", name]
        options = ["--rounds", str(args.rounds), "--threads", str(args.threads)]
        found = []
        for _ in range(args.processes):
            done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        rows[name] = {key: statistics.median(row[key] for row in found) for key in found[0]}
    machine = {**describe_machine(), "threads": str(args.threads)}
    if args.json:
        print(json.dumps({"machine": machine, "models": rows}, indent=1))
        return
    print(one_line(machine))
    print(
        f"\n| model | sites | plain forward, s | look / forward (at most {GOALS['time']:g}) | first look / forward |",
        end="",
    )
    print(f" more memory (at most {GOALS['memory']:.0%}) |\n| --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        numbers = f"{row['forward_s']:.3f} | {row['time']:.2f} | {row['first_time']:.2f} | {row['memory']:.1%}"
        print(f"| {name} | {row['num_sites']:.0f} | {numbers} |")


if __name__ == "__main__":
    main()
