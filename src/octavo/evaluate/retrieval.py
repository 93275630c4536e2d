"""Finding the right document for a query, the right picture for a caption, and the other way round."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.evaluate.metrics import Measure, ranks, recall_at_k
from octavo.evaluate.outputs import Outputs
from octavo.evaluate.passes import Options, embed_all_pictures, embed_all_texts
from octavo.sources import DataKind, Dataset, LoadedModel, ModelKind, Sample, check_inputs


@dataclass(frozen=True)
class Relation:
    """Which of the distinct queries and the distinct documents belong together.

    ``queries`` and ``documents`` are the samples where each is first met. A caption under two pictures is one query
    with two right answers, and a picture with five captions one document.
    """

    queries: tuple[int, ...]
    documents: tuple[int, ...]
    documents_of: tuple[Tensor, ...]
    queries_of: tuple[Tensor, ...]


@dataclass(frozen=True)
class Retrieval:
    """Nearest by cosine among everything in ``data``. ``r_at_k``: the right one is among the first k."""

    name: str
    data: Dataset
    options: Options = field(default_factory=Options)
    kind: ClassVar[str] = "retrieval"

    def __post_init__(self) -> None:
        if self.data.kind not in (DataKind.CAPTIONED_IMAGES, DataKind.TEXT_PAIRS):
            raise UserError(
                f"task '{self.name}': retrieval needs JSON lines with image and text, or with query and document; "
                f"'{self.data.name}' has {self.data.kind.value}"
            )
        if len(self.data) < 2:
            raise UserError(f"task '{self.name}': retrieval needs at least two samples, and '{self.data.name}' has one")

    def check(self, loaded: LoadedModel) -> None:
        """Raise ``UserError`` unless ``loaded`` embeds what the data has."""
        if loaded.kind not in (ModelKind.DUAL_ENCODER, ModelKind.TEXT_ENCODER):
            raise UserError(
                f"task '{self.name}': retrieval needs a dual encoder or a text encoder, and model '{loaded.source}' "
                f"is a {loaded.kind.value}"
            )
        has_pictures = self.data.kind.has_images
        check_inputs(loaded, texts=True, pictures=has_pictures, needed_by=f"task '{self.name}'")

    def outputs(self, loaded: LoadedModel) -> Outputs | None:
        """None: recall compares with the pairs."""
        return None

    def evaluate(self, loaded: LoadedModel, reference: Outputs | None = None) -> dict[str, Measure]:
        """``r_at_1``, ``r_at_5`` from query or caption; ``reverse_r_at_1``, ``reverse_r_at_5`` from the other side."""
        self.check(loaded)
        relation = relate(self.data.samples)
        queries, documents = self._embed(loaded, relation)
        forward = ranks(queries, documents, list(relation.documents_of))
        backward = ranks(documents, queries, list(relation.queries_of))
        return {
            "r_at_1": recall_at_k(forward, 1),
            "r_at_5": recall_at_k(forward, 5),
            "reverse_r_at_1": recall_at_k(backward, 1),
            "reverse_r_at_5": recall_at_k(backward, 5),
        }

    def _embed(self, loaded: LoadedModel, relation: Relation) -> tuple[Tensor, Tensor]:
        """``(num_queries, dim)`` and ``(num_documents, dim)``."""
        samples, options = self.data.samples, self.options
        if self.data.kind is DataKind.CAPTIONED_IMAGES:
            captions = [samples[i].text or "" for i in relation.queries]
            pictures = embed_all_pictures(loaded, samples, relation.documents, options)
            return embed_all_texts(loaded, captions, options), pictures
        queries = [samples[i].query or "" for i in relation.queries]
        documents = [samples[i].document or "" for i in relation.documents]
        return (
            embed_all_texts(loaded, queries, options, role="query"),
            embed_all_texts(loaded, documents, options, role="document"),
        )


def relate(samples: Sequence[Sample]) -> Relation:
    """Distinct queries (or captions) and documents (or pictures) of ``samples``, and who belongs to whom."""
    first_query: dict[Hashable, int] = {}
    first_document: dict[Hashable, int] = {}
    pairs: list[tuple[Hashable, Hashable]] = []
    for index, sample in enumerate(samples):
        query: Hashable = sample.query if sample.query is not None else sample.text
        document: Hashable = sample.document if sample.document is not None else _picture_key(sample, index)
        first_query.setdefault(query, index)
        first_document.setdefault(document, index)
        pairs.append((query, document))
    place_of_query = {key: place for place, key in enumerate(first_query)}
    place_of_document = {key: place for place, key in enumerate(first_document)}
    documents_of: list[set[int]] = [set() for _ in first_query]
    queries_of: list[set[int]] = [set() for _ in first_document]
    for query, document in pairs:
        documents_of[place_of_query[query]].add(place_of_document[document])
        queries_of[place_of_document[document]].add(place_of_query[query])
    return Relation(
        tuple(first_query.values()), tuple(first_document.values()), _indices(documents_of), _indices(queries_of)
    )


def _picture_key(sample: Sample, index: int) -> Hashable:
    """Pictures in files are the same when the file is; others are taken to be all different."""
    return sample.image if isinstance(sample.image, Path) else index


def _indices(sets: list[set[int]]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(sorted(members)) for members in sets)
