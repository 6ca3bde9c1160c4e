"""One trial: its recipe, its scores, its outcome."""
