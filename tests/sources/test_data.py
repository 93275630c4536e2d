from __future__ import annotations

import numpy as np
import pytest

from octavo.errors import UserError
from octavo.sources import DataKind, open_data, read_image
from sources import tiny


def _write(path, text):
    path.write_text(text)
    return str(path)


def test_a_text_file_is_its_paragraphs(tmp_path):
    data = open_data(_write(tmp_path / "a.txt", "one\nstill one\n\n\n two \n"))
    assert [sample.text for sample in data.samples] == ["one\nstill one", "two"]
    assert data.kind is DataKind.TEXTS
    assert data.text_stream() == "one\nstill one\n\n\n two \n"


def test_without_blank_lines_a_text_file_is_its_lines(tmp_path):
    assert len(open_data(_write(tmp_path / "a.txt", "one\ntwo\nthree\n"))) == 3


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, DataKind.TEXTS),
        ({"text": "a", "label": 1}, DataKind.LABELLED_TEXTS),
        ({"query": "a", "document": "b"}, DataKind.TEXT_PAIRS),
        ({"image": "i.png"}, DataKind.IMAGES),
        ({"image": "i.png", "text": "a"}, DataKind.CAPTIONED_IMAGES),
        ({"image": "i.png", "label": 2, "other": 7}, DataKind.LABELLED_IMAGES),
    ],
)
def test_the_keys_of_json_lines_say_what_they_are(tmp_path, row, kind):
    tiny.write_image(tmp_path / "i.png", 0)
    data = open_data(tiny.json_lines(tmp_path / "a.jsonl", [row, row]))
    assert data.kind is kind
    assert len(data) == 2
    assert data.samples[0].label == row.get("label")


def test_labels_that_are_names_are_numbered_alphabetically(tmp_path):
    rows = [{"text": "x", "label": name} for name in ("good", "bad", "good")]
    data = open_data(tiny.json_lines(tmp_path / "a.jsonl", rows))
    assert data.class_names == ("bad", "good")
    assert [sample.label for sample in data.samples] == [1, 0, 1]


def test_a_folder_of_pictures_by_class(tmp_path):
    tiny.image_folder(tmp_path)
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\nthe {}.\n")
    data = open_data(tmp_path)
    assert data.kind is DataKind.LABELLED_IMAGES
    assert data.class_names == tiny.CLASSES
    assert data.templates == ("a photo of a {}.", "the {}.")
    assert [sample.label for sample in data.samples] == [0] * 3 + [1] * 3 + [2] * 3
    assert read_image(data.samples[0].image).size == (24, 20)


def test_a_flat_folder_of_pictures(tmp_path):
    for i in range(4):
        tiny.write_image(tmp_path / f"{i}.PNG", i)
    assert open_data(tmp_path).kind is DataKind.IMAGES


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_tables_are_read_by_column(tmp_path, suffix):
    import datasets

    table = datasets.Dataset.from_dict({"query": ["a", "b"], "document": ["c", "d"], "score": [1, 2]})
    path = tmp_path / f"a.{suffix}"
    {"parquet": table.to_parquet, "csv": table.to_csv, "json": table.to_json}[suffix](str(path))
    for spec in (path, tmp_path):
        data = open_data(spec)
        assert data.kind is DataKind.TEXT_PAIRS
        assert [sample.document for sample in data.samples] == ["c", "d"]


def test_a_saved_data_set_with_pictures_and_class_names(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [str(tiny.write_image(tmp_path / "images" / f"{i}.png", i)) for i in range(2)]
    datasets.Dataset.from_dict({"image": pictures, "label": [1, 0]}, features=features).save_to_disk(tmp_path / "saved")
    data = open_data(tmp_path / "saved")
    assert data.class_names == ("cat", "dog")
    assert [sample.label for sample in data.samples] == [1, 0]
    assert read_image(data.samples[1].image).size == (24, 20)


def test_a_saved_data_set_with_splits_asks_for_one(tmp_path):
    import datasets

    part = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=r"has the splits train, test; name one: .*#train"):
        open_data(tmp_path / "d")
    assert len(open_data(f"{tmp_path / 'd'}#test")) == 1
    with pytest.raises(UserError, match="has no split 'valid'; there is train, test"):
        open_data(f"{tmp_path / 'd'}#valid")


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_data_of_sources.py").write_text(
        "from octavo.sources import Sample\n"
        "def samples(): return (Sample(text=t) for t in ('a', 'b'))\n"
        "def batches(): return [1, 2, 3]\n"
        "def nothing(): return []\n"
        "def wrong(): return 3\n"
    )


def test_a_function_gives_samples_or_batches(functions):
    assert open_data("my_data_of_sources:samples").kind is DataKind.TEXTS
    data = open_data("my_data_of_sources:batches")
    assert data.kind is DataKind.BATCHES
    assert list(data.samples) == [1, 2, 3]


@pytest.mark.parametrize(
    ("spec", "message"),
    [("my_data_of_sources:nothing", "is empty"), ("my_data_of_sources:wrong", "the function returned a int")],
)
def test_a_function_without_data_is_told(functions, spec, message):
    with pytest.raises(UserError, match=message):
        open_data(spec)


def test_demo_data_is_opened_by_name():
    data = open_data("demo:shapes-100")
    assert data.kind is DataKind.LABELLED_IMAGES
    assert len(data.class_names) == 100
    assert data.samples[-1].image.dtype == np.uint8
    assert "{}" in data.templates[0]
    with pytest.raises(UserError, match="no such demo data; there is demo:calibration, demo:scenes"):
        open_data("demo:nothing")


def test_demo_pairs_are_drawn_as_far_as_they_are_needed():
    data = open_data("demo:calibration")
    assert len(data) == 8192
    assert data.is_in_random_order
    few = [data.samples[i] for i in (0, 511)]
    beyond = data.samples[600]
    assert beyond.text
    for before, after in zip(few, [data.samples[i] for i in (0, 511)], strict=True):
        assert before.text == after.text
        assert (before.image == after.image).all()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n", "the file is empty"),
        ("a.jsonl", "\n", "the file is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: a list, and an object is needed"),
        ("a.jsonl", '{"sentence": "a", "id": 3}\n', "line 1: the keys are sentence, id; known forms are {text}"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"query": "a"}\n',
            "line 2: no 'text', which the first line has; the keys are query",
        ),
        ("a.jsonl", '{"text": 3}\n', "line 1: 'text' holds a value of type int"),
        ("a.jsonl", '{"image": "no.png"}\n', r"line 1: no picture .*no.png; paths are relative to the file"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "label": "x"}', "line 1: the label 1 is neither"),
        ("a.jsonl", '{"text": "a", "label": 1.5}\n', "line 1: the label 1.5 is neither"),
        ("a.bin", "x", r"files ending in '.bin' are not read; known are .txt"),
        ("a.csv", "sentence,id\na,1\n", "the keys are sentence, id; known forms"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        open_data(_write(tmp_path / name, text))


def test_a_binary_file_is_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        open_data(tmp_path / "a.txt")


def test_a_missing_file_is_told():
    with pytest.raises(UserError, match=r"data './no/such.txt': no such file or directory\. Data is a text file"):
        open_data("./no/such.txt")


def test_a_data_id_without_connection_says_what_was_tried(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no such file or directory here .* could not be fetched"):
        open_data("no-such/data")


def test_a_directory_with_nothing_in_it_is_told(tmp_path):
    with pytest.raises(UserError, match=r"lies neither a picture .* nor a table"):
        open_data(tmp_path)


def test_a_class_without_pictures_is_told(tmp_path):
    tiny.image_folder(tmp_path)
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(UserError, match="no pictures in the class folder 'empty_class'"):
        open_data(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("a photo\n", "'a photo' does not have exactly one"), ("", "is empty")])
def test_a_template_without_a_place_is_told(tmp_path, text, message):
    tiny.image_folder(tmp_path)
    (tmp_path / "templates.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        open_data(tmp_path)


def test_a_broken_picture_is_told_when_it_is_read(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    data = open_data(tmp_path)
    with pytest.raises(UserError, match=r"picture .*a.png could not be read"):
        read_image(data.samples[0].image)
