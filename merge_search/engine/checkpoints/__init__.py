"""Checkpoints on disk: what their headers say, how tensors are named, read, hashed and written."""
