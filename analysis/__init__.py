"""Studies of weight deltas. Reads checkpoints only through `linker_core.weights`."""
