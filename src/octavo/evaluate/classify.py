"""Pictures or texts into classes: zero-shot with a dual encoder, or by the logits of a classifier."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.errors import UserError
from octavo.evaluate.metrics import Measure, top_k
from octavo.evaluate.outputs import Outputs
from octavo.evaluate.passes import Options, embed_all_pictures, embed_all_texts
from octavo.sources import (
    DataKind,
    Dataset,
    LoadedModel,
    ModelKind,
    check_fit,
    check_inputs,
    inputs_of,
    logits,
    readable,
)

logger = logging.getLogger(__name__)

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")
"""Prompts for data without templates of its own."""


@dataclass(frozen=True)
class ZeroShot:
    """Which class name in a sentence is nearest to the picture (CLIP, arXiv:2103.00020, section 3.1).

    A class is the mean of its normalized sentences, normalized again.
    """

    name: str
    data: Dataset
    options: Options = field(default_factory=Options)
    kind: ClassVar[str] = "zeroshot"

    def __post_init__(self) -> None:
        if self.data.kind is not DataKind.LABELLED_IMAGES or self.data.class_names is None:
            raise UserError(
                f"task '{self.name}': zeroshot needs pictures by class with the classes' names (a folder for each "
                f"class), and '{self.data.name}' has {self.data.kind.value}"
            )

    def check(self, loaded: LoadedModel) -> None:
        """Raise ``UserError`` unless ``loaded`` embeds texts and pictures."""
        if loaded.kind is not ModelKind.DUAL_ENCODER:
            way_out = "; for a classifier use  classification" if loaded.kind is ModelKind.IMAGE_CLASSIFIER else ""
            raise UserError(
                f"task '{self.name}': zeroshot needs a dual encoder (CLIP, SigLIP), and model '{loaded.source}' is a "
                f"{loaded.kind.value}{way_out}"
            )
        check_inputs(loaded, texts=True, pictures=True, needed_by=f"task '{self.name}'")

    def outputs(self, loaded: LoadedModel) -> Outputs | None:
        """None: accuracy compares with the labels."""
        return None

    def evaluate(self, loaded: LoadedModel, reference: Outputs | None = None) -> dict[str, Measure]:
        """``top1``, and ``top5`` when there are more than five classes."""
        self.check(loaded)
        samples = self.data.samples
        images_ND = embed_all_pictures(loaded, samples, range(len(samples)), self.options)
        labels = torch.tensor([sample.label for sample in samples])
        return _accuracy(F.normalize(images_ND, dim=1) @ self.class_vectors(loaded).T, labels)

    def class_vectors(self, loaded: LoadedModel) -> Tensor:
        """``(num_classes, dim)``, each of length 1."""
        names = [readable(name) for name in self.data.class_names or ()]
        templates = self.data.templates or TEMPLATES
        prompts = [template.format(name) for name in names for template in templates]
        vectors = F.normalize(embed_all_texts(loaded, prompts, self.options), dim=1)
        return F.normalize(vectors.reshape(len(names), len(templates), -1).mean(dim=1), dim=1)


@dataclass(frozen=True)
class Classification:
    """Whether the highest logit is the sample's class."""

    name: str
    data: Dataset
    options: Options = field(default_factory=Options)
    kind: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        if self.data.kind not in (DataKind.LABELLED_IMAGES, DataKind.LABELLED_TEXTS):
            raise UserError(
                f"task '{self.name}': classification needs labels (a folder of pictures for each class, or JSON lines "
                f"with a label), and '{self.data.name}' has {self.data.kind.value}"
            )

    def check(self, loaded: LoadedModel) -> None:
        """Raise ``UserError`` unless ``loaded`` is a classifier that knows the data's classes."""
        if loaded.kind is ModelKind.DUAL_ENCODER:
            raise UserError(f"task '{self.name}': model '{loaded.source}' is a dual encoder; use  zeroshot")
        classifiers = (ModelKind.IMAGE_CLASSIFIER, ModelKind.TEXT_CLASSIFIER, ModelKind.MODULE)
        if loaded.kind not in classifiers:
            raise UserError(
                f"task '{self.name}': classification needs a classifier, and model '{loaded.source}' is a "
                f"{loaded.kind.value}"
            )
        check_fit(self.data, loaded)
        self._model_labels(loaded)

    def outputs(self, loaded: LoadedModel) -> Outputs | None:
        """None: accuracy compares with the labels."""
        return None

    @torch.inference_mode()
    def evaluate(self, loaded: LoadedModel, reference: Outputs | None = None) -> dict[str, Measure]:
        """``top1``, and ``top5`` when there are more than five classes."""
        self.check(loaded)
        samples, make = inputs_of(self.data, loaded, self.options.max_length)
        size = self.options.batch_size
        chunks = [samples[start : start + size] for start in range(0, len(samples), size)]
        logits_NK = torch.cat([logits(loaded, make(chunk)).float().cpu() for chunk in chunks])
        to_model = self._model_labels(loaded)
        labels = torch.tensor([to_model[sample.label or 0] for sample in samples])
        if int(labels.max()) >= logits_NK.shape[1]:
            raise UserError(
                f"task '{self.name}': a label is {int(labels.max())}, and the model has {logits_NK.shape[1]} classes"
            )
        return _accuracy(logits_NK, labels)

    def _model_labels(self, loaded: LoadedModel) -> dict[int, int]:
        """The model's number of each label in the data."""
        numbers = sorted({sample.label for sample in self.data.samples})
        known = loaded.config.label2id if loaded.config is not None else None
        if self.data.class_names is None or not known:
            return {number: number for number in numbers}
        return _match_names(self.data.class_names, known, f"task '{self.name}'")


def _match_names(names: tuple[str, ...], label2id: Mapping[str, int], place: str) -> dict[int, int]:
    """Folder names to the model's labels: by name, or by order when no name is known and the counts are the same.

    Raises:
        UserError: some names are known and others are not, or none is and the counts differ.
    """
    by_name: dict[str, int] = {}
    for label, number in label2id.items():
        for synonym in (label, *label.split(",")):
            by_name.setdefault(_plain(synonym), int(number))
    unknown = [name for name in names if _plain(name) not in by_name]
    if not unknown:
        return {i: by_name[_plain(name)] for i, name in enumerate(names)}
    if len(unknown) == len(names) == len(label2id):
        logger.warning(
            "%s: no class is called as the model's labels are; they are matched in alphabetical order", place
        )
        return {i: i for i in range(len(names))}
    raise UserError(
        f"{place}: the model has no label '{unknown[0]}'; its labels are {', '.join(list(label2id)[:8])}"
        f"{' ...' if len(label2id) > 8 else ''}. Name the class folders as the model does"
    )


def _plain(name: str) -> str:
    return readable(name).lower()


def _accuracy(scores_NK: Tensor, labels: Tensor) -> dict[str, Measure]:
    measures = {"top1": top_k(scores_NK, labels, 1)}
    if scores_NK.shape[1] > 5:
        measures["top5"] = top_k(scores_NK, labels, 5)
    return measures
