"""The back end: every folder here that holds a `spec.py` is a format."""
