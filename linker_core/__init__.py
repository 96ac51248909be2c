"""Tensors of many fine-tunes in one pool: weights, sharing, residency, engine. Knows no HTTP."""
