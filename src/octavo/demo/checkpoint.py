"""A training in progress: what survives a power cut, and the log."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The model, its optimizer, how far they are, and the directory ``work`` that holds checkpoint and log.

    ``elapsed_s`` is time on the clock; ``cpu_s`` the processor's, of all cores, which a busy machine does not stretch.
    """

    model: Any
    optimizer: Any
    work: Path
    step: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def log_path(self) -> Path:
        """One JSON object per line."""
        return self.work / "training_log.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        """Weights, optimizer and step."""
        return self.work / "checkpoint.pt"

    def save(self) -> None:
        """Replaces the checkpoint in one move, so that there is always a whole one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "cpu_s": self.cpu_s,
        }
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint_path)

    def resume(self) -> None:
        """Goes back to the checkpoint, where there is one; forgets what the log says of later steps."""
        self.work.mkdir(parents=True, exist_ok=True)
        if self.checkpoint_path.exists():
            state = torch.load(self.checkpoint_path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.elapsed_s, self.cpu_s = state["step"], state["elapsed_s"], state.get("cpu_s", 0.0)
            logger.info("resumed at step %d", self.step)
        lines = self.log_path.read_text().splitlines(keepends=True) if self.log_path.exists() else []
        self.log_path.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def log(self, facts: dict[str, float]) -> None:
        """Appends ``facts`` to the log."""
        line = {"step": self.step, "elapsed_s": round(self.elapsed_s, 1)} | facts
        with self.log_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("%s", line)
