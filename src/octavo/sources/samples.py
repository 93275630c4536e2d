"""One sample, and the samples that a user's data is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, overload

import numpy as np

from octavo.errors import UserError
from octavo.sources.extras import require


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One thing to feed a model, whichever of these it has.

    ``image`` is a file (opened when it is needed), a PIL image, or a uint8 array ``(height, width, 3)``.
    """

    text: str | None = None
    image: Any = None
    query: str | None = None
    document: str | None = None
    label: int | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of the sample."""
        return tuple(text for text in (self.text, self.query, self.document) if text is not None)


class DataKind(Enum):
    """What the samples of a data set have."""

    TEXTS = "texts"
    TEXT_PAIRS = "queries and documents"
    CAPTIONED_IMAGES = "pictures with texts"
    LABELLED_IMAGES = "pictures by class"
    LABELLED_TEXTS = "texts by class"
    IMAGES = "pictures"
    BATCHES = "ready batches"
    ARRAYS = "arrays by the names of a model's inputs"

    @property
    def has_texts(self) -> bool:
        """Every sample has a text."""
        return self in (DataKind.TEXTS, DataKind.TEXT_PAIRS, DataKind.CAPTIONED_IMAGES, DataKind.LABELLED_TEXTS)

    @property
    def has_images(self) -> bool:
        """Every sample has a picture."""
        return self in (DataKind.CAPTIONED_IMAGES, DataKind.LABELLED_IMAGES, DataKind.IMAGES)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of one kind.

    ``name`` is what the user wrote. ``whole_text`` is the text file that the samples are paragraphs of.
    ``templates`` are the sentences that a class name is put into (``"a photo of a {}."``).
    Of samples that are ``is_in_random_order`` the first few are as good as any: the others need not be made.
    The samples of ``DataKind.BATCHES`` are batches, as the user's function gave them; those of ``DataKind.ARRAYS`` are
    dicts of tensors with a first axis of one.
    """

    name: str
    kind: DataKind
    samples: Sequence[Any]
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    whole_text: str | None = None
    is_in_random_order: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def text_stream(self) -> str:
        """All texts as one, paragraphs apart, which is how perplexity on WikiText is measured."""
        if self.whole_text is not None:
            return self.whole_text
        return "\n\n".join(text for sample in self.samples for text in sample.texts)


class LazySamples(Sequence[Sample]):
    """Samples that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], Sample]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._make(index % self._count)

    def __iter__(self) -> Iterator[Sample]:
        return (self._make(index) for index in range(self._count))


def kind_of_samples(samples: Sequence[Sample], name: str) -> DataKind:
    """What ``samples`` have, judged by the first.

    Raises:
        UserError: no sample, or one with nothing in it.
    """
    if len(samples) == 0:
        raise UserError(f"data '{name}' is empty")
    first = samples[0]
    if first.image is not None:
        if first.label is not None:
            return DataKind.LABELLED_IMAGES
        return DataKind.IMAGES if first.text is None else DataKind.CAPTIONED_IMAGES
    if first.query is not None and first.document is not None:
        return DataKind.TEXT_PAIRS
    if first.text is not None:
        return DataKind.TEXTS if first.label is None else DataKind.LABELLED_TEXTS
    raise UserError(f"data '{name}': a sample has a text, an image, or a query and a document; the first one has none")


def read_image(image: Any) -> Any:
    """The picture of a sample as a PIL image in RGB or a uint8 array ``(height, width, 3)``.

    Raises:
        UserError: the file is missing or is no picture.
    """
    if isinstance(image, np.ndarray):
        return image
    require("PIL", needed_for="reading pictures")
    from PIL import Image, UnidentifiedImageError

    if not isinstance(image, (str, Path)):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"picture {image} could not be read: {error}") from error
