"""Opens a user's data, whatever form it has on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from octavo.demo import model_path, tasks
from octavo.errors import UserError
from octavo.sources.arrays import ARRAY_SUFFIXES, holds_arrays, read_arrays
from octavo.sources.extras import import_callable, is_callable_name
from octavo.sources.files import (
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    read_image_folder,
    read_json_lines,
    read_text_file,
)
from octavo.sources.samples import DataKind, Dataset, LazySamples, Sample, kind_of_samples
from octavo.sources.tables import TABLE_SUFFIXES, is_hub_data, open_hub_data, open_local_tables

_NUM_DEMO_CALIBRATION = 8192
_FIRST_DRAWN = 512


def open_data(spec: str | Path) -> Dataset:
    """Open data as the command line names it.

    Args:
        spec: a text file, JSON lines, a folder of pictures (one directory for each class, or flat), a directory
            or id of the datasets library (``OWNER/NAME@CONFIG#SPLIT``), ``package.module:function`` (returns samples or
            batches), or ``demo:NAME``.

    Raises:
        UserError: it cannot be opened, is empty, or has no known form.
    """
    name = str(spec)
    path = Path(name).expanduser()
    if name.startswith("demo:"):
        return _open_demo(name)
    if path.is_dir() and holds_arrays(path):
        return read_arrays(path, name)
    if path.is_dir():
        return _open_directory(path, name)
    if path.is_file():
        return _open_file(path, name)
    place, _, split = name.rpartition("#")
    if place and Path(place).expanduser().is_dir():
        return open_local_tables(Path(place).expanduser(), name, split=split)
    if is_callable_name(name):
        return _from_function(name)
    if is_hub_data(name):
        return open_hub_data(name)
    raise UserError(
        f"data '{name}': no such file or directory. Data is a text file, a .jsonl file, a folder of pictures, "
        "an id of the datasets library (OWNER/NAME), package.module:function, or demo:NAME"
    )


def demo_data() -> dict[str, Callable[[], Dataset]]:
    """The data sets that come with octavo, by name."""
    return {
        "calibration": _demo_calibration,
        "scenes": _demo_scenes,
        "shapes-100": lambda: _demo_shapes("shapes-100"),
        "shapes-1k": lambda: _demo_shapes("shapes-1k"),
        "stdlib": lambda: read_text_file(model_path("llama") / "held_out.txt", "demo:stdlib"),
        "stdlib-calibration": lambda: read_json_lines(
            model_path("llama") / "calibration.jsonl", "demo:stdlib-calibration"
        ),
    }


def _open_demo(name: str) -> Dataset:
    known = demo_data()
    wanted = name.removeprefix("demo:")
    if wanted not in known:
        raise UserError(f"data '{name}': there is no such demo data; there is {', '.join('demo:' + n for n in known)}")
    return known[wanted]()


def _open_file(path: Path, name: str) -> Dataset:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return read_text_file(path, name)
    if suffix in JSON_SUFFIXES:
        return read_json_lines(path, name)
    if suffix in TABLE_SUFFIXES:
        return open_local_tables(path, name)
    if suffix in ARRAY_SUFFIXES:
        return read_arrays(path, name)
    known = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES, *ARRAY_SUFFIXES))
    raise UserError(f"data '{name}': files ending in '{path.suffix}' are not read; known are {known}, and folders")


def _open_directory(path: Path, name: str) -> Dataset:
    pictures = read_image_folder(path, name)
    return open_local_tables(path, name) if pictures is None else pictures


def _from_function(name: str) -> Dataset:
    given = import_callable(name)()
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise UserError(
            f"data '{name}': the function returned a {type(given).__name__}, and samples or batches are needed"
        )
    items: list[Any] = list(given)
    if not items:
        raise UserError(f"data '{name}' is empty")
    if isinstance(items[0], Sample):
        return Dataset(name, kind_of_samples(items, name), items)
    return Dataset(name, DataKind.BATCHES, items)


def _demo_calibration() -> Dataset:
    """Pairs that are drawn when they are asked for: all 8,192 take seconds, and most runs need a few hundred."""
    drawn: list[Sample] = []

    def pair(index: int) -> Sample:
        if index >= len(drawn):
            wanted = min(_NUM_DEMO_CALIBRATION, max(_FIRST_DRAWN, 2 * index))
            drawn[:] = _pairs(tasks.calibration_pairs(wanted, seed=0), "demo:calibration").samples
        return drawn[index]

    samples = LazySamples(_NUM_DEMO_CALIBRATION, pair)
    return Dataset("demo:calibration", DataKind.CAPTIONED_IMAGES, samples, is_in_random_order=True)


def _demo_scenes() -> Dataset:
    return _pairs(tasks.scenes(), "demo:scenes")


def _demo_shapes(name: str) -> Dataset:
    data = tasks.shapes_100() if name == "shapes-100" else tasks.shapes_1k()
    labels = [int(label) for label in data.labels]
    images = np.asarray(data.images)
    samples = LazySamples(len(labels), lambda i: Sample(image=images[i], label=labels[i]))
    return Dataset(f"demo:{name}", DataKind.LABELLED_IMAGES, samples, tuple(data.class_names), tuple(data.templates))


def _pairs(pairs: Any, name: str) -> Dataset:
    images, captions = np.asarray(pairs.images), list(pairs.captions)
    samples = LazySamples(len(captions), lambda i: Sample(image=images[i], text=captions[i]))
    return Dataset(name, DataKind.CAPTIONED_IMAGES, samples)
