"""Independent readers of what was written; no torch."""
