"""Runs a pass over the elements of one tensor."""
