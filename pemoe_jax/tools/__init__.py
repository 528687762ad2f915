"""The commands other than train, evaluate and infer, and their helpers."""
