"""Data of the datasets library: local tables and ids of the Hugging Face hub. No pickles, no scripts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from octavo.errors import UserError
from octavo.sources.extras import require
from octavo.sources.files import IMAGE_SUFFIXES, JSON_SUFFIXES, TEXT_SUFFIXES, form_of, label_names
from octavo.sources.samples import Dataset, LazySamples, Sample, kind_of_samples

TABLE_SUFFIXES = (".parquet", ".csv", ".json", ".arrow")
FILE_SUFFIXES = (*TABLE_SUFFIXES, *JSON_SUFFIXES, *TEXT_SUFFIXES)
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".arrow": "arrow"}
_HUB_DATA = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<config>[\w.-]+))?(#(?P<split>[\w.\[\]:%-]+))?"
)


def is_hub_data(name: str) -> bool:
    """Could ``name`` be the id of a data set on the hub, ``OWNER/NAME``? What ends as a file does is a file."""
    return _HUB_DATA.fullmatch(name) is not None and not name.endswith(FILE_SUFFIXES)


def open_local_tables(path: Path, name: str, *, split: str | None = None) -> Dataset:
    """One table file, or a directory that ``save_to_disk`` wrote (``DIRECTORY#SPLIT``) or that holds table files.

    Raises:
        UserError: nothing there that is read, or several splits and none is named.
    """
    is_saved = path.is_dir() and any((path / marker).is_file() for marker in ("dataset_info.json", "dataset_dict.json"))
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in TABLE_SUFFIXES)
    if not is_saved and not files:
        raise UserError(
            f"data '{name}': in this directory lies neither a picture ({', '.join(IMAGE_SUFFIXES)}), nor a folder of "
            f"them for each class, nor a table ({', '.join(TABLE_SUFFIXES)})"
        )
    require("datasets", needed_for=f"reading '{name}'")
    import datasets

    try:
        if is_saved:
            return _from_table(_one_split(datasets.load_from_disk(str(path)), name, split), name, base=path)
        builder = _BUILDERS[files[0].suffix]
        same = [str(file) for file in files if file.suffix == files[0].suffix]
        return _from_table(datasets.load_dataset(builder, data_files=same, split="train"), name, base=files[0].parent)
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data '{name}' could not be read: {error}") from error


def open_hub_data(name: str) -> Dataset:
    """A data set of the hub: ``ID``, ``ID@CONFIG``, ``ID#SPLIT`` or ``ID@CONFIG#SPLIT``.

    Raises:
        UserError: it cannot be fetched, or has several splits and none is named.
    """
    parts = _HUB_DATA.fullmatch(name)
    assert parts is not None, name
    require("datasets", needed_for=f"fetching '{name}'")
    import datasets

    try:
        table = datasets.load_dataset(parts["id"], parts["config"], split=parts["split"])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"data '{name}': there is no such file or directory here ({Path.cwd()}), and as an id of the datasets "
            f"library it could not be fetched: {first_line}"
        ) from error
    return _from_table(_one_split(table, name, None), name, base=Path())


def _one_split(table: Any, name: str, split: str | None) -> Any:
    """``table`` itself, or the split of it that is named or is the only one."""
    if not isinstance(table, dict):
        return table
    if split is None and len(table) == 1:
        return next(iter(table.values()))
    if split is None:
        raise UserError(f"data '{name}' has the splits {', '.join(table)}; name one: {name}#{next(iter(table))}")
    if split not in table:
        raise UserError(f"data '{name}' has no split '{split}'; there is {', '.join(table)}")
    return table[split]


def _from_table(table: Any, name: str, *, base: Path) -> Dataset:
    """Samples from the columns text, image, query, document, label; paths of pictures are relative to ``base``."""
    import datasets

    if len(table) == 0:
        raise UserError(f"data '{name}' is empty")
    keys = form_of(dict.fromkeys(table.column_names, True), f"data '{name}'")
    table = table.select_columns(list(keys))
    feature = table.features.get("label")
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if "label" in keys and names is None:
        names = label_names(table["label"])
    samples = LazySamples(len(table), lambda index: _row(table[index], names, base, f"data '{name}', row {index}"))
    return Dataset(name, kind_of_samples(samples, name), samples, class_names=names)


def _row(row: dict[str, Any], class_names: tuple[str, ...] | None, base: Path, place: str) -> Sample:
    missing = [key for key, value in row.items() if value is None]
    if missing:
        raise UserError(f"{place}: no '{missing[0]}'")
    if isinstance(row.get("label"), str) and class_names is not None:
        row = {**row, "label": class_names.index(row["label"])}
    if isinstance(row.get("image"), str):
        row = {**row, "image": base / row["image"]}
    return Sample(**row)
