"""The demo language model's text, tokens and training: seeded, resumable, and nothing held out is learned."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import octavo
from octavo.demo import model_path
from octavo.demo.checkpoint import Run
from octavo.demo.language import corpus
from octavo.demo.language import train as training
from octavo.demo.language.architecture import CONTEXT, build_model
from octavo.demo.language.tokens import build_tokenizer, learn_merges
from octavo.demo.language.train import Optimizers, Schedule, Windows, encode_texts

TEXTS = ["def f(x):\n    return x + 1\n" * 40, "class A:\n    def g(self):\n        return 2\n" * 40]
SHORT = Schedule(num_steps=4, batch_size=4, warmup_steps=1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, context=CONTEXT)


def test_what_is_held_out_is_not_learned():
    root = corpus.library()
    held_out = [path for path in corpus.modules(root) if corpus.is_held_out(path)]
    assert len(held_out) > 10
    sources, tests = corpus.training_texts(root)
    learned = set(sources) | set(tests)
    assert not learned & {(root / path).read_text(encoding="utf-8", errors="replace") for path in held_out}


def test_text_survives_its_tokens(tokenizer):
    for text in (*TEXTS, "\tif x:\r\n  é 漢 \x00 __init__ 12345\n\n\n   y"):
        assert tokenizer.decode(encode_texts(tokenizer, [text])[1:]) == text


def test_merges_are_those_of_counting_all_pairs_anew():
    pieces = Counter({"abab": 5, "abc": 4, "bcb": 3, "ab": 7, "cabab": 2})
    words = [(list(piece), number) for piece, number in pieces.items()]
    for pair in learn_merges(pieces, 5):
        counts: Counter[tuple[str, str]] = Counter()
        for parts, number in words:
            for left, right in pairwise(parts):
                counts[left, right] += number
        assert pair == min(counts, key=lambda p: (-counts[p], p))
        words = [(" ".join(parts).replace(" ".join(pair), "".join(pair)).split(" "), n) for parts, n in words]


def test_every_process_numbers_its_tokens_alike(tokenizer):
    program = (
        "from octavo.demo.language.tokens import build_tokenizer; import sys; "
        f"print(build_tokenizer({TEXTS!r}, context=8).backend_tokenizer.to_str())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {tokenizer.backend_tokenizer.to_str() + "\n"}


def test_windows_depend_on_their_step_alone_and_repeat_none_within_an_epoch():
    tokens = torch.arange(20 * CONTEXT)
    windows = Windows(tokens, SHORT)
    assert torch.equal(windows[3], Windows(tokens, SHORT)[3])
    starts = torch.cat([windows[step][:, 0] for step in range(4)])
    assert len(starts.unique()) == 16


@pytest.mark.slow
def test_an_interrupted_training_ends_like_one_that_was_not(tokenizer, tmp_path, monkeypatch):
    tokens = encode_texts(tokenizer, TEXTS * 20)
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY_S", -1.0)

    def start(work):
        torch.manual_seed(0)
        model = build_model(len(tokenizer), tokenizer.bos_token_id)
        run = Run(model, Optimizers(model, SHORT), work)
        run.resume()
        return run

    whole = start(tmp_path / "whole")
    training._learn(whole, SHORT, Windows(tokens, SHORT))
    first = start(tmp_path / "cut")
    training._learn(
        first, Schedule(num_steps=2, batch_size=4, warmup_steps=1, falling_from=0.99), Windows(tokens, SHORT)
    )
    rest = start(tmp_path / "cut")
    assert rest.step == 2
    training._learn(rest, SHORT, Windows(tokens, SHORT))
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_rate_rises_stays_and_falls_to_nothing():
    schedule = Schedule(num_steps=100, warmup_steps=10, falling_from=0.5)
    shares = [schedule.share(step) for step in range(100)]
    assert shares[:10] == sorted(shares[:10])
    assert set(shares[10:50]) == {1.0}
    assert shares[50:] == sorted(shares[50:], reverse=True)
    assert 0 < shares[-1] <= 0.02


def test_the_model_that_ships_knows_text_that_it_never_saw():
    directory = model_path("llama")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    text = (directory / "held_out.txt").read_text(encoding="utf-8")
    assert training.bits_per_byte(model, tokenizer, text[40_000:70_000]) < 1.35
    assert (directory / "model.safetensors").stat().st_size <= 12e6


def test_its_calibration_text_is_none_of_the_held_out():
    held_out = (model_path("llama") / "held_out.txt").read_text(encoding="utf-8")
    texts = [sample.text for sample in octavo.open_data("demo:stdlib-calibration").samples]
    assert len(texts) == 256
    assert not [text for text in texts if text[:400] in held_out]


def test_its_log_says_what_it_cost():
    lines = [json.loads(line) for line in (model_path("llama") / "training_log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == Schedule().num_steps
    assert lines[-1]["bits_per_byte"] <= 1.35
