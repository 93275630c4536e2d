from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.errors import UserError
from octavo.sources import batches, describe_module, open_data, open_model
from octavo.sources.batches import token_windows
from sources import tiny


def _texts(directory, count=12):
    return open_data(tiny.json_lines(directory / "t.jsonl", [{"text": text} for text in tiny.sentences(count)]))


def _ids(made):
    return [batch["input_ids"].tolist() for batch in made]


@pytest.mark.parametrize("name", ["clip", "siglip", "bert", "text_classifier", "vit_classifier", "vit", "llama", "t5"])
@torch.no_grad()
def test_batches_of_every_kind_are_ready_for_the_model(saved, tmp_path, name):
    loaded = open_model(saved(name))
    made = batches(open_data(tiny.pairs(tmp_path)), loaded, batch_size=3)
    assert len(made) == len(list(made)) == 3
    assert made.num_samples == 8
    for batch in made:
        loaded.model(**batch)


def test_batches_can_be_gone_through_again_and_depend_on_the_seed(saved, tmp_path):
    loaded, data = open_model(saved("bert")), _texts(tmp_path)
    made = batches(data, loaded, batch_size=4, num_samples=8, seed=1)
    assert _ids(made) == _ids(made)
    assert _ids(made) == _ids(batches(data, loaded, batch_size=4, num_samples=8, seed=1))
    assert _ids(made) != _ids(batches(data, loaded, batch_size=4, num_samples=8, seed=2))


def test_all_samples_are_used_when_no_number_is_given(saved, tmp_path):
    loaded, data = open_model(saved("bert")), _texts(tmp_path)
    made = batches(data, loaded, batch_size=5)
    rows = {
        tuple(row[mask.bool()].tolist())
        for batch in made
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    wanted = {tuple(loaded.processor.token_ids(sample.text).tolist()) for sample in data.samples}
    assert rows == wanted


def test_fewer_samples_than_asked_for_are_a_warning(saved, tmp_path, caplog):
    made = batches(_texts(tmp_path), open_model(saved("bert")), num_samples=50)
    assert made.num_samples == 12
    assert "has 12 samples, fewer than the 50 asked for" in caplog.text


def test_query_and_document_are_both_used(saved, tmp_path):
    data = open_data(tiny.json_lines(tmp_path / "p.jsonl", [{"query": "a cat", "document": "the red cat sits"}] * 3))
    assert batches(data, open_model(saved("bert"))).num_samples == 6


def test_a_text_file_is_cut_into_windows_for_a_language_model(saved, tmp_path):
    text = "\n\n".join(tiny.sentences(30))
    (tmp_path / "a.txt").write_text(text)
    loaded = open_model(saved("llama"))
    made = batches(open_data(tmp_path / "a.txt"), loaded, batch_size=2, max_length=10)
    tokens = loaded.processor.token_ids(text)
    rows = torch.cat([batch["input_ids"] for batch in made])
    assert rows.flatten().tolist() == tokens[: len(tokens) // 10 * 10].tolist()
    assert all(batch["attention_mask"].all() for batch in made)


def test_a_text_shorter_than_a_window_is_one_window():
    assert [len(window) for window in token_windows(torch.arange(5), 10)] == [5]
    assert [len(window) for window in token_windows(torch.arange(25), 10)] == [10, 10]


def test_a_window_longer_than_the_model_is_told(saved, tmp_path):
    with pytest.raises(UserError, match="max length 99 is more than the 24 positions"):
        batches(_texts(tmp_path), open_model(saved("llama")), max_length=99)


def test_a_decoder_sees_its_text_one_place_to_the_right(saved, tmp_path):
    data = open_data(tiny.json_lines(tmp_path / "p.jsonl", [{"query": "a cat", "document": "the red cat"}]))
    (batch,) = batches(data, open_model(saved("t5")))
    words = {word: i + 4 for i, word in enumerate(tiny.WORDS)}
    assert batch["input_ids"].tolist() == [[1, words["a"], words["cat"], 2]]
    assert batch["decoder_input_ids"].tolist() == [[0, 1, words["the"], words["red"], words["cat"]]]


def test_a_class_becomes_a_sentence_for_a_dual_encoder(saved, tmp_path):
    loaded = open_model(saved("clip"))
    made = batches(open_data(tiny.image_folder(tmp_path)), loaded, batch_size=9)
    (batch,) = made
    words = {word: i + 4 for i, word in enumerate(tiny.WORDS)}
    first = [row.tolist() for row in batch["input_ids"] if words["cat"] in row]
    assert first[0] == [1, *(words[word] for word in ["a", "photo", "of", "a", "blue", "cat", "."]), 2]


def test_ready_batches_are_passed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ready_batches_here.py").write_text("def some(): return [1, 2, 3]\n")
    loaded = describe_module(nn.Linear(2, 2))
    assert list(batches(open_data("ready_batches_here:some"), loaded, num_samples=2)) == [1, 2]


def test_a_plain_module_makes_its_own_batches_of_samples(tmp_path):
    loaded = describe_module(nn.Linear(1, 1), lambda samples: torch.tensor([[len(s.text)] for s in samples]))
    made = batches(_texts(tmp_path), loaded, batch_size=12)
    assert [batch.shape for batch in made] == [(12, 1)]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("clip", "texts", r"has texts, and model .* \(dual encoder\) takes pictures with texts"),
        ("clip", "flat", "has pictures, and model .* takes pictures with texts"),
        ("vit", "texts", r"has texts, and model .* \(image encoder\) takes pictures"),
        ("bert", "flat", r"has pictures, and model .* \(text encoder\) takes texts"),
        ("llama", "folder", r"has pictures, and model .* \(causal language model\) takes texts"),
    ],
)
def test_data_that_does_not_fit_is_told(saved, tmp_path, name, data, message):
    tiny.write_image(tmp_path / "flat" / "a.png", 0)
    tiny.image_folder(tmp_path / "folder")
    tiny.json_lines(tmp_path / "texts.jsonl", [{"text": "a"}])
    path = tmp_path / (data if data != "texts" else "texts.jsonl")
    with pytest.raises(UserError, match=message):
        batches(open_data(path), open_model(saved(name)))


def test_a_plain_module_without_a_processor_takes_only_ready_batches(tmp_path):
    with pytest.raises(UserError, match="came without a processor"):
        batches(_texts(tmp_path), describe_module(nn.Linear(2, 2)))


def test_a_model_without_its_tokenizer_is_told_before_the_first_batch(saved, tmp_path):
    open_model(saved("bert")).model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="has no tokenizer"):
        batches(_texts(tmp_path), open_model(tmp_path / "m"))


@pytest.mark.parametrize("option", ["batch_size", "num_samples", "max_length"])
def test_numbers_below_one_are_told(saved, tmp_path, option):
    with pytest.raises(UserError, match="is 0, and at least 1 is needed"):
        batches(_texts(tmp_path), open_model(saved("bert")), **{option: 0})
