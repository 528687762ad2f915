"""Checkpoints: base models, runs and adapters, in our formats and in those of others."""
