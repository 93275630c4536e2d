"""Data through observers."""
