"""Which trial wins, and whether it is better: validation and sealed test."""
