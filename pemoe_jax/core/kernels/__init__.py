"""Forms of core functions for one backend, with the same signatures, tested against the core."""
