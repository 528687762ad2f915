"""Memory, collectives and FLOPs of a train step on any mesh, from compiling it: `pemoe plan`."""
