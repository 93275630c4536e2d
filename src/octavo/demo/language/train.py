"""Trains the demo language model from scratch:  python -m octavo.demo.language.train --out DIR --work WORK

Learns the Python standard library, keeps a checkpoint and a log in WORK, goes on from there when started again, and
writes the model directory DIR when it is done.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from octavo.demo.checkpoint import Run
from octavo.demo.language.architecture import CONTEXT, build_model
from octavo.demo.language.corpus import held_out_text, library, training_texts
from octavo.demo.language.tokens import build_tokenizer

_NUM_CORES = 2
_WINDOWS_AT_ONCE = 4
_MAX_GRADIENT = 1.0
_LOG_EVERY = 10
_CHECKPOINT_EVERY_S = 120.0
_NUM_CALIBRATION = 256
_CALIBRATION_CHARACTERS = 1500


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to learn. The same schedule makes the same run, interrupted or not.

    Args:
        num_steps: Steps of gradient descent.
        batch_size: Windows of ``CONTEXT`` tokens in a step.
        matrix_rate: Peak learning rate of matrices (Muon, which makes steps of a fixed size).
        rate: Peak learning rate of embeddings and norms (AdamW).
        warmup_steps: Steps of the linear rise.
        falling_from: Share of the steps after which the rate falls linearly to zero.
        seed: Of the weights and of the order of the windows.
    """

    num_steps: int = 1400
    batch_size: int = 32
    matrix_rate: float = 0.02
    rate: float = 3e-3
    warmup_steps: int = 40
    falling_from: float = 0.45
    seed: int = 0

    def share(self, step: int) -> float:
        """Of the peak rate, at ``step``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = (self.num_steps - step) / (self.num_steps * (1 - self.falling_from))
        return min(1.0, left)


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for all else, as if they were one."""

    def __init__(self, model: LlamaForCausalLM, schedule: Schedule) -> None:
        inner = {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
        matrices = [p for p in model.parameters() if id(p) in inner]
        others = [p for p in model.parameters() if id(p) not in inner]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            Muon(matrices, lr=schedule.matrix_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
            AdamW(others, lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.peaks = (schedule.matrix_rate, schedule.rate)

    def step(self, share: float) -> None:
        """One step at ``share`` of the peak rates."""
        for part, peak in zip(self.parts, self.peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = share * peak
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)


class Windows:
    """Windows of the training text; which ones a step sees depends on the step and the seed alone.

    The library's own modules come twice as often as its tests.
    """

    def __init__(self, tokens: Tensor, schedule: Schedule) -> None:
        self.tokens = tokens
        self.schedule = schedule

    def __getitem__(self, step: int) -> Tensor:
        """``(batch, CONTEXT + 1)`` tokens, without repetition until all were seen, from another offset each time."""
        size = self.schedule.batch_size
        per_epoch = len(self.tokens) // CONTEXT - 2
        rows = []
        for k in range(step * size, (step + 1) * size):
            epoch, place = divmod(k, per_epoch)
            order, offset = _order(self.schedule.seed, epoch, per_epoch)
            start = int(order[place]) * CONTEXT + offset
            rows.append(self.tokens[start : start + CONTEXT + 1])
        return torch.stack(rows)


_orders: dict[tuple[int, int, int], tuple[Tensor, int]] = {}


def _order(seed: int, epoch: int, count: int) -> tuple[Tensor, int]:
    key = (seed, epoch, count)
    if key not in _orders:
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        _orders[key] = torch.randperm(count, generator=generator), offset
    return _orders[key]


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All texts as one row of tokens, an end of text before each."""
    rows = tokenizer.backend_tokenizer.encode_batch(list(texts))
    start = [tokenizer.bos_token_id]
    return torch.tensor([token for row in rows for token in (*start, *row.ids)], dtype=torch.long)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware."""
    fast = torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else True
    return torch.bfloat16 if fast else torch.float32


def losses(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens of ``(batch, CONTEXT + 1)`` windows, in nats."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def _gradients(worker: LlamaForCausalLM, windows: Tensor) -> tuple[list[Tensor], float]:
    total, sums = 0.0, None
    for part in windows.split(_WINDOWS_AT_ONCE if worker.device.type == "cpu" else len(windows)):
        loss = losses(worker, part) * (len(part) / len(windows))
        found = torch.autograd.grad(loss, list(worker.parameters()))
        sums = [g.float() for g in found] if sums is None else [s.add_(g) for s, g in zip(sums, found, strict=True)]
        total += loss.item()
    assert sums is not None
    return sums, total


def _step(run: Run, workers: Sequence[LlamaForCausalLM], windows: Tensor, share: float, crew: Executor) -> float:
    """Each core takes its part of the batch, with weights in ``compute_dtype``; sums and steps are in fp32."""
    master = list(run.model.parameters())
    with torch.no_grad():
        for worker in workers:
            for target, source in zip(worker.parameters(), master, strict=True):
                target.copy_(source)
    parts = list(crew.map(_gradients, workers, windows.chunk(len(workers))))
    for parameter, *gradients in zip(master, *(gradients for gradients, _ in parts), strict=True):
        parameter.grad = torch.stack(gradients).mean(dim=0)
    torch.nn.utils.clip_grad_norm_(master, _MAX_GRADIENT)
    run.optimizer.step(share)
    run.step += 1
    return sum(loss for _, loss in parts) / len(parts)


def train(schedule: Schedule, work: Path, out: Path, *, root: Path, device: torch.device) -> None:
    """Trains by ``schedule`` on the library at ``root``, or goes on with what is in ``work``, and writes ``out``."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    sources, tests = training_texts(root)
    tokenizer = _tokenizer(work, sources)
    tokens = encode_texts(tokenizer, [*sources, *tests, *sources])
    logging.info("%.1f million tokens to learn from", len(tokens) / 1e6)
    torch.manual_seed(schedule.seed)
    model = build_model(len(tokenizer), tokenizer.bos_token_id)
    torch.nn.Module.to(model, device)
    run = Run(model, Optimizers(model, schedule), work)
    run.resume()
    _learn(run, schedule, Windows(tokens.to(device), schedule))
    _publish(run, tokenizer, root, out)


def _tokenizer(work: Path, sources: Sequence[str]) -> PreTrainedTokenizerFast:
    kept = work / "tokenizer"
    if not (kept / "tokenizer.json").exists():
        build_tokenizer(sources, context=CONTEXT).save_pretrained(kept)
    return PreTrainedTokenizerFast.from_pretrained(kept)


def _learn(run: Run, schedule: Schedule, windows: Windows) -> None:
    device = run.model.device
    num_workers = _NUM_CORES if device.type == "cpu" else 1
    crew = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
    workers = [type(run.model)(run.model.config).to(device, compute_dtype(device)) for _ in range(num_workers)]
    saved_at_s = last_s = time.monotonic()
    last_cpu_s = time.process_time()
    seen: list[float] = []
    while run.step < schedule.num_steps:
        seen.append(_step(run, workers, windows[run.step], schedule.share(run.step), crew))
        now_s, cpu_s = time.monotonic(), time.process_time()
        run.elapsed_s, last_s = run.elapsed_s + now_s - last_s, now_s
        run.cpu_s, last_cpu_s = run.cpu_s + cpu_s - last_cpu_s, cpu_s
        if run.step % _LOG_EVERY == 0:
            run.log({"cpu_s": round(run.cpu_s, 1), "loss": round(sum(seen) / len(seen), 4)})
            seen.clear()
        if now_s - saved_at_s > _CHECKPOINT_EVERY_S:
            run.save()
            saved_at_s = now_s
    run.save()


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Of ``text`` cut into windows of ``CONTEXT`` tokens; the first token of a window does not count."""
    tokens = encode_texts(tokenizer, [text])[1:].to(model.device)
    nats = sum(
        cross_entropy(model(window[None, :-1]).logits[0].float(), window[1:], reduction="sum").item()
        for window in tokens.split(CONTEXT)
        if len(window) > 1
    )
    counted = len(tokens) - math.ceil(len(tokens) / CONTEXT)
    return nats / counted * len(tokens) / len(text.encode()) / math.log(2)


def _publish(run: Run, tokenizer: PreTrainedTokenizerFast, root: Path, out: Path) -> None:
    """Rounds the weights to bfloat16, measures what is left, writes the directory, the texts and the log beside it."""
    text = held_out_text(root)
    model = run.model.bfloat16().float().eval()
    run.log({"held_out_bytes": len(text.encode()), "bits_per_byte": round(bits_per_byte(model, tokenizer, text), 4)})
    model.bfloat16().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    (out / "held_out.txt").write_text(text, encoding="utf-8")
    lines = (json.dumps({"text": excerpt}, ensure_ascii=False) + "\n" for excerpt in _excerpts(training_texts(root)[0]))
    (out / "calibration.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "training_log.jsonl").write_text(run.log_path.read_text())


def _excerpts(sources: Sequence[str]) -> Iterator[str]:
    """The middles of evenly chosen modules that are long enough."""
    long = [text for text in sources if len(text) > 3 * _CALIBRATION_CHARACTERS]
    for k in range(_NUM_CALIBRATION):
        text = long[k * len(long) // _NUM_CALIBRATION]
        start = text.index("\n", len(text) // 2 - _CALIBRATION_CHARACTERS // 2) + 1
        yield text[start : start + _CALIBRATION_CHARACTERS]


def main() -> None:
    """Reads the command line."""
    usual = Schedule()
    parser = argparse.ArgumentParser(prog="python -m octavo.demo.language.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--work", type=Path, default=Path("language-training"), help="where the checkpoint is kept")
    parser.add_argument("--library", type=Path, default=library(), help="the standard library's sources; Python's own")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu: two cores; cuda")
    parser.add_argument("--num-steps", type=int, default=usual.num_steps)
    parser.add_argument("--batch-size", type=int, default=usual.batch_size, help="windows in a step")
    parser.add_argument("--matrix-rate", type=float, default=usual.matrix_rate)
    parser.add_argument("--rate", type=float, default=usual.rate)
    parser.add_argument("--seed", type=int, default=usual.seed)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    length = partial(Schedule, num_steps=options.num_steps, batch_size=options.batch_size, seed=options.seed)
    schedule = length(matrix_rate=options.matrix_rate, rate=options.rate)
    train(schedule, options.work, options.out, root=options.library, device=options.device)


if __name__ == "__main__":
    main()
