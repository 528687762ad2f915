"""Plans a train step for `pemoe plan`: compiles it for any mesh, reads memory and communication."""
