"""Embedded models that are small enough to ship, the pictures they know, and how they were trained."""

from octavo.demo.catalog import MODEL_DIR, MODEL_NAMES, model_path

__all__ = ["MODEL_DIR", "MODEL_NAMES", "model_path"]
