"""Trains the demo model from scratch:  python -m octavo.demo.train --out DIR --work WORK

Draws its own pictures, keeps a checkpoint and a log in WORK, goes on from there when started again, and writes the
model directory DIR when it is done. ``--evaluate`` measures DIR instead.
"""

import argparse
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
from transformers import CLIPModel, CLIPTokenizer

from octavo.demo.architecture import build_model, build_tokenizer, save_directory
from octavo.demo.catalog import MODEL_DIR
from octavo.demo.checkpoint import Run
from octavo.demo.evaluation import evaluate, evaluate_directory
from octavo.demo.supply import DrawnBatches, supply, to_pixel_values

_NUM_CORES = 2
_MAX_LOGIT_SCALE = math.log(100)
_MAX_GRADIENT = 1.0
_LOG_EVERY = 20
_CHECKPOINT_EVERY_S = 120.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to learn. The same schedule makes the same run, interrupted or not.

    From step ``families_from`` on, scenes come with near relatives beside them.
    """

    num_steps: int = 2200
    batch_size: int = 256
    learning_rate: float = 1.5e-3
    warmup_steps: int = 150
    families_from: int = 100
    weight_decay: float = 0.1
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of ``step``: a linear rise, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.num_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(schedule: Schedule, work: Path, out: Path) -> None:
    """Trains by ``schedule``, or goes on with what is in ``work``, and writes the model directory ``out``."""
    torch.manual_seed(schedule.seed)
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    run = Run(model, _optimizer(model, schedule), work)
    run.resume()
    batches = DrawnBatches(
        tokenizer, seed=schedule.seed, batch_size=schedule.batch_size, families_from=schedule.families_from
    )
    _learn(run, schedule, batches)
    _publish(run, tokenizer, out)


def _learn(run: Run, schedule: Schedule, batches: DrawnBatches) -> None:
    """All steps that are left, with a checkpoint every few minutes and one at the end."""
    crew = ThreadPoolExecutor(_NUM_CORES, initializer=torch.set_num_threads, initargs=(1,))
    saved_at_s = last_s = time.monotonic()
    for images, tokens in supply(batches, range(run.step, schedule.num_steps)):
        facts = _step(run, schedule, to_pixel_values(images), tokens, crew=crew)
        now_s = time.monotonic()
        run.elapsed_s, last_s = run.elapsed_s + now_s - last_s, now_s
        if run.step % _LOG_EVERY == 0:
            run.log(facts)
        if now_s - saved_at_s > _CHECKPOINT_EVERY_S:
            run.save()
            saved_at_s = now_s
    run.save()


def _step(run: Run, schedule: Schedule, pixel_values: Tensor, tokens: Tensor, *, crew: Executor) -> dict[str, float]:
    """One step of gradient descent; ``pixel_values`` ``(batch, 3, height, width)``, ``tokens`` ``(batch, tokens)``.

    Each core contrasts its part of the batch within itself: on a shared machine that is several times faster than
    cores that wait for each other in every product.
    """
    rate = schedule.rate(run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    parts = list(crew.map(partial(_contrast, run.model), pixel_values.chunk(_NUM_CORES), tokens.chunk(_NUM_CORES)))
    for parameter, *gradients in zip(run.model.parameters(), *(part.gradients for part in parts), strict=True):
        parameter.grad = torch.stack(gradients).mean(dim=0)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), _MAX_GRADIENT)
    run.optimizer.step()
    with torch.no_grad():
        run.model.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)
    run.step += 1
    loss = sum(part.loss for part in parts) / len(parts)
    found = sum(part.found for part in parts) / len(parts)
    return {"loss": round(loss, 4), "caption_found": round(found, 4), "learning_rate": rate}


class _Part(NamedTuple):
    gradients: tuple[Tensor, ...]
    loss: float
    found: float


def _contrast(model: CLIPModel, pixel_values: Tensor, tokens: Tensor) -> _Part:
    """InfoNCE in both directions (CLIP, arXiv:2103.00020, figure 3): gradients, loss, share of captions found."""
    logits = model(pixel_values=pixel_values, input_ids=tokens).logits_per_image
    own = torch.arange(len(logits))
    loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return _Part(gradients, loss.item(), (logits.argmax(dim=1) == own).double().mean().item())


def _optimizer(model: CLIPModel, schedule: Schedule) -> AdamW:
    """Matrices decay; vectors (biases, norms, the class token) and the scale of the logits do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), eps=1e-6)


def _publish(run: Run, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Rounds the weights to half precision, measures what is left, writes the directory and the log beside it."""
    model = run.model.half().float().eval()
    run.log({metric: round(result["value"], 2) for metric, result in evaluate(model, tokenizer).items()})
    save_directory(model, tokenizer, out)
    (out / "training_log.jsonl").write_text(run.log_path.read_text())


def main() -> None:
    """Reads the command line."""
    usual = Schedule()
    parser = argparse.ArgumentParser(prog="python -m octavo.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="model directory to write, or to measure")
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="where checkpoint and log are kept")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out, train nothing")
    parser.add_argument("--num-steps", type=int, default=usual.num_steps)
    parser.add_argument("--learning-rate", type=float, default=usual.learning_rate)
    parser.add_argument("--families-from", type=int, default=usual.families_from)
    parser.add_argument("--seed", type=int, default=usual.seed)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.evaluate:
        for metric, result in evaluate_directory(options.out).items():
            print(f"{metric:20} {result['value']:6.2f} % +- {result['standard_error']:.2f}")
    else:
        schedule = Schedule(
            num_steps=options.num_steps,
            learning_rate=options.learning_rate,
            families_from=options.families_from,
            seed=options.seed,
        )
        train(schedule, options.work, options.out)


if __name__ == "__main__":
    main()
