"""The mathematics: T5, adapters, routing, optimisers and steps. Imports jax, flax and optax alone."""
