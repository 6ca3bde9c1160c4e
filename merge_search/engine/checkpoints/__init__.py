"""Checkpoints on disk: their headers, the names and groups of their tensors, reading, hashing and writing them."""
