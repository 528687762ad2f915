"""Mixtures of parameter-efficient experts on a frozen T5; importing it imports nothing else."""

__version__ = "0.1.0"
