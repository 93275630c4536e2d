"""Range finding and weight changing procedures."""
