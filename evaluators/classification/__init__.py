"""Scores an encoder on labelled texts with fixed classification heads."""
