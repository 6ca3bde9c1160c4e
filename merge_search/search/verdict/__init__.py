"""The choice of the winner and its proof: validation and sealed test."""
