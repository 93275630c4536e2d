"""Every task against a naive computation of the same thing."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octavo.errors import UserError
from octavo.evaluate import Options, difference, parse_task
from octavo.evaluate import fidelity as fidelity_module
from octavo.evaluate.perplexity import windows
from octavo.evaluate.retrieval import relate
from octavo.sources import Sample, describe_module, image_inputs, open_data, open_model, text_inputs
from sources import tiny

SMALL = Options(batch_size=3)


@torch.no_grad()
def _one_by_one(embed, inputs):
    return F.normalize(torch.cat([embed(item) for item in inputs]), dim=1).numpy()


def _shaken(loaded, amount=0.02):
    """The same model with noise on its weights, as a stand-in for a quantized one."""
    noisy = copy.deepcopy(loaded)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in noisy.model.parameters():
            parameter *= 1 + amount * torch.randn_like(parameter)
    return noisy


def _naive_recall(similarity, k):
    return np.mean([i in np.argsort(-row)[:k] for i, row in enumerate(similarity)])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_retrieval_of_pictures_is_that_of_one_by_one(saved, tmp_path, name):
    loaded, path = open_model(saved(name)), tiny.pairs(tmp_path, count=14)
    samples = open_data(path).samples
    texts = _one_by_one(
        lambda s: loaded.model.get_text_features(**text_inputs(loaded, [s.text])).pooler_output, samples
    )
    pictures = _one_by_one(
        lambda s: loaded.model.get_image_features(**image_inputs(loaded, [s.image])).pooler_output, samples
    )
    measures = parse_task(f"retrieval:{path}", SMALL).evaluate(loaded)
    assert measures["r_at_1"].value == pytest.approx(_naive_recall(texts @ pictures.T, 1))
    assert measures["r_at_5"].value == pytest.approx(_naive_recall(texts @ pictures.T, 5))
    assert measures["reverse_r_at_5"].value == pytest.approx(_naive_recall(pictures @ texts.T, 5))
    assert measures["r_at_5"].count == 14


def test_retrieval_of_texts_is_that_of_sentence_transformers(saved, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    queries, documents = tiny.sentences(12, seed=1), tiny.sentences(12, seed=2)
    rows = [{"query": q, "document": d} for q, d in zip(queries, documents, strict=True)]
    path = tiny.json_lines(tmp_path / "qd.jsonl", rows)
    theirs = package.SentenceTransformer(str(saved("sentence_bert")), device="cpu")
    similarity = theirs.encode(queries) @ theirs.encode(documents).T
    measures = parse_task(f"retrieval:{path}", SMALL).evaluate(open_model(saved("sentence_bert")))
    assert measures["r_at_5"].value == pytest.approx(_naive_recall(similarity, 5))
    assert measures["reverse_r_at_1"].value == pytest.approx(_naive_recall(similarity.T, 1))


def test_what_occurs_twice_counts_once():
    rows = [("a", "x"), ("a", "y"), ("b", "x"), ("c", "z")]
    relation = relate([Sample(query=q, document=d) for q, d in rows])
    assert relation.queries == (0, 2, 3)
    assert relation.documents == (0, 1, 3)
    assert [found.tolist() for found in relation.documents_of] == [[0, 1], [0], [2]]
    assert [found.tolist() for found in relation.queries_of] == [[0, 1], [0], [2]]


@torch.no_grad()
def test_zeroshot_is_the_nearest_mean_of_prompts(saved, tmp_path):
    loaded = open_model(saved("clip"))
    templates = ["a photo of a {}.", "the {} sits on a tree"]
    (tiny.image_folder(tmp_path) / "templates.txt").write_text("\n".join(templates))
    data = open_data(tmp_path)
    classes = []
    for class_name in tiny.CLASSES:
        prompts = [template.format(class_name.replace("_", " ")) for template in templates]
        vectors = _one_by_one(
            lambda p: loaded.model.get_text_features(**text_inputs(loaded, [p])).pooler_output, prompts
        )
        classes.append(vectors.mean(0) / np.linalg.norm(vectors.mean(0)))
    pictures = _one_by_one(
        lambda s: loaded.model.get_image_features(**image_inputs(loaded, [s.image])).pooler_output, data.samples
    )
    hits = (pictures @ np.stack(classes).T).argmax(1) == [sample.label for sample in data.samples]
    measures = parse_task(f"zeroshot:{tmp_path}", SMALL).evaluate(loaded)
    assert measures["top1"].value == pytest.approx(hits.mean())
    assert measures["top1"].scores.tolist() == hits.tolist()
    assert set(measures) == {"top1"}


@torch.no_grad()
def test_classification_matches_folders_to_the_models_labels_by_name(saved, tmp_path):
    loaded = open_model(saved("vit_classifier"))
    data = open_data(tiny.image_folder(tmp_path))
    to_model = {"blue_cat": 2, "green_dog": 1, "red_car": 0}
    found = [loaded.model(**image_inputs(loaded, [s.image])).logits.argmax().item() for s in data.samples]
    wanted = [to_model[data.class_names[s.label]] for s in data.samples]
    measures = parse_task(f"classification:{tmp_path}", SMALL).evaluate(loaded)
    assert measures["top1"].scores.tolist() == [f == w for f, w in zip(found, wanted, strict=True)]


def test_classification_matches_in_order_when_no_name_is_known(tmp_path, caplog):
    loaded = open_model(tiny.vit_classifier(tmp_path / "m", ("LABEL_0", "LABEL_1", "LABEL_2")))
    parse_task(f"classification:{tiny.image_folder(tmp_path / 'd')}").check(loaded)
    assert "matched in alphabetical order" in caplog.text


@pytest.mark.parametrize("labels", [("red car", "LABEL_1", "LABEL_2"), ("LABEL_0", "LABEL_1")])
def test_classes_that_the_model_does_not_have_are_told(tmp_path, labels):
    loaded = open_model(tiny.vit_classifier(tmp_path / "m", labels))
    with pytest.raises(UserError, match="the model has no label 'blue_cat'; its labels are"):
        parse_task(f"classification:{tiny.image_folder(tmp_path / 'd')}").check(loaded)


def test_a_label_beyond_the_models_classes_is_told(saved, tmp_path):
    path = tiny.json_lines(tmp_path / "t.jsonl", [{"text": "a", "label": 5}])
    with pytest.raises(UserError, match="a label is 5, and the model has 2 classes"):
        parse_task(f"classification:{path}").evaluate(open_model(saved("text_classifier")))


def test_texts_are_classified(saved, tmp_path):
    rows = [{"text": text, "label": "good"} for text in tiny.sentences(6)]
    path = tiny.json_lines(tmp_path / "t.jsonl", [*rows, {"text": "a", "label": "bad"}])
    loaded = open_model(saved("text_classifier"))
    with torch.no_grad():
        found = [loaded.model(**text_inputs(loaded, [r["text"]])).logits.argmax().item() for r in rows]
    measures = parse_task(f"classification:{path}", SMALL).evaluate(loaded)
    assert measures["top1"].scores[:6].tolist() == found


def test_a_plain_module_classifies_what_its_own_function_prepares(tmp_path):
    def collate(samples):
        from octavo.sources import read_image

        return torch.stack([torch.tensor(np.asarray(read_image(s.image))).float().mean((0, 1)) for s in samples])

    loaded = describe_module(nn.Linear(3, 3), collate)
    measures = parse_task(f"classification:{tiny.image_folder(tmp_path)}", SMALL).evaluate(loaded)
    assert measures["top1"].count == 9


@torch.no_grad()
def _recipe_of_transformers(model, tokens, length, stride):
    """https://huggingface.co/docs/transformers/perplexity, with the number of tokens counted exactly."""
    total, count, seen = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        ids = tokens[None, begin:end]
        targets = ids.clone()
        targets[:, : -(end - seen)] = -100
        counted = int((targets[:, 1:] != -100).sum())
        if counted:
            total += model(ids, labels=targets).loss.item() * counted
            count += counted
        seen = end
        if end == len(tokens):
            break
    return math.exp(total / count), total, count


@pytest.mark.parametrize(("length", "stride"), [(24, None), (24, 7), (10, 10), (10, 1)])
def test_perplexity_is_the_recipe_of_transformers(saved, tmp_path, length, stride):
    text = "\n\n".join(tiny.sentences(30))
    (tmp_path / "a.txt").write_text(text)
    loaded = open_model(saved("llama"))
    tokens = loaded.processor.token_ids(text)
    wanted, nats, count = _recipe_of_transformers(loaded.model, tokens, length, stride or length)
    task = parse_task(f"perplexity:{tmp_path / 'a.txt'}", Options(batch_size=4, max_length=length, stride=stride))
    measures = task.evaluate(loaded)
    assert measures["perplexity"].value == pytest.approx(wanted, rel=1e-5)
    bits = nats / count * len(tokens) / len(text.encode()) / math.log(2)
    assert measures["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)
    assert 0 < measures["perplexity"].standard_error < wanted


def test_every_token_with_something_before_it_counts_once():
    for num_tokens, length, stride in [(50, 10, 3), (50, 10, 9), (7, 10, 10), (20, 10, 4)]:
        found = windows(num_tokens, length, stride)
        counted = [place for window in found for place in range(window.first, window.end)]
        assert counted == list(range(1, num_tokens))


def test_json_lines_are_one_text_for_perplexity(saved, tmp_path):
    texts = tiny.sentences(10)
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    path = tiny.json_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    loaded = open_model(saved("llama"))
    values = [parse_task(f"perplexity:{p}").evaluate(loaded)["perplexity"].value for p in (path, tmp_path / "a.txt")]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 10, "stride": 11}, "would leave tokens out"),
        ({"max_length": 1}, "must have at least 2"),
        ({"max_length": 99}, "more than the 24 positions"),
    ],
)
def test_windows_that_cannot_be_are_told(saved, tmp_path, options, message):
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(UserError, match=message):
        parse_task(f"perplexity:{tmp_path / 'a.txt'}", Options(**options)).check(open_model(saved("llama")))


def test_a_text_of_one_token_is_told(tmp_path):
    loaded = open_model(tiny.llama(tmp_path / "m"))
    loaded.processor.tokenizer.backend_tokenizer.post_processor = None
    (tmp_path / "a.txt").write_text("cat")
    if len(loaded.processor.token_ids("cat")) > 1:
        pytest.skip("the tokenizer adds tokens anyway")
    with pytest.raises(UserError, match="fewer than two tokens"):
        parse_task(f"perplexity:{tmp_path / 'a.txt'}").evaluate(loaded)


EMBEDDINGS = {"cosine", "sqnr_db"}
LOGITS = EMBEDDINGS | {"kl", "top1_agreement"}


@pytest.mark.parametrize(
    ("name", "data", "count", "wanted"),
    [
        ("clip", "pairs", 16, EMBEDDINGS),
        ("clip", "folder", 9, EMBEDDINGS),
        ("clip", "text", 20, EMBEDDINGS),
        ("sentence_bert", "text", 20, EMBEDDINGS),
        ("vit", "folder", 9, EMBEDDINGS),
        ("vit_classifier", "folder", 9, LOGITS),
        ("text_classifier", "text", 20, LOGITS),
        ("llama", "pairs", 8, LOGITS),
        ("t5", "text", 20, LOGITS),
    ],
)
def test_fidelity_of_every_kind_of_model(saved, tmp_path, name, data, count, wanted):
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.sentences(20)))
    tiny.image_folder(tmp_path / "folder")
    path = {"pairs": tiny.pairs(tmp_path), "folder": tmp_path / "folder", "text": tmp_path / "text.txt"}[data]
    loaded, task = open_model(saved(name)), parse_task(f"fidelity:{path}", SMALL)
    reference = task.outputs(loaded)
    assert len(reference.rows) == count
    same = task.evaluate(loaded, reference)
    assert set(same) == wanted
    assert same["cosine"].value == pytest.approx(1)
    assert same["sqnr_db"].value > 100
    shaken = task.evaluate(_shaken(loaded), reference)
    assert 0 < shaken["sqnr_db"].value < 40
    assert shaken["cosine"].value < 1
    assert shaken["cosine"].count == count
    if "kl" in wanted:
        assert same["kl"].value == pytest.approx(0, abs=1e-9)
        assert same["top1_agreement"].value == 1
        assert shaken["kl"].value > 0


@torch.no_grad()
def test_fidelity_of_a_language_model_is_the_mean_over_real_tokens(saved, tmp_path):
    texts = tiny.sentences(7)
    path = tiny.json_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    loaded = open_model(saved("llama"))
    shaken, task = _shaken(loaded), parse_task(f"fidelity:{path}", SMALL)
    measures = task.evaluate(shaken, task.outputs(loaded))
    a, b = (torch.cat([m.model(**text_inputs(m, [t])).logits[0] for t in texts]).double() for m in (loaded, shaken))
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    assert measures["kl"].value == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert measures["top1_agreement"].value == pytest.approx((a.argmax(-1) == b.argmax(-1)).double().mean().item())
    assert measures["cosine"].value == pytest.approx(F.cosine_similarity(a, b).mean().item(), rel=1e-5)
    sqnr = 10 * math.log10(a.square().sum() / (a - b).square().sum())
    assert measures["sqnr_db"].value == pytest.approx(sqnr, rel=1e-4)


def test_long_outputs_are_kept_in_part(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity_module, "MAX_KEPT", 10 * tiny.VOCABULARY * 3)
    path = tiny.json_lines(tmp_path / "a.jsonl", [{"text": "a red cat sits on the old tree"}] * 10)
    task = parse_task(f"fidelity:{path}", SMALL)
    assert [len(row) for row in task.outputs(open_model(saved("llama"))).rows] == [3] * 10


def test_fidelity_of_a_plain_module_takes_ready_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ready_for_fidelity.py").write_text(
        "import torch\ndef some(): return [torch.randn(4, 3, generator=torch.Generator().manual_seed(0))] * 2\n"
    )
    torch.manual_seed(0)
    loaded = describe_module(nn.Linear(3, 5))
    task = parse_task("fidelity:ready_for_fidelity:some")
    measures = task.evaluate(_shaken(loaded), task.outputs(loaded))
    assert set(measures) == EMBEDDINGS
    assert measures["cosine"].count == 8


def test_fidelity_without_a_reference_is_told(saved, tmp_path):
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(UserError, match="compares with the unquantized model, whose outputs are not there"):
        parse_task(f"fidelity:{tmp_path / 'a.txt'}").evaluate(open_model(saved("llama")))


def test_measures_of_two_models_on_one_task_are_paired(saved, tmp_path):
    path = tiny.pairs(tmp_path, count=10)
    loaded, task = open_model(saved("clip")), parse_task(f"retrieval:{path}")
    before, after = task.evaluate(loaded), task.evaluate(_shaken(loaded))
    assert task.outputs(loaded) is None
    assert difference(after["r_at_1"], before["r_at_1"]).count == 10
    assert difference(before["r_at_1"], before["r_at_1"]).standard_error == 0
