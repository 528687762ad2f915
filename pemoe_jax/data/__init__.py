"""seqio tasks to numpy batches: reading, packing, answer choices, prefetching, embeddings."""
