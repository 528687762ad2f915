"""How commands run: options, gin flags, several processes, the training loop, files, caches."""
