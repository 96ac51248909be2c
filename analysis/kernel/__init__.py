"""FM's kernel: the weighted consensus of a family's deltas, built, applied, exported, composed."""
