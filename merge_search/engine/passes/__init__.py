"""Turns a recipe into the numbers of one pass per tensor."""
