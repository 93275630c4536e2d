"""The torch door: quantizers in and around the modules of a model."""
