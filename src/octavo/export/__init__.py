"""Writers: a snapshot in, files out."""
