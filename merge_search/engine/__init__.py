"""Recipe -> weights in a live model. Knows recipes, not studies."""
