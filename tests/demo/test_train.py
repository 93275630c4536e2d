"""Training is seeded, and a run that was interrupted ends like one that was not."""

import json
import os
import subprocess
import sys

import pytest
import torch

from octavo.demo import train as training
from octavo.demo.architecture import build_model, build_tokenizer
from octavo.demo.checkpoint import Run
from octavo.demo.supply import DrawnBatches
from octavo.demo.train import Schedule

SHORT = Schedule(num_steps=4, batch_size=16, warmup_steps=2, families_from=2)


def start(work, schedule=SHORT):
    torch.manual_seed(schedule.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    run = Run(model, training._optimizer(model, schedule), work)
    run.resume()
    batches = DrawnBatches(tokenizer, seed=0, batch_size=schedule.batch_size, families_from=schedule.families_from)
    return run, batches


def test_the_rate_rises_and_falls():
    schedule = Schedule(num_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [schedule.rate(step) for step in range(100)]
    assert max(rates) == rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.001


def test_a_batch_depends_on_its_step_alone():
    batches = DrawnBatches(build_tokenizer(), seed=0, batch_size=4, families_from=2)
    for step in (0, 5):
        for one, again in zip(batches[step], batches[step], strict=True):
            assert torch.equal(one, again)
    assert not torch.equal(batches[0][0], batches[1][0])


def test_every_process_numbers_its_tokens_alike():
    """A checkpoint is worth nothing to a process whose tokens mean other words."""
    vocab = json.dumps(sorted(build_tokenizer().get_vocab().items()))
    program = (
        "import json; from octavo.demo.architecture import build_tokenizer; "
        "print(json.dumps(sorted(build_tokenizer().get_vocab().items())))"
    )
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.strip() == vocab


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_LOG_EVERY", 1)
    whole, batches = start(tmp_path / "whole")
    training._learn(whole, SHORT, batches)

    cut, batches = start(tmp_path / "cut")
    log, steps_left = cut.log, [3]

    def power_cut(facts):
        log(facts)
        steps_left[0] -= 1
        if steps_left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_CHECKPOINT_EVERY_S", -1.0)
    monkeypatch.setattr(cut, "log", power_cut)
    with pytest.raises(KeyboardInterrupt):
        training._learn(cut, SHORT, batches)

    resumed, batches = start(tmp_path / "cut")
    assert resumed.step == 2
    training._learn(resumed, SHORT, batches)
    # Rounding of the products follows the addresses of their operands, so two runs agree closely, not to the last bit.
    torch.testing.assert_close(logged_losses(resumed), logged_losses(whole), rtol=1e-3, atol=0)
    assert len(logged_losses(resumed)) == SHORT.num_steps


@pytest.mark.slow
def test_a_checkpoint_restores_everything_to_the_last_bit(tmp_path):
    run, batches = start(tmp_path)
    training._learn(run, SHORT, batches)
    restored, _ = start(tmp_path)
    assert restored.step == run.step == SHORT.num_steps
    assert restored.elapsed_s == run.elapsed_s
    torch.testing.assert_close(restored.model.state_dict(), run.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(
        restored.optimizer.state_dict()["state"], run.optimizer.state_dict()["state"], rtol=0, atol=0
    )


def logged_losses(run):
    return [json.loads(line)["loss"] for line in run.log_path.read_text().splitlines()]
