"""`pemoe plan`: memory, collectives and FLOPs of a train step on any mesh, from compilation."""
