"""Checkpoints on disk: validated headers, bounded configs, sliced reads. Needs no torch."""
