"""Trains the demo model from scratch:  python -m octavo.demo.train --out DIR

Draws its own pictures, keeps a checkpoint in ``--work``, resumes from it, and writes the directory when it is done.
"""

import argparse
import json
import logging
import math
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from transformers import CLIPModel

from octavo.demo.architecture import build_model, build_tokenizer, save_directory
from octavo.demo.catalog import MODEL_DIR
from octavo.demo.evaluation import evaluate, evaluate_directory
from octavo.demo.supply import DrawnBatches, supply, to_pixel_values

logger = logging.getLogger(__name__)

_MAX_LOGIT_SCALE = math.log(100)
_MAX_GRADIENT = 1.0
_LOG_EVERY = 20


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to learn. The same schedule and seed give the same run, interrupted or not."""

    num_steps: int = 3600
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    families_from: int = 562
    weight_decay: float = 0.1
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of ``step``: a linear rise, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.num_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Run:
    """A training in progress, and the directory that holds its checkpoint and log."""

    model: CLIPModel
    optimizer: AdamW
    work: Path
    step: int = 0
    elapsed_s: float = 0.0

    def save(self) -> None:
        """Replaces the checkpoint in one move, so that there is always a whole one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        torch.save(state, self.work / "checkpoint.partial")
        (self.work / "checkpoint.partial").replace(self.work / "checkpoint.pt")

    def resume(self) -> None:
        """Goes back to the checkpoint, where there is one; forgets what the log says of later steps."""
        if not (self.work / "checkpoint.pt").exists():
            return
        state = torch.load(self.work / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        lines = self.log_path.read_text().splitlines(keepends=True)
        self.log_path.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))
        logger.info("resumed at step %d", self.step)

    @property
    def log_path(self) -> Path:
        """One JSON object per line."""
        return self.work / "training_log.jsonl"

    def log(self, facts: dict[str, float]) -> None:
        """Appends ``facts`` to the log."""
        line = {"step": self.step, "elapsed_s": round(self.elapsed_s, 1)} | facts
        with self.log_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("%s", line)


def train(schedule: Schedule, work: Path, out: Path, checkpoint_every_s: float = 120.0) -> None:
    """Trains by ``schedule``, or goes on with what is in ``work``, and writes the model directory ``out``."""
    torch.manual_seed(schedule.seed)
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    run = Run(model, _optimizer(model, schedule), work)
    run.resume()
    batches = DrawnBatches(tokenizer, seed=schedule.seed, batch_size=schedule.batch_size, families_from=schedule.families_from)
    saved_at_s = last_s = time.monotonic()
    crew = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))
    for images, tokens in supply(batches, range(run.step, schedule.num_steps)):
        facts = _learn(run, schedule, to_pixel_values(images), tokens, crew)
        now_s = time.monotonic()
        run.elapsed_s += now_s - last_s
        last_s = now_s
        if run.step % _LOG_EVERY == 0:
            run.log(facts)
        if now_s - saved_at_s > checkpoint_every_s:
            run.save()
            saved_at_s = now_s
    run.save()
    _publish(run, tokenizer, out)


def _learn(run: Run, schedule: Schedule, pixel_values: Tensor, tokens: Tensor, crew: Executor) -> dict[str, float]:
    """One step of gradient descent; ``pixel_values`` ``(batch, 3, height, width)``, ``tokens`` ``(batch, tokens)``.

    Each half of the batch is contrasted within itself, on a core of its own: on a shared machine that is several times
    faster than two cores that wait for each other in every product.
    """
    rate = schedule.rate(run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    halves = list(crew.map(partial(_contrast, run.model), pixel_values.chunk(2), tokens.chunk(2)))
    for parameter, *gradients in zip(run.model.parameters(), *(half.gradients for half in halves), strict=True):
        parameter.grad = torch.stack(gradients).mean(dim=0)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), _MAX_GRADIENT)
    run.optimizer.step()
    with torch.no_grad():
        run.model.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)
    run.step += 1
    loss, found = (sum(values) / 2 for values in zip(*((half.loss, half.found) for half in halves), strict=True))
    return {"loss": round(loss, 4), "caption_found": round(found, 4), "learning_rate": rate}


class _Half(NamedTuple):
    gradients: tuple[Tensor, ...]
    loss: float
    found: float


def _contrast(model: CLIPModel, pixel_values: Tensor, tokens: Tensor) -> _Half:
    """InfoNCE in both directions (Radford et al., 2021, figure 3), its gradients, the share of captions found."""
    logits = model(pixel_values=pixel_values, input_ids=tokens).logits_per_image
    own = torch.arange(len(logits))
    loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return _Half(gradients, loss.item(), (logits.argmax(dim=1) == own).double().mean().item())


def _optimizer(model: CLIPModel, schedule: Schedule) -> AdamW:
    """Matrices decay; vectors (biases, norms, the class token) and the scale of the logits do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), eps=1e-6)


def _publish(run: Run, tokenizer, out: Path) -> None:
    """Rounds the weights to half precision, measures what is left, writes the directory and the log beside it."""
    run.model.half().float().eval()
    metrics = evaluate(run.model, tokenizer)
    run.log({metric: round(result["value"], 2) for metric, result in metrics.items()})
    save_directory(run.model.half(), tokenizer, out)
    (out / "training_log.jsonl").write_text(run.log_path.read_text())


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m octavo.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="the model directory to write or to evaluate")
    parser.add_argument("--work", type=Path, help="checkpoint and log; the same one again resumes (needed to train)")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out instead of training")
    parser.add_argument("--num-steps", type=int, default=3600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.evaluate:
        for metric, result in evaluate_directory(options.out).items():
            print(f"{metric:20} {result['value']:6.2f} % +- {result['standard_error']:.2f}")
        return
    schedule = Schedule(num_steps=options.num_steps, batch_size=options.batch_size, learning_rate=options.learning_rate, seed=options.seed)
    train(schedule, options.work, options.out)


if __name__ == "__main__":
    main()
