"""The mathematics: T5, adapters, routing, optimisers, steps. Imports jax, flax, optax alone."""
