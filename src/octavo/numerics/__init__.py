"""Arithmetic: tensors in, tensors out. Torch, but no nn.Module."""
