"""Numerics: T5, adapters, routing, optimizers, steps. Imports only jax, flax, optax, numpy."""
