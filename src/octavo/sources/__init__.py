"""Opens the outside world: models, their processors, and data."""

from octavo.sources.batches import Batches, batches, check_fit, inputs_of, readable, window_length
from octavo.sources.data import open_data
from octavo.sources.embeddings import embed_images, embed_texts, logits
from octavo.sources.feeding import as_batches, feed
from octavo.sources.inputs import check_inputs, image_inputs, processor_of, text_inputs
from octavo.sources.kinds import ModelKind
from octavo.sources.models import LoadedModel, describe_module, open_model, open_untrained
from octavo.sources.processors import Processor
from octavo.sources.samples import DataKind, Dataset, Sample, read_image

__all__ = [
    "Batches",
    "DataKind",
    "Dataset",
    "LoadedModel",
    "ModelKind",
    "Processor",
    "Sample",
    "as_batches",
    "batches",
    "check_fit",
    "check_inputs",
    "describe_module",
    "embed_images",
    "embed_texts",
    "feed",
    "image_inputs",
    "inputs_of",
    "logits",
    "open_data",
    "open_model",
    "open_untrained",
    "processor_of",
    "read_image",
    "readable",
    "text_inputs",
    "window_length",
]
