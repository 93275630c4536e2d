"""Records, rendered."""
