from __future__ import annotations

import pytest

from octavo.errors import UserError
from octavo.evaluate import Options, parse_task, parse_tasks
from octavo.sources import describe_module, open_model
from sources import tiny


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Data of every form, in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny.pairs(tmp_path)
    tiny.image_folder(tmp_path / "folder")
    tiny.json_lines(tmp_path / "qd.jsonl", [{"query": q, "document": d} for q, d in (("a", "b"), ("c", "d"))])
    tiny.json_lines(tmp_path / "one.jsonl", [{"query": "a", "document": "b"}])
    tiny.json_lines(tmp_path / "labels.jsonl", [{"text": "a cat", "label": "good"}, {"text": "dog", "label": "bad"}])
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.sentences(20)))
    (tmp_path / "a").write_text("x")


@pytest.mark.parametrize(
    ("spec", "name", "kind"),
    [
        ("retrieval:pairs.jsonl", "retrieval", "retrieval"),
        ("mine=retrieval:qd.jsonl", "mine", "retrieval"),
        ("my-shapes.1=zeroshot:folder", "my-shapes.1", "zeroshot"),
        ("classification:folder", "classification", "classification"),
        ("perplexity:text.txt", "perplexity", "perplexity"),
        ("fidelity:text.txt", "fidelity", "fidelity"),
        ("shapes=zeroshot:demo:shapes-100", "shapes", "zeroshot"),
    ],
)
def test_a_task_is_what_it_is_written_as(files, spec, name, kind):
    task = parse_task(spec)
    assert (task.name, task.kind) == (name, kind)


def test_tasks_keep_their_order_and_names(files):
    tasks = parse_tasks(["fidelity:text.txt", "b=fidelity:pairs.jsonl"], Options(batch_size=2))
    assert list(tasks) == ["fidelity", "b"]


def test_two_tasks_of_one_name_are_told(files):
    with pytest.raises(UserError, match=r"another task is called 'fidelity' already; .* NAME=fidelity:pairs.jsonl"):
        parse_tasks(["fidelity:text.txt", "fidelity:pairs.jsonl"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pairs.jsonl", "a task is KIND:DATA or NAME=KIND:DATA; the kinds are zeroshot, classification, retrieval"),
        ("accuracy:folder", "there is no kind 'accuracy'; the kinds are zeroshot"),
        ("retrieval:missing.jsonl", "data 'missing.jsonl'.*no such file or directory"),
        (
            "retrieval:text.txt",
            "retrieval needs JSON lines with image and text, or with query and document; 'text.txt'",
        ),
        ("retrieval:one.jsonl", "at least two samples"),
        ("zeroshot:pairs.jsonl", "zeroshot needs pictures by class .* and 'pairs.jsonl' has pictures with texts"),
        ("classification:text.txt", "classification needs labels"),
        ("perplexity:folder", "perplexity needs texts, and 'folder' has pictures by class"),
    ],
)
def test_a_wrong_task_is_told_before_any_work(files, spec, message):
    with pytest.raises(UserError, match=message):
        parse_task(spec)


@pytest.mark.parametrize(
    ("spec", "model", "message"),
    [
        ("zeroshot:folder", "vit_classifier", r"needs a dual encoder .* is a image classifier; .* use  classification"),
        ("zeroshot:folder", "bert", "needs a dual encoder"),
        ("classification:folder", "clip", "is a dual encoder; use  zeroshot"),
        ("classification:folder", "vit", "needs a classifier, and model .* is a image encoder"),
        ("classification:labels.jsonl", "vit_classifier", "takes pictures"),
        ("retrieval:qd.jsonl", "llama", "needs a dual encoder or a text encoder"),
        ("retrieval:pairs.jsonl", "bert", r"has pictures and texts, and model .* takes texts"),
        ("perplexity:text.txt", "bert", "needs a causal language model"),
        ("fidelity:text.txt", "vit", r"has texts, and model .* takes pictures"),
        ("fidelity:folder", "llama", r"takes texts"),
    ],
)
def test_a_model_that_cannot_do_a_task_is_told_by_check(files, saved, spec, model, message):
    with pytest.raises(UserError, match=message):
        parse_task(spec).check(open_model(saved(model)))


@pytest.mark.parametrize("option", ["batch_size", "max_length", "stride"])
def test_options_below_one_are_told(option):
    with pytest.raises(UserError, match="is 0, and at least 1 is needed"):
        Options(**{option: 0})


def test_a_task_on_a_plain_module_needs_a_processor(files):
    import torch

    with pytest.raises(UserError, match="came without a processor"):
        parse_task("classification:folder").check(describe_module(torch.nn.Linear(2, 2)))
