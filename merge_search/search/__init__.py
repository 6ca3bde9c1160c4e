"""The outer loop. Knows trials, not tensors."""
