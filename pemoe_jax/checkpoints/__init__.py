"""Reading and writing parameters: base models and checkpoints of runs."""
