"""Data of the quick start: the embedded arithmetic task and the model that is warm-started on it."""
