"""Mixtures of tiny experts on a frozen T5. Importing this package imports nothing else."""

__version__ = "0.1.0"
