"""The commands beside train, evaluate and infer."""
