"""Kernels of one family in another of matching tensor shapes (FM §3.5, §4.2)."""
