"""The way of a checkpoint from source to ready."""
