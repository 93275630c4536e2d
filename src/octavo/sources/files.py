"""Data that lies in files: texts, JSON lines, folders of pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from octavo.errors import UserError
from octavo.sources.samples import DataKind, Dataset, Sample, kind_of_samples

TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw")
JSON_SUFFIXES = (".jsonl", ".ndjson")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
TEMPLATES_FILE = "templates.txt"
FORMS = "{text}, {query, document}, {image, text}, {image, label}, {text, label} or {image}"


def read_text_file(path: Path, name: str) -> Dataset:
    """Paragraphs, which blank lines separate; without any, the lines.

    Raises:
        UserError: the file is empty or not UTF-8.
    """
    text = _decode(path, name)
    paragraphs = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
    if len(paragraphs) == 1:
        paragraphs = [line.strip() for line in text.splitlines() if line.strip()]
    if not paragraphs:
        raise UserError(f"data '{name}': the file is empty")
    return Dataset(name, DataKind.TEXTS, [Sample(text=paragraph) for paragraph in paragraphs], whole_text=text)


def read_json_lines(path: Path, name: str) -> Dataset:
    """One JSON object on each line; the keys of the first say what all of them have.

    An image is a path relative to the file. A label is a number, or a name: names are numbered alphabetically.

    Raises:
        UserError: a line that is no JSON object, keys that fit no form, a missing image; the line is named.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(_decode(path, name).splitlines(), start=1):
        if line.strip():
            rows.append((number, _parse_line(line, number, name)))
    if not rows:
        raise UserError(f"data '{name}': the file is empty")
    keys = form_of(rows[0][1], f"data '{name}', line {rows[0][0]}")
    class_names = label_names(row.get("label") for _, row in rows) if "label" in keys else None
    samples = [_sample(row, keys, class_names, path.parent, f"data '{name}', line {number}") for number, row in rows]
    return Dataset(name, kind_of_samples(samples, name), samples, class_names=class_names)


def read_image_folder(directory: Path, name: str) -> Dataset | None:
    """Pictures in one directory for each class, or all in ``directory``; None when there are none.

    The classes are numbered in alphabetical order. ``templates.txt`` beside them holds one prompt on each line.

    Raises:
        UserError: a class without pictures, or a template without ``{}``.
    """
    subdirectories = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_class = {path.name: _images_in(path) for path in subdirectories}
    if any(by_class.values()):
        empty = [class_name for class_name, images in by_class.items() if not images]
        if empty:
            raise UserError(
                f"data '{name}': no pictures in the class folder '{empty[0]}' ({', '.join(IMAGE_SUFFIXES)})"
            )
        samples = [Sample(image=path, label=i) for i, images in enumerate(by_class.values()) for path in images]
        templates = _read_templates(directory / TEMPLATES_FILE)
        return Dataset(name, DataKind.LABELLED_IMAGES, samples, tuple(by_class), templates)
    images = _images_in(directory)
    return Dataset(name, DataKind.IMAGES, [Sample(image=path) for path in images]) if images else None


def form_of(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Which keys of a row make its samples.

    Raises:
        UserError: the keys fit no form.
    """
    found = {key for key, value in row.items() if value is not None}
    forms = (("image", "label"), ("image", "text"), ("image",), ("query", "document"), ("text", "label"), ("text",))
    for form in forms:
        if found.issuperset(form):
            return form
    raise UserError(f"{place}: the keys are {', '.join(map(str, row)) or 'none'}; known forms are {FORMS}")


def label_names(labels: Iterable[Any]) -> tuple[str, ...] | None:
    """Names of the classes when labels are names; None when they are numbers."""
    names = {label for label in labels if isinstance(label, str)}
    return tuple(sorted(names)) or None


def _sample(
    row: Mapping[str, Any], keys: tuple[str, ...], class_names: tuple[str, ...] | None, base: Path, place: str
) -> Sample:
    values: dict[str, Any] = {}
    for key in keys:
        if row.get(key) is None:
            raise UserError(f"{place}: no '{key}', which the first line has; the keys are {', '.join(row)}")
        values[key] = _value(key, row[key], class_names, base, place)
    return Sample(**values)


def _value(key: str, value: Any, class_names: tuple[str, ...] | None, base: Path, place: str) -> Any:
    if key == "label":
        if isinstance(value, str) and class_names is not None:
            return class_names.index(value)
        if isinstance(value, bool) or not isinstance(value, int) or class_names is not None:
            raise UserError(f"{place}: the label {value!r} is neither a number as the others nor a name as the others")
        return value
    if not isinstance(value, str):
        raise UserError(f"{place}: '{key}' holds a value of type {type(value).__name__}, and a text is needed")
    if key != "image":
        return value
    path = base / value
    if not path.is_file():
        raise UserError(f"{place}: no picture {path}; paths are relative to the file")
    return path


def _parse_line(line: str, number: int, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"data '{name}', line {number}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"data '{name}', line {number}: a {type(row).__name__}, and an object is needed: {FORMS}")
    return row


def _images_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_templates(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    templates = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        problem = f"'{wrong[0]}' does not have exactly one" if wrong else "it is empty"
        raise UserError(f"{path}: {problem}: each line is a sentence with {{}} where the class name goes")
    return templates


def _decode(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data '{name}': not a text file in UTF-8 ({error})") from error
