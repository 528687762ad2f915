"""What a run on many devices would need: compiled programs, their collectives, FLOPs and memory."""
