"""How close two checkpoints are, and which tensors may alias. Needs no torch."""
