"""Choosing tokens from logits: many rows at once, each as if it were alone."""
